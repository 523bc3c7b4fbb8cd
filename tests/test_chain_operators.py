"""What operators do with the contracts, by the Python interface: in this process and over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain import contracts, operations
from dstack_emu.chain.ask import remote_ask
from dstack_emu.chain.contracts import (
    AppContract,
    BootInfo,
    ContractError,
    Decision,
    KmsContract,
    KmsInfo,
    RpcError,
    Sender,
    deploy_kms,
)
from dstack_emu.chain.embedded import ChainSettings, EmbeddedChain
from dstack_emu.chain.quantities import checksummed
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.listen import bind_tcp, serve
from tests.chains import BEGAN
from tests.ports import refusing_port

IMAGE, MR, DEVICE, COMPOSE = (bytes([number]) * 32 for number in range(1, 5))
ALLOWED = Decision(True, "")


@asynccontextmanager
async def opened(revision: AuthEthRevision) -> AsyncIterator[EmbeddedChain]:
    """Run a chain with the contracts of a revision."""
    made = EmbeddedChain(ChainSettings(Seed.of("operators").derive, lambda: BEGAN, BEGAN, revision))
    await made.deploy()
    yield made
    made.close()


@pytest.fixture
async def chain() -> AsyncIterator[EmbeddedChain]:
    """A chain with the contracts of revision next."""
    async with opened("next") as made:
        yield made


async def test_operator_allows_a_kms_and_an_app_and_withdraws_it(chain: EmbeddedChain) -> None:
    owner, kms = chain.owner, chain.kms
    boot = BootInfo(os_image_hash=IMAGE, mr_aggregated=MR, device_id=DEVICE)
    for act in (kms.add_os_image(owner, IMAGE), kms.add_kms(owner, MR), kms.add_device(owner, DEVICE)):
        assert (await kms.decide_kms(boot)).allowed is False
        await act
    assert await kms.decide_kms(boot) == ALLOWED

    app = await kms.deploy_app(owner, compose_hash=COMPOSE)
    boot = BootInfo(app.address, COMPOSE, os_image_hash=IMAGE, device_id=DEVICE)
    assert await kms.decide_app(boot) == await app.decide(boot) == Decision(False, "Device not allowed")
    await app.add_device(owner, DEVICE)
    assert await kms.decide_app(boot) == ALLOWED
    before = chain.ledger.head.number
    await app.remove_compose_hash(owner, COMPOSE)
    assert await kms.decide_app(boot) == Decision(False, "Compose hash not allowed")
    assert await kms.decide_app(boot, block=before) == ALLOWED


async def test_operator_publishes_what_a_kms_is(chain: EmbeddedChain) -> None:
    info = KmsInfo(b"k" * 33, b"c" * 91, b"q" * 5000, b"[]")
    await chain.kms.set_info(chain.owner, info)
    await chain.kms.set_gateway_app_id(chain.owner, "0xgateway")
    assert await chain.kms.info() == info
    assert await chain.kms.gateway_app_id() == "0xgateway"


@pytest.mark.parametrize("revision", ["0.5.11", "next"])
async def test_contract_is_handed_over(revision: AuthEthRevision) -> None:
    async with opened(revision) as chain:
        other = chain.sender(1)
        with pytest.raises(ContractError, match=f"OwnableUnauthorizedAccount\\({checksummed(other.address)}\\)"):
            await chain.kms.add_os_image(other, IMAGE)
        await chain.kms.transfer_ownership(chain.owner, other.address)
        if revision == "next":
            assert await chain.kms.owner() == chain.owner.address
            await chain.kms.accept_ownership(other)
        else:
            with pytest.raises(ContractError, match=r"is of dstack 0\.5\.11"):
                await operations.accept_ownership(chain.kms, other)
        assert await chain.kms.owner() == other.address
        await chain.kms.add_os_image(other, IMAGE)


async def test_app_is_upgraded_until_that_is_disabled(chain: EmbeddedChain) -> None:
    owner = chain.owner
    app = await chain.kms.deploy_app(owner, allow_any_device=True)
    implementation = await chain.kms.app_implementation()
    await app.upgrade(owner, implementation)
    await app.disable_upgrades(owner)
    with pytest.raises(ContractError, match="Upgrades are permanently disabled"):
        await app.upgrade(owner, implementation)


async def test_address_without_a_contract_has_no_answer(chain: EmbeddedChain) -> None:
    nobody = KmsContract(chain.ask, b"\7" * 20)
    with pytest.raises(ContractError, match=r"no answer to owner\(\) at 0x0707"):
        await nobody.owner()


async def test_same_acts_work_on_a_node_that_runs_elsewhere(chain: EmbeddedChain) -> None:
    server = await serve(chain.server.app(), bind_tcp("127.0.0.1", 0))
    client = HttpClient(timeout=20, max_answer=1 << 20)
    try:
        sender = Sender(remote_ask(client, server.url), chain.owner.address)
        kms = await deploy_kms(sender, chain.settings.revision or "next")
        app = await kms.deploy_app(sender, compose_hash=COMPOSE, allow_any_device=True)
        with pytest.raises(ContractError, match="Invalid app ID"):
            await kms.register_app(sender, bytes(20))
        await kms.add_os_image(sender, IMAGE)
        assert await kms.decide_app(BootInfo(app.address, COMPOSE, os_image_hash=IMAGE)) == ALLOWED
        assert await AppContract(chain.ask, app.address).owner() == chain.owner.address
    finally:
        await client.close()
        await server.close()


async def test_act_waits_until_a_node_mines_it(chain: EmbeddedChain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "PAUSE", 0.01)
    unmined = 3

    async def mining_later(method: str, params: list[Any]) -> Any:
        nonlocal unmined
        if method == "eth_getTransactionReceipt" and unmined > 0:
            unmined -= 1
            return None
        return await chain.ask(method, params)

    sender = Sender(mining_later, chain.owner.address)
    changed = await operations.list_entry(chain.kms, sender, "os-image", IMAGE, allowed=True)
    assert (changed.before, changed.after, unmined) == ("not allowed", "allowed", 0)
    monkeypatch.setattr(contracts, "RECEIPT_TIMEOUT", 0.05)
    unmined = 100
    with pytest.raises(ContractError, match="was sent, but not mined within"):
        await chain.kms.add_os_image(sender, MR)


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b'{"id":2,"result":"0x"}', b'{"id":1,"error":7}', b"[" * 10_000, b'{"id":1,"error":{}}']
)
async def test_node_that_answers_nonsense_is_an_error(answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    client = HttpClient(timeout=20, max_answer=1 << 20)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(RpcError):
            await remote_ask(client, url)("eth_chainId", [])
        await client.close()


async def test_node_that_is_down_is_an_error() -> None:
    client = HttpClient(timeout=20, max_answer=1 << 20)
    with refusing_port() as port, pytest.raises(RpcError, match=f"no answer of http://127.0.0.1:{port}: ") as refused:
        await remote_ask(client, f"http://user:password@127.0.0.1:{port}")("eth_chainId", [])
    assert "password" not in str(refused.value)
    await client.close()


async def test_no_private_key_is_logged(chain: EmbeddedChain, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    requests = [
        {"id": 1, "method": "eth_sendTransaction", "params": [{"from": f"0x{chain.owner.address.hex()}", **changed}]}
        for changed in ({}, {"gas": "0x1"}, {"value": hex(10**30)})
    ]
    answer = chain.rpc.answer(json.dumps(requests).encode())
    said = [str(answer), *(record.getMessage() for record in caplog.records)]
    assert len(said) > 1
    assert not any(key.hex() in each for each in said for key in chain.private_keys)
