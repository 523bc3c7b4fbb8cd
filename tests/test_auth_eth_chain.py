"""The webhook before a chain with dstack's contracts: it says what they say, and heeds each transaction at once."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from dstack_emu.auth.eth import EthAuth, KeptHead
from dstack_emu.auth.eth_server import eth_app
from dstack_emu.auth.eth_settings import EthSettings
from tests.chains import LiveChain, running_chain
from tests.test_auth_eth import ASKED

Client = TestClient[web.Request, web.Application]
IMAGE, AGGREGATED, DEVICE, COMPOSE = (bytes([each]) * 32 for each in (0x11, 0x22, 0x33, 0x44))


@pytest.fixture(scope="module", params=["next", "0.5.11"])
def shared_chain(request: pytest.FixtureRequest) -> Iterator[LiveChain]:
    with running_chain(request.param) as chain:
        yield chain


@pytest.fixture
def chain(shared_chain: LiveChain) -> LiveChain:
    """The chain of a revision, as it began."""
    shared_chain.reset()
    return shared_chain


@pytest.fixture
async def webhook(chain: LiveChain) -> AsyncIterator[Client]:
    """The webhook of the same revision."""
    settings = EthSettings(chain.url, chain.kms.address, chain.revision, chain_id=31337)
    async with TestClient(TestServer(eth_app(settings))) as client:
        yield client


def send(chain: LiveChain, call: Any) -> None:
    chain.web3.eth.wait_for_transaction_receipt(call.transact({"from": chain.owner}))


async def reason(client: Client, caller: str, app_id: str = "", **changed: Any) -> str:
    """Return why a boot is denied; empty if it is allowed."""
    asked = {
        "mrAggregated": AGGREGATED.hex(),
        "osImageHash": IMAGE.hex(),
        "appId": app_id.lower().removeprefix("0x"),
        "composeHash": COMPOSE.hex(),
        "instanceId": "",
        "deviceId": DEVICE.hex(),
        "tcbStatus": "UpToDate",
        "advisoryIds": ["INTEL-SA-00837"],
    }
    async with client.post(f"/bootAuth/{caller}", json={**asked, **changed}) as response:
        answer = await response.json()
    assert (response.status, answer["isAllowed"]) == (200, not answer["reason"]), answer
    assert answer["gatewayAppId"] == "the gateway"
    return str(answer["reason"])


async def test_each_reason_is_the_contracts_until_a_transaction_admits_it(chain: LiveChain, webhook: Client) -> None:
    kms = chain.kms.functions
    send(chain, kms.setGatewayAppId("the gateway"))
    assert await reason(webhook, "kms", tcbStatus="OutOfDate") == "TCB status is not up to date"
    assert await reason(webhook, "kms") == "OS image is not allowed"
    send(chain, kms.addOsImageHash(IMAGE))
    assert await reason(webhook, "kms") == "Aggregated MR not allowed"
    send(chain, kms.addKmsAggregatedMr(AGGREGATED))
    assert await reason(webhook, "kms") == "KMS is not allowed to boot on this device"
    send(chain, kms.addKmsDevice(DEVICE))
    assert await reason(webhook, "kms") == ""
    send(chain, kms.removeKmsAggregatedMr(AGGREGATED))
    assert await reason(webhook, "kms") == "Aggregated MR not allowed"

    nobody = "0x" + "55" * 20
    assert await reason(webhook, "app", nobody) == "App not registered"
    send(chain, kms.registerApp(nobody))
    assert await reason(webhook, "app", nobody, osImageHash="12") == "OS image is not allowed"
    assert await reason(webhook, "app", nobody) == "App not deployed or invalid address"
    app = chain.deploy_app(tcb=True, any_device=False)
    assert await reason(webhook, "app", app.address, tcbStatus="OutOfDate") == "TCB status is not up to date"
    assert await reason(webhook, "app", app.address) == "Compose hash not allowed"
    send(chain, app.functions.addComposeHash(COMPOSE))
    assert await reason(webhook, "app", app.address) == "Device not allowed"
    send(chain, app.functions.addDevice(DEVICE))
    assert await reason(webhook, "app", app.address) == ""
    send(chain, app.functions.setRequireTcbUpToDate(False))
    assert await reason(webhook, "app", app.address, tcbStatus="OutOfDate") == ""
    send(chain, app.functions.removeComposeHash(COMPOSE))
    assert await reason(webhook, "app", app.address) == "Compose hash not allowed"


async def test_info_is_the_contracts(chain: LiveChain, webhook: Client) -> None:
    send(chain, chain.kms.functions.setGatewayAppId("é" * 20))
    async with webhook.get("/") as response:
        found = await response.json()
    assert (found["status"], found["gatewayAppId"], found["chainId"]) == ("ok", "é" * 20, 31337)
    assert found["appImplementation"] == found["appAuthImplementation"]
    assert found["appImplementation"] == chain.kms.functions.appImplementation().call()


@pytest.mark.parametrize("confirmations", [0, 2])
async def test_confirmations_and_the_block_cache_judge_a_past_state(chain: LiveChain, confirmations: int) -> None:
    for _ in range(confirmations):
        chain.rpc("evm_mine")
    now = [0.0]
    settings = EthSettings(chain.url, chain.kms.address, "next", confirmations=confirmations)
    service = EthAuth(settings, head=KeptHead(4, lambda: now[0]))
    try:
        assert (await service.decide(ASKED, True)).reason == "TCB status is not up to date"
        send(chain, chain.kms.functions.setGatewayAppId("new"))
        assert (await service.decide(ASKED, True)).gateway_app_id == ""
        now[0] = 4.0
        seen = (await service.decide(ASKED, True)).gateway_app_id
        assert seen == ("" if confirmations else "new")
        chain.rpc("evm_mine")
        chain.rpc("evm_mine")
        now[0] = 8.0
        assert (await service.decide(ASKED, True)).gateway_app_id == "new"
    finally:
        await service.close()


async def test_address_without_a_contract_and_a_chain_of_another_id_deny(chain: LiveChain) -> None:
    revision = chain.revision
    for settings, cause in (
        (EthSettings(chain.url, "0x" + "99" * 20, revision), "is there a contract at KMS_CONTRACT_ADDR?"),
        (EthSettings(chain.url, chain.kms.functions.appImplementation().call(), revision), "execution reverted"),
        (EthSettings(chain.url, chain.kms.address, "next", chain_id=1), "1 expected, got 31337"),
        (EthSettings(chain.url, chain.kms.address, "next", confirmations=10_000), "configured finality"),
    ):
        service = EthAuth(settings)
        try:
            decision = await service.decide(ASKED, True)
        finally:
            await service.close()
        assert (decision.is_allowed, decision.gateway_app_id, decision.rule) == (False, "", "chain")
        assert cause in decision.chain_error
