"""The chain, as web3.py sees it: transactions, events, past states, errors, methods for tests."""

import fcntl
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import rlp

from dstack_emu.chain.acts import Balance, Kept
from dstack_emu.chain.artefacts import kms_contract
from dstack_emu.chain.embedded import ChainSettings, EmbeddedChain
from dstack_emu.chain.errors import StoreError
from dstack_emu.chain.quantities import checksummed
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from tests.chains import BEGAN, LiveChain, running_chain
from tests.commands import usage_error
from tests.processes import start
from tests.repository import ROOT
from tests.web3_client import connect, send

IMAGE, OTHER = bytes.fromhex("11" * 32), bytes.fromhex("22" * 32)


@pytest.fixture(scope="module")
def shared_chain() -> Iterator[LiveChain]:
    """One chain for all tests of this file."""
    with running_chain() as chain:
        yield chain


@pytest.fixture
def chain(shared_chain: LiveChain) -> LiveChain:
    """The chain as it began."""
    shared_chain.reset()
    return shared_chain


def test_allowing_an_image_is_a_transaction_with_an_event(chain: LiveChain) -> None:
    function = chain.kms.functions.addOsImageHash(IMAGE)
    before = chain.web3.eth.block_number
    hash_ = function.transact({"from": chain.owner})
    receipt = chain.web3.eth.wait_for_transaction_receipt(hash_)
    assert (receipt["status"], receipt["blockNumber"]) == (1, before + 1)
    (log,) = chain.kms.events.OsImageHashAdded().get_logs(from_block=0)
    assert (log["args"]["osImageHash"], log["transactionHash"]) == (IMAGE, hash_)
    assert chain.kms.functions.allowedOsImages(IMAGE).call() is True
    assert chain.kms.functions.allowedOsImages(IMAGE).call(block_identifier=before) is False


def test_custom_error_of_a_refused_act_is_decoded(chain: LiveChain) -> None:
    from web3.exceptions import ContractCustomError

    with pytest.raises(ContractCustomError) as refused:
        chain.kms.functions.addOsImageHash(IMAGE).call({"from": chain.accounts[1]})
    expected = "0x118cdaa7" + "00" * 12 + chain.accounts[1][2:].lower()
    assert refused.value.data == expected


@pytest.mark.parametrize("act", ["addOsImageHash", "removeOsImageHash"])  # the second is refunded a part at its end
def test_estimated_gas_suffices_and_is_hardly_more_than_needed(chain: LiveChain, act: str) -> None:
    from web3.exceptions import Web3Exception

    if act.startswith("remove"):
        chain.kms.functions.addOsImageHash(IMAGE).transact({"from": chain.owner})
    function = getattr(chain.kms.functions, act)(IMAGE)
    gas = function.estimate_gas({"from": chain.owner})
    function.call({"from": chain.owner, "gas": gas})
    with pytest.raises(Web3Exception, match="execution reverted"):  # by the proxy, whose inner call has too little
        function.call({"from": chain.owner, "gas": gas * 1_000 // 1_015 - 1})


def test_text_of_a_refused_act_is_the_message(chain: LiveChain) -> None:
    from web3.exceptions import ContractLogicError

    with pytest.raises(ContractLogicError, match="Invalid app ID"):
        chain.kms.functions.registerApp("0x" + "00" * 20).estimate_gas()


def test_signed_transaction_needs_no_unlocked_account(chain: LiveChain) -> None:
    account = chain.web3.eth.account.from_key(chain.chain.private_keys[0])
    assert account.address == chain.owner
    built = chain.kms.functions.addOsImageHash(IMAGE).build_transaction(
        {"from": account.address, "nonce": chain.web3.eth.get_transaction_count(account.address)}
    )
    hash_ = chain.web3.eth.send_raw_transaction(account.sign_transaction(built).raw_transaction)
    assert chain.web3.eth.get_transaction(hash_)["from"] == account.address
    assert chain.kms.functions.allowedOsImages(IMAGE).call()


def test_revert_returns_to_a_snapshot(chain: LiveChain) -> None:
    snapshot = chain.rpc("evm_snapshot")
    chain.kms.functions.addOsImageHash(IMAGE).transact({"from": chain.owner})
    assert chain.rpc("evm_revert", snapshot) is True
    assert chain.kms.functions.allowedOsImages(IMAGE).call() is False
    assert chain.rpc("evm_revert", snapshot) is False


# ---- JSON-RPC


def post(chain: LiveChain, body: bytes) -> Any:
    """Send a body without a content type that says JSON, and return the answer."""
    host = chain.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200
        return json.loads(content) if content else None
    finally:
        connection.close()


def request(method: str, *params: Any, id_: Any = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id_, "method": method, "params": list(params)}


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://pages.example", 403),
        ("null", 403),
        ("http://127.0.0.1.example:8545", 403),
        ("http://203.0.113.5", 403),
        ("http://localhost:3000", 200),
        ("http://[::1]:3000", 200),
        ("chrome-extension://nkbihfbeogaeaoehlefnkodbefgpgknn", 200),
    ],
)
async def test_pages_of_other_hosts_may_send_no_transaction(origin: str, status: int, chain: LiveChain) -> None:
    before = chain.web3.eth.block_number
    act = request("evm_mine")
    async with aiohttp.ClientSession(headers={"Origin": origin}) as session:
        async with session.post(chain.url, json=act) as answer:
            assert answer.status == status
        assert chain.web3.eth.block_number == before + (status == 200)
        if status == 403:
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                await session.ws_connect(chain.url)


def test_batch_is_answered_in_its_order_without_its_notifications(chain: LiveChain) -> None:
    notification = {"jsonrpc": "2.0", "method": "eth_chainId"}
    batch = [request("eth_chainId", id_="a"), notification, request("nothing", id_=None), request("net_version", id_=7)]
    answers = post(chain, json.dumps(batch).encode())
    assert [answer["id"] for answer in answers] == ["a", None, 7]
    assert answers[0]["result"] == "0x7a69"
    assert answers[1]["error"]["code"] == -32601
    assert answers[2]["result"] == "31337"
    assert post(chain, json.dumps([notification]).encode()) is None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", -32700),
        (b"[" * 100_000, -32700),
        (b"\xff", -32700),
        (b"[]", -32600),
        (b"7", -32600),
        (b"[7]", -32600),
        (b'{"id":1}', -32600),
        (json.dumps([request("eth_chainId")] * 1001).encode(), -32600),
    ],
)
def test_what_is_no_request_is_an_error(body: bytes, code: int, chain: LiveChain) -> None:
    answer = post(chain, body)
    assert (answer[0] if isinstance(answer, list) else answer)["error"]["code"] == code


@pytest.mark.parametrize("method", ["hardhat_metadata", "anvil_nodeInfo", "eth_fillTransaction", "debug_traceCall"])
def test_probes_for_other_programs_find_no_method(method: str, chain: LiveChain) -> None:
    assert chain.refused(method)["code"] == -32601


@pytest.mark.parametrize(
    ("method", "params", "code", "message"),
    [
        ("eth_getBalance", ["0x12"], -32602, "address: 20 bytes expected, got 1"),
        ("eth_getBalance", [7], -32602, "address: hex with 0x"),
        ("eth_getBalance", ["0x" + "11" * 20, "0xfffff"], -32001, "block 1048575 does not exist"),
        ("eth_getBalance", ["0x" + "11" * 20, "newest"], -32602, "block: a number in hex"),
        ("eth_getBlockByHash", ["0x11"], -32602, "hash: 32 bytes expected"),
        ("eth_call", ["0x"], -32602, "call: an object expected"),
        ("eth_call", [{"to": "0x" + "11" * 20}, "latest", {"0x": {}}], -32602, "state overrides are not supported"),
        ("eth_getLogs", [{"topics": ["0x11"]}], -32602, "topics: 32 bytes expected"),
        ("eth_getLogs", [{"fromBlock": "0x3", "toBlock": "0x1"}], -32602, "fromBlock 3 is after toBlock 1"),
        ("eth_sendRawTransaction", ["0x"], -32003, "invalid transaction"),
        ("eth_sendRawTransaction", ["0x03c0"], -32003, "transactions of type 0, 1 and 2 are supported, got type 3"),
        ("eth_sendTransaction", [{"from": "0x" + "11" * 20, "gas": "0x5208"}], -32003, "No Signer available"),
        ("evm_setNextBlockTimestamp", [5], -32602, "timestamp: a time after"),
        ("evm_setNextBlockTimestamp", ["0x" + "f" * 64], -32602, "timestamp: a number of 0 to"),
        ("evm_increaseTime", [2**53], -32602, "seconds: a number of 0 to"),
        ("evm_increaseTime", [-1], -32602, "seconds: a number of 0 to"),
        ("anvil_setBalance", ["0x" + "11" * 20, "0x" + "f" * 64], -32602, "balance: a number of 0 to"),
        ("anvil_mine", ["0xffffff"], -32602, "blocks: at most 10000 expected"),
        ("eth_getFilterChanges", ["0x99"], -32001, "filter not found"),
    ],
)
def test_wrong_parameters_are_refused_with_what_was_expected(
    method: str, params: list[Any], code: int, message: str, chain: LiveChain
) -> None:
    error = chain.refused(method, *params)
    assert error["code"] == code
    assert message in error["message"]


def test_revert_has_code_three_and_the_data(chain: LiveChain) -> None:
    call = {"to": chain.kms.address, "data": chain.kms.encode_abi("registerApp", ["0x" + "00" * 20])}
    for method in ("eth_call", "eth_estimateGas"):
        error = chain.refused(method, call)
        assert (error["code"], error["message"]) == (3, "execution reverted: Invalid app ID")
        assert error["data"].startswith("0x08c379a0")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nonce": 0}, "nonce too low"),
        ({"nonce": 99}, "nonce too high"),
        ({"chainId": 1}, "chain id 31337 expected, got 1"),
        ({"gas": 30_000_001}, "exceeds block gas limit"),
        ({"maxFeePerGas": 10**8, "maxPriorityFeePerGas": 0}, "max fee per gas less than block base fee"),
        ({"value": 10**24}, "insufficient funds"),
        ({"gas": 21_000}, "intrinsic gas|[Ii]nsufficient gas|gas"),
    ],
)
def test_transaction_that_cannot_be_mined_is_refused_and_changes_nothing(
    changed: dict[str, int], message: str, chain: LiveChain
) -> None:
    account = chain.web3.eth.account.from_key(chain.chain.private_keys[0])
    nonce = chain.web3.eth.get_transaction_count(account.address)
    built = chain.kms.functions.addOsImageHash(IMAGE).build_transaction({"from": account.address, "nonce": nonce})
    raw = account.sign_transaction({**built, **changed}).raw_transaction
    before = chain.web3.eth.block_number
    error = chain.refused("eth_sendRawTransaction", raw.to_0x_hex())
    assert re.search(message, error["message"])
    assert (chain.web3.eth.block_number, chain.web3.eth.get_transaction_count(account.address)) == (before, nonce)


@pytest.mark.parametrize("form", ["legacy", "without chain id", "access list", "dynamic fee"])
def test_every_form_of_transaction_is_mined_and_shown(form: str, chain: LiveChain) -> None:
    account = chain.web3.eth.account.from_key(chain.chain.private_keys[1])
    accesses = [{"address": chain.kms.address, "storageKeys": ["0x" + "00" * 32]}]
    priced = {"maxFeePerGas": 3 * 10**9, "maxPriorityFeePerGas": 10**9}
    forms: dict[str, dict[str, Any]] = {
        "legacy": {"gasPrice": 2 * 10**9, "chainId": 31337},
        "without chain id": {"gasPrice": 2 * 10**9},
        "access list": {"gasPrice": 2 * 10**9, "type": 1, "accessList": accesses, "chainId": 31337},
        "dynamic fee": {**priced, "type": 2, "accessList": accesses, "chainId": 31337},
    }
    fields = forms[form]
    signed = account.sign_transaction({"to": chain.accounts[2], "value": 5, "gas": 100_000, "nonce": 0, **fields})
    hash_ = chain.web3.eth.send_raw_transaction(signed.raw_transaction)
    assert hash_ == signed.hash
    shown = chain.web3.eth.get_transaction(hash_)
    assert (shown["from"], shown["to"], shown["value"]) == (account.address, chain.accounts[2], 5)
    assert (int(shown["r"].hex(), 16), int(shown["s"].hex(), 16)) == (signed.r, signed.s)
    assert chain.web3.eth.get_transaction_receipt(hash_)["effectiveGasPrice"] == 2 * 10**9
    assert "already known" in chain.refused("eth_sendRawTransaction", signed.raw_transaction.to_0x_hex())["message"]


def test_blocks_are_hashed_as_others_hash_them(chain: LiveChain) -> None:
    chain.kms.functions.addOsImageHash(IMAGE).transact({"from": chain.owner})
    names = [
        "parentHash",
        "sha3Uncles",
        "miner",
        "stateRoot",
        "transactionsRoot",
        "receiptsRoot",
        "logsBloom",
        "difficulty",
        "number",
        "gasLimit",
        "gasUsed",
        "timestamp",
        "extraData",
        "mixHash",
        "nonce",
        "baseFeePerGas",
        "withdrawalsRoot",
        "blobGasUsed",
        "excessBlobGas",
        "parentBeaconBlockRoot",
        "requestsHash",
    ]
    numbers = {
        "difficulty",
        "number",
        "gasLimit",
        "gasUsed",
        "timestamp",
        "baseFeePerGas",
        "blobGasUsed",
        "excessBlobGas",
    }

    def value(name: str, text: str) -> bytes:
        if name not in numbers:
            return bytes.fromhex(text[2:])
        number = int(text, 16)
        return number.to_bytes((number.bit_length() + 7) // 8, "big")

    block = chain.rpc("eth_getBlockByNumber", "latest", False)
    header = rlp.encode([value(name, block[name]) for name in names])
    assert chain.web3.keccak(header).to_0x_hex() == block["hash"]
    assert chain.rpc("eth_getBlockByHash", block["hash"], True)["transactions"][0]["hash"] == block["transactions"][0]


# ---- logs


def test_logs_are_found_by_address_and_topics(chain: LiveChain) -> None:
    for image in (IMAGE, OTHER):
        chain.kms.functions.addOsImageHash(image).transact({"from": chain.owner})
    policy = chain.web3.keccak(text="PolicyChanged(address,bytes32,bytes32,bool)").to_0x_hex()
    added = chain.web3.keccak(text="OsImageHashAdded(bytes32)").to_0x_hex()
    actor = "0x" + "00" * 12 + chain.owner[2:].lower()

    def found(**wanted: Any) -> list[str]:
        logs = chain.rpc("eth_getLogs", {"fromBlock": "0x4", **wanted})
        return [log["topics"][0] for log in logs]

    assert found(toBlock="latest") == [added, policy] * 2
    assert found(topics=[policy]) == [policy] * 2
    assert found(topics=[[policy, added]]) == [added, policy] * 2
    assert found(topics=[None, actor]) == [policy] * 2
    assert found(topics=[None, None, None, "0x" + IMAGE.hex()]) == [policy]
    assert found(topics=[added, actor]) == []
    assert found(address=chain.kms.address, toBlock="0x4") == [added, policy]
    assert found(address=[chain.owner]) == []
    assert found(fromBlock="0x999") == []


def test_filters_tell_what_is_new_once(chain: LiveChain) -> None:
    logs = chain.kms.events.OsImageHashAdded().create_filter(from_block="latest")
    blocks = chain.web3.eth.filter("latest")
    assert logs.get_new_entries() == []
    chain.kms.functions.addOsImageHash(IMAGE).transact({"from": chain.owner})
    (entry,) = logs.get_new_entries()
    assert entry["args"]["osImageHash"] == IMAGE
    assert logs.get_new_entries() == []
    (block,) = blocks.get_new_entries()
    assert block == chain.web3.eth.get_block("latest")["hash"]  # type: ignore[comparison-overlap]
    assert len(logs.get_all_entries()) == 1
    assert chain.web3.eth.uninstall_filter(logs.filter_id)


async def test_subscribers_are_sent_blocks_and_logs_over_a_websocket(chain: LiveChain) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(chain.url) as socket:

        async def ask(method: str, *params: Any) -> Any:
            await socket.send_json(request(method, *params))
            return (await socket.receive_json(timeout=20))["result"]

        heads = await ask("eth_subscribe", "newHeads")
        logs = await ask("eth_subscribe", "logs", {"address": chain.kms.address})
        call = {"from": chain.owner, "to": chain.kms.address}
        call["data"] = chain.kms.encode_abi("addOsImageHash", [IMAGE])
        await socket.send_json(request("eth_sendTransaction", call))
        messages = [await socket.receive_json(timeout=20) for _ in range(4)]
        (sent,) = (message["result"] for message in messages if "result" in message)
        told = [message["params"] for message in messages if "params" in message]
        assert [each["subscription"] for each in told] == [heads, logs, logs]
        assert {each["result"].get("transactionHash", sent) for each in told} == {sent}
        assert await ask("eth_unsubscribe", heads) is True
        assert await ask("eth_unsubscribe", heads) is False
        await socket.send_json(request("eth_subscribe", "newPendingTransactions"))
        assert (await socket.receive_json(timeout=20))["error"]["code"] == -32602


# ---- methods for tests


def test_time_is_set_and_goes_on_from_there(chain: LiveChain) -> None:
    def mined() -> int:
        chain.rpc("evm_mine")
        return chain.web3.eth.get_block("latest")["timestamp"]

    latest = chain.web3.eth.get_block("latest")["timestamp"]
    assert mined() == latest + 1
    chain.rpc("evm_increaseTime", 1000)
    assert mined() == BEGAN + 1000
    chain.rpc("evm_setNextBlockTimestamp", hex(BEGAN + 5000))
    assert mined() == BEGAN + 5000
    assert mined() == BEGAN + 5001
    chain.rpc("anvil_mine", "0x3", "0xa")
    assert chain.web3.eth.get_block("latest")["timestamp"] == BEGAN + 5022


def test_impersonated_account_needs_no_key(chain: LiveChain) -> None:
    nobody = chain.web3.to_checksum_address("0x" + "77" * 20)
    chain.rpc("anvil_setBalance", nobody, hex(10**18))
    assert chain.web3.eth.get_balance(nobody) == 10**18
    chain.rpc("anvil_impersonateAccount", nobody)
    sent = chain.kms.functions.registerApp(nobody).transact({"from": nobody})
    assert chain.web3.eth.get_transaction(sent)["from"] == nobody
    chain.rpc("anvil_stopImpersonatingAccount", nobody)
    assert "No Signer" in chain.refused("eth_sendTransaction", {"from": nobody, "to": nobody})["message"]


def test_contract_itself_can_be_impersonated(chain: LiveChain) -> None:
    chain.rpc("hardhat_setBalance", chain.kms.address, hex(10**18))
    chain.rpc("hardhat_impersonateAccount", chain.kms.address)
    assert chain.kms.functions.registerApp(chain.owner).transact({"from": chain.kms.address})


def test_state_of_a_past_block_is_as_it_was(chain: LiveChain) -> None:
    nonce = chain.web3.eth.get_transaction_count(chain.owner)
    before = chain.web3.eth.block_number
    chain.kms.functions.setAppImplementation(chain.accounts[3]).transact({"from": chain.owner})
    assert chain.web3.eth.get_transaction_count(chain.owner, before) == nonce
    assert chain.web3.eth.get_transaction_count(chain.owner) == nonce + 1
    slot = [chain.web3.eth.get_storage_at(chain.kms.address, 9, block) for block in (before, "latest")]
    assert slot[0] != slot[1]
    assert slot[1][-20:] == bytes.fromhex(chain.accounts[3][2:])


# ---- the command


async def test_kept_chain_goes_on_after_its_process_was_killed(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        command = start("chain", "--listen", "127.0.0.1:0", "--state", str(tmp_path), "--json", stderr=log)
    try:
        line = json.loads(command.stdout.readline())
        node = connect(line["url"])
        kms = node.eth.contract(line["contracts"]["kms"], abi=kms_contract("next").abi)
        kms.functions.addOsImageHash(IMAGE).transact({"from": line["accounts"][0]["address"]})
        send(node, "evm_increaseTime", 1000)
        latest = node.eth.get_block("latest")
    finally:
        command.end(signal.SIGKILL)
    assert (tmp_path / "log").read_text() == ""

    path = tmp_path / "chain.jsonl"
    with path.open("ab") as file:
        file.write(b'{"timestamp": 1')  # what a killed process had begun to write
    settings = ChainSettings(Seed.of(DEFAULT_SEED).derive, lambda: BEGAN, BEGAN, "next", state=path)
    chain = EmbeddedChain(settings)
    await chain.deploy()
    assert (chain.ledger.head.number, chain.ledger.ahead) == (latest["number"], 1000)
    assert chain.ledger.head.hash == latest["hash"]
    assert checksummed(chain.kms.address) == line["contracts"]["kms"]
    assert await chain.kms.view("allowedOsImages(bytes32)", "(bool)", IMAGE)
    chain.close()


async def test_deployment_that_a_killed_process_did_not_finish_is_finished(tmp_path: Path) -> None:
    def opened() -> EmbeddedChain:
        return EmbeddedChain(
            ChainSettings(Seed.of("half").derive, lambda: BEGAN, BEGAN, "next", state=tmp_path / "chain.jsonl")
        )

    whole = opened()
    await whole.deploy()
    whole.close()
    lines = (tmp_path / "chain.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "chain.jsonl").write_bytes(b"".join(lines[:-1]))
    half = opened()
    assert half.ledger.head.number == 2
    await half.deploy()
    assert half.ledger.head.hash == whole.ledger.head.hash
    assert await half.kms.owner() == half.owner.address
    half.close()


def test_state_of_another_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chain.jsonl").write_text(
        '{"began": 1767225600, "chain_id": 31337, "revision": "next", "seed": "00", "version": 1}\n'
    )
    assert "is of another chain" in usage_error("chain", "--listen", "127.0.0.1:0", "--state", str(tmp_path))


def test_command_without_the_extra_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "eth.py").write_text("raise ModuleNotFoundError('No module named eth', name='eth')\n")
    command = [sys.executable, "-m", "dstack_emu", "chain", "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: a chain needs py-evm, which the extra `eth` installs: pip install 'dstack-emu[eth] @ "
        "git+https://github.com/OWNER/dstack-emu' (eth is missing)\n"
    )


def test_state_folder_belongs_to_one_process(tmp_path: Path) -> None:
    with (tmp_path / "chain.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = usage_error("chain", "--listen", "127.0.0.1:0", "--state", str(tmp_path))
    assert "is in use by another process" in refused


@pytest.mark.parametrize("line", ["{}", "7", '{"timestamp":1,"raw":"00"}', '{"balance":1,"address":"zz"}', "{"])
def test_line_of_a_kept_chain_that_is_no_act_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "chain.jsonl"
    kept = Kept(path, {"chain_id": 1})
    kept.add(Balance(bytes(20), 5))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreError, match="line 3: an act expected"):
        list(kept.acts())
    kept.close()


def test_act_that_cannot_be_written_is_refused_and_leaves_no_part(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "chain.jsonl", {"chain_id": 1})
    size = kept.size()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        with pytest.raises(StoreError, match="only 10 of"):
            kept.add(Balance(bytes(20), 5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    kept.add(Balance(bytes(20), 6))
    assert list(kept.acts()) == [Balance(bytes(20), 6)]
    kept.close()


@pytest.mark.parametrize("header", [b"Upgrade: \xff", b"Sec-WebSocket-Key: \xff"])
def test_header_of_a_websocket_that_is_not_ascii_is_refused(chain: LiveChain, header: bytes) -> None:
    lines = [b"GET / HTTP/1.1", b"Host: localhost", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"]
    if not header.startswith(b"Upgrade"):
        lines.append(b"Upgrade: websocket")
    url = urlsplit(chain.url)
    with socket.create_connection((str(url.hostname), int(url.port or 0)), 10) as sock:
        sock.sendall(b"\r\n".join([*lines, header, b"", b""]))
        assert sock.recv(65536).startswith(b"HTTP/1.1 405 ")


def test_contract_reads_the_hashes_of_earlier_blocks(chain: LiveChain) -> None:
    chain.rpc("anvil_mine", "0x104")
    head = chain.web3.eth.block_number

    def blockhash(number: int) -> Any:
        """Run PUSH2 number BLOCKHASH, and return its result, as code that is created."""
        code = f"0x61{number:04x}405f5260205ff3"
        return chain.rpc("eth_call", {"data": code}, hex(head))

    for number in (head - 1, head - 256):
        assert blockhash(number) == chain.web3.eth.get_block(number)["hash"].to_0x_hex()
    for number in (head, head - 257):
        assert blockhash(number) == "0x" + "00" * 32
