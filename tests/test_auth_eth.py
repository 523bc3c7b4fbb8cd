"""auth-eth-bun: what it answers, over real sockets, for each thing that a chain can answer.

The first part restates the facts of upstream's own tests (`kms/auth-eth-bun/index.test.ts` at 40eaf35e and 312dc605).
"""

import asyncio
import gzip
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.auth.eth import EthAuth, KeptHead
from dstack_emu.auth.eth_server import eth_app
from dstack_emu.auth.eth_settings import EthSettings, unread_variables
from dstack_emu.auth.json_rpc import MAX_RPC_ANSWER
from tests.json_rpc_server import (
    CONTRACT,
    Chain,
    Fault,
    HttpReply,
    RpcError,
    abi_decision,
    abi_text,
    running_chain,
    word,
)
from tests.ports import refusing_port

Client = TestClient[web.Request, web.Application]

BOOT_INFO: dict[str, Any] = {
    "mrAggregated": "0x" + "11" * 32,
    "osImageHash": "0x" + "22" * 32,
    "appId": "0x" + "33" * 20,
    "composeHash": "0x" + "44" * 32,
    "instanceId": "0x" + "55" * 20,
    "deviceId": "0x" + "66" * 32,
}
ASKED = ReceivedBootInfo("00", "00", "00", "00", "00", "00")
UNAVAILABLE = "authorization backend unavailable"
INVALID = {"isAllowed": False, "reason": "invalid authorization request", "gatewayAppId": ""}
REVISIONS: tuple[AuthEthRevision, ...] = ("0.5.11", "next")


def denied(reason: str = UNAVAILABLE, gateway: str = "") -> dict[str, Any]:
    return {"isAllowed": False, "reason": reason, "gatewayAppId": gateway}


def allowed(reason: str = "") -> dict[str, Any]:
    return {"isAllowed": True, "reason": reason, "gatewayAppId": "0xgateway"}


@pytest.fixture(scope="module")
def server() -> Iterator[Chain]:
    with running_chain() as chain:
        yield chain


@pytest.fixture
def chain(server: Chain) -> Chain:
    """A chain that answers as it should, on one server for all tests."""
    vars(server).update(vars(Chain(url=server.url)))
    return server


@asynccontextmanager
async def webhook(chain: Chain, revision: AuthEthRevision = "next", **changed: Any) -> AsyncIterator[Client]:
    given = {"rpc_url": chain.url, "kms_contract": CONTRACT, "revision": revision, **changed}
    async with TestClient(TestServer(eth_app(EthSettings(**given)))) as client:
        yield client


@asynccontextmanager
async def deciding(settings: EthSettings, **more: Any) -> AsyncIterator[EthAuth]:
    """The service without its HTTP server."""
    service = EthAuth(settings, **more)
    try:
        yield service
    finally:
        await service.close()


async def ask(client: Client, caller: str = "app", **changed: Any) -> Any:
    async with client.post(f"/bootAuth/{caller}", json={**BOOT_INFO, **changed}) as response:
        assert response.status == 200
        return await response.json()


async def status_and_json(client: Client, document: object, caller: str = "app") -> tuple[int, Any]:
    async with client.post(f"/bootAuth/{caller}", json=document) as response:
        return response.status, await response.json()


async def health(client: Client) -> tuple[int, Any]:
    async with client.get("/") as response:
        return response.status, await response.json()


def failing(*names: str, error: Exception | None = None) -> Fault:
    def fault(name: str, _request: dict[str, Any]) -> Any:
        if not names or name in names:
            raise error or RpcError("contract call failed")

    return fault


# ---- upstream's tests: GET /


@pytest.mark.parametrize("revision", REVISIONS)
async def test_info_has_the_members_that_the_contract_and_the_chain_know(
    chain: Chain, revision: AuthEthRevision
) -> None:
    chain.gateway = "0xabcdefabcdefabcdefabcdefabcdefabcdefabcd"
    implementation = "0x9876543210987654321098765432109876543210"
    async with webhook(chain, revision) as client:
        assert await health(client) == (
            200,
            {
                "status": "ok",
                "kmsContractAddr": CONTRACT,
                "ethRpcUrl": chain.url,
                "gatewayAppId": chain.gateway,
                "chainId": 1337,
                "appAuthImplementation": implementation,
                "appImplementation": implementation,
            },
        )
    assert set(chain.calls) == {("gatewayAppId", "latest"), ("eth_chainId", None), ("appImplementation", "latest")}


@pytest.mark.parametrize(("revision", "message"), [("next", UNAVAILABLE), ("0.5.11", "network error")])
async def test_info_of_a_chain_that_fails_is_a_500(chain: Chain, revision: AuthEthRevision, message: str) -> None:
    chain.fault = failing(error=RpcError("network error"))
    async with webhook(chain, revision) as client:
        assert await health(client) == (500, {"status": "error", "message": message})


# ---- upstream's tests: POST /bootAuth


FULL = {"tcbStatus": "OK", "advisoryIds": ["INTEL-SA-00123"], "mrSystem": "0x" + "55" * 32}


@pytest.mark.parametrize("revision", REVISIONS)
@pytest.mark.parametrize("caller", ["app", "kms"])
@pytest.mark.parametrize("more", [{}, FULL], ids=["required", "full"])
@pytest.mark.parametrize("decision", [(True, "success"), (False, "KMS not authorized"), (True, "")])
async def test_the_answer_is_the_contracts(
    chain: Chain, revision: AuthEthRevision, caller: str, more: dict[str, Any], decision: tuple[bool, str]
) -> None:
    chain.decision = decision
    async with webhook(chain, revision) as client:
        expected = {"isAllowed": decision[0], "reason": decision[1], "gatewayAppId": "0xgateway"}
        assert await ask(client, caller, **more) == expected
    name, block = {"app": "isAppAllowed", "kms": "isKmsAllowed"}[caller], "0x64" if revision == "next" else "latest"
    first = [("eth_chainId", None), ("eth_blockNumber", None)] if revision == "next" else []
    assert chain.calls == [*first, (name, block), ("gatewayAppId", block)]
    assert chain.requests[-1]["params"][0]["to"] == CONTRACT


@pytest.mark.parametrize(("revision", "reason"), [("next", UNAVAILABLE), ("0.5.11", "contract call failed")])
@pytest.mark.parametrize("caller", ["app", "kms"])
async def test_a_contract_that_fails_denies(
    chain: Chain, revision: AuthEthRevision, reason: str, caller: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    chain.fault = failing()
    async with webhook(chain, revision) as client:
        assert await ask(client, caller) == denied(reason)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    if revision == "next":  # which keeps what the chain said to itself, in the log as well
        assert lines == [f"{'KMS' if caller == 'kms' else 'application'} authorization backend failed"]
        assert "contract call failed" not in caplog.text
    else:
        assert lines == [f"error in {'KMS' if caller == 'kms' else 'app'} boot auth: contract call failed"]


@pytest.mark.parametrize("revision", REVISIONS)
async def test_the_failure_of_upstreams_own_tests_is_not_logged_for_a_kms(
    chain: Chain, revision: AuthEthRevision, caplog: pytest.LogCaptureFixture
) -> None:
    chain.fault = failing(error=RpcError("Test backend error"))
    async with webhook(chain, revision) as client:
        assert (await ask(client, "kms"))["reason"] == {"next": UNAVAILABLE}.get(revision, "Test backend error")
    assert [record for record in caplog.records if record.levelno == logging.ERROR] == []


@pytest.mark.parametrize("caller", ["app", "kms"])
async def test_a_body_without_required_members_is_a_400_and_asks_no_chain(chain: Chain, caller: str) -> None:
    async with webhook(chain) as client:
        assert await status_and_json(client, {"mrAggregated": "0x1234"}, caller) == (400, INVALID)
        assert await status_and_json(client, [], caller) == (400, INVALID)
    async with webhook(chain, "0.5.11") as client:
        status, answer = await status_and_json(client, {"mrAggregated": "0x1234"}, caller)
        assert (status, answer["error"]["name"], len(answer["error"]["issues"])) == (400, "ZodError", 5)
    assert chain.calls == []


@pytest.mark.parametrize("revision", REVISIONS)
async def test_hex_without_0x_gives_the_same_question(chain: Chain, revision: AuthEthRevision) -> None:
    async with webhook(chain, revision) as client:
        assert await ask(client) == allowed()
        assert await ask(client, **{name: value[2:] for name, value in BOOT_INFO.items()}) == allowed()
        questions = [each["params"] for each in chain.requests if chain.name_of(each) == "isAppAllowed"]
        assert questions[0] == questions[1]


async def test_each_changed_member_gives_another_question(chain: Chain) -> None:
    members = [*BOOT_INFO, "mrSystem"]
    async with webhook(chain) as client:
        await ask(client)
        for name in members:
            await ask(client, **{name: "0x77"})
        await ask(client, tcbStatus="UpToDate")
        await ask(client, advisoryIds=["INTEL-SA-00001"])
    questions = {each["params"][0]["data"] for each in chain.requests if chain.name_of(each) == "isAppAllowed"}
    assert len(questions) == len(members) + 3


@pytest.mark.parametrize("revision", REVISIONS)
async def test_an_equal_request_is_decided_anew(chain: Chain, revision: AuthEthRevision) -> None:
    async with webhook(chain, revision) as client:
        assert await ask(client) == allowed()
        chain.decision = False, "policy changed"
        assert await ask(client) == denied("policy changed", "0xgateway")
        chain.fault = failing("isAppAllowed")
        assert not (await ask(client))["isAllowed"]
        chain.fault, chain.decision = failing("nothing"), (True, "recovered")
        assert await ask(client) == allowed("recovered")


async def test_decision_and_gateway_come_from_the_block_with_enough_after_it(chain: Chain) -> None:
    async with webhook(chain, chain_id=1337, confirmations=2) as client:
        assert await ask(client) == allowed()
        assert chain.calls[1:] == [("eth_blockNumber", None), ("isAppAllowed", "0x62"), ("gatewayAppId", "0x62")]
        chain.head, chain.decision = 101, (False, "new canonical deny")
        assert await ask(client) == denied("new canonical deny", "0xgateway")
        assert chain.calls[-1] == ("gatewayAppId", "0x63")
        chain.head = 2  # the first block has two after it
        chain.decision = True, ""
        assert await ask(client) == allowed()
        assert chain.calls[-1] == ("gatewayAppId", "0x0")


@pytest.mark.parametrize(
    "changed", [{"chain_id": 1}, {"head": 1}, {"fault": failing("eth_blockNumber", error=RpcError("timeout"))}]
)
async def test_another_chain_too_few_blocks_or_no_number_deny_until_it_is_right(
    chain: Chain, changed: dict[str, Any]
) -> None:
    right = {name: getattr(chain, name) for name in changed}
    async with webhook(chain, chain_id=1337, confirmations=2) as client:
        vars(chain).update(changed)
        assert await ask(client) == await ask(client, "kms") == denied()
        assert not {name for name, _ in chain.calls} & {"isAppAllowed", "isKmsAllowed"}
        vars(chain).update(right)
        assert await ask(client) == allowed()


async def test_0_5_11_looks_at_neither_chain_id_nor_confirmations(chain: Chain) -> None:
    chain.head = 0
    async with webhook(chain, "0.5.11", chain_id=1, confirmations=2) as client:
        assert await ask(client) == allowed()


# ---- requests


@pytest.mark.parametrize(
    "changed",
    [
        *({name: value + "00"} for name, value in BOOT_INFO.items()),
        *({name: "no hex"} for name in BOOT_INFO),
        {"mrAggregated": "0x0x11"},
        {"mrAggregated": "0X11"},
        {"mrAggregated": " 11"},
        {"mrAggregated": "11\n"},
        {"mrAggregated": "\u0661"},
        {"mrSystem": "0x" + "11" * 33},
        {"mrSystem": None},
        {"tcbStatus": "x" * 129},
        {"tcbStatus": "\U0001f600" * 65},  # 130 units of UTF-16, as JavaScript counts
        {"tcbStatus": 1},
        {"advisoryIds": ["x"] * 129},
        {"advisoryIds": ["x" * 257]},
        {"advisoryIds": "x"},
        {"appId": None},
    ],
    ids=repr,
)
async def test_next_refuses_what_does_not_fit_and_asks_no_chain(chain: Chain, changed: dict[str, Any]) -> None:
    async with webhook(chain) as client:
        assert await status_and_json(client, {**BOOT_INFO, **changed}) == (400, INVALID)
    assert chain.calls == []


@pytest.mark.parametrize(
    "changed",
    [
        {"mrAggregated": "", "deviceId": "0x", "appId": "0xa"},
        {"tcbStatus": "\U0001f600" * 64},
        {"advisoryIds": ["x" * 256] * 128},
        {"teeVariant": "dstack-tdx", "launchTicketHash": None, "other": {}},
    ],
)
async def test_what_is_short_or_at_the_limit_passes(chain: Chain, changed: dict[str, Any]) -> None:
    for revision in REVISIONS:
        async with webhook(chain, revision) as client:
            assert await ask(client, **changed) == allowed()


async def test_short_hex_is_padded_on_the_left(chain: Chain) -> None:
    async with webhook(chain) as client:
        await ask(client, appId="0xa", deviceId="bcd", instanceId="", mrSystem="0x")
    words = chain.requests[2]["params"][0]["data"][10:]
    at = {number: words[64 * number : 64 * number + 64] for number in range(1, 8)}
    assert (at[1], at[3], at[4], at[6]) == (word(0xA), word(0), word(0xBCD), word(0))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mrAggregated": "0x" + "11" * 33}, "mrAggregated: 32 bytes at most expected, got 66 digits"),
        ({"composeHash": "no hex"}, "composeHash: hex expected, got '"),
        ({"mrAggregated": "0xx" + "ab" * 31}, "mrAggregated: hex expected, got '0xx"),  # padded: 0x again
        ({"appId": "0x" + "11" * 21}, "appId: an address expected, 0x and 40 hex digits, got '"),
        ({"instanceId": "xyz"}, "instanceId: an address expected, 0x and 40 hex digits, got '"),
        ({"appId": "0x" + "aB" * 20}, "appId: the address 0x"),
    ],
)
async def test_0_5_11_denies_what_the_contract_cannot_be_given(
    chain: Chain, changed: dict[str, Any], reason: str
) -> None:
    async with webhook(chain, "0.5.11") as client:
        answer = await ask(client, **changed)
        assert (answer["isAllowed"], answer["gatewayAppId"]) == (False, "")
        assert answer["reason"].startswith(reason)
    assert chain.calls == []


async def test_an_address_of_mixed_case_needs_its_checksum(chain: Chain) -> None:
    right = "5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
    async with webhook(chain) as client:
        assert await ask(client, appId=right) == allowed()
        assert await ask(client, appId=right.lower()) == allowed()
        assert await ask(client, appId=right.replace("A", "a", 1)) == denied()


@pytest.mark.parametrize("revision", REVISIONS)
async def test_malformed_json_and_large_bodies_are_refused_as_hono_does(
    chain: Chain, revision: AuthEthRevision
) -> None:
    async with webhook(chain, revision) as client:
        for body, status, text in (
            (b"{", 400, "Malformed JSON in request body"),
            (b" " * (1 << 20) + b" ", 413, "Request body is larger than 1048576 bytes"),
            (b'{"a": [' + b"1," * 2000 + b"1]}", 413, "Request body: at most 1024 JSON values expected, got more"),
        ):
            headers = {"Content-Type": "application/json"}
            async with client.post("/bootAuth/app", data=body, headers=headers) as response:
                assert (response.status, await response.text()) == (status, text)
        async with client.post("/bootAuth/app", data=json.dumps(BOOT_INFO).encode()) as response:
            assert response.status == 400
        for path, status in (("/bootAuth/app", 404), ("/x", 404), ("/health", 200), ("/openapi.json", 200)):
            async with client.get(path) as response:
                assert response.status == status
    assert chain.calls == []


# ---- chains


ALLOWING = abi_decision(True, "")


def result_of(value: Any, *names: str) -> Fault:
    def fault(name: str, _request: dict[str, Any]) -> Any:
        return value if name in (names or ("isAppAllowed", "isKmsAllowed")) else None

    return fault


def whole(body: bytes | Callable[[dict[str, Any]], Any], **reply: Any) -> Fault:
    """Answer a question of the contract with this body, or the JSON that is made of the request."""

    def fault(name: str, request: dict[str, Any]) -> Any:
        if name not in ("isAppAllowed", "isKmsAllowed"):
            return None
        return HttpReply(body if isinstance(body, bytes) else json.dumps(body(request)).encode(), **reply)

    return fault


def enveloped(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    def answer(request: dict[str, Any]) -> Any:
        document = {"jsonrpc": "2.0", "id": request["id"], "result": ALLOWING, **changed}
        return {name: value for name, value in document.items() if value is not ...}

    return answer


BOMB = gzip.compress(b" " * (1 << 24))
NONSENSE: dict[str, tuple[Fault, str]] = {
    "another id": (whole(enveloped(id=0)), "an answer to request "),
    "an id as text": (whole(lambda r: enveloped(id=str(r["id"]))(r)), "an answer to request "),
    "an id as fraction": (whole(lambda r: enveloped(id=float(r["id"]))(r)), "an answer to request "),
    "no id": (whole(enveloped(id=...)), "an answer to request "),
    "an id that is null": (whole(enveloped(id=None)), "an answer to request "),
    "an id that is true": (whole(enveloped(id=True)), "an answer to request "),
    "another protocol": (whole(enveloped(jsonrpc="1.0")), '"jsonrpc": "2.0" expected, got "1.0"'),
    "no protocol": (whole(enveloped(jsonrpc=...)), '"jsonrpc": "2.0" expected'),
    "no result": (whole(enveloped(result=...)), "neither result nor error"),
    "result and error": (whole(enveloped(error={"code": 1, "message": "but"})), "but"),
    "an error without message": (whole(enveloped(error={})), "an error with a message expected"),
    "an error that is text": (whole(enveloped(error="no")), "an error with a message expected"),
    "an error that is false": (whole(enveloped(error=False)), "an error with a message expected"),
    "a result that is null": (whole(enveloped(result=None)), "data expected"),
    "a result that is true": (whole(enveloped(result=True)), "data expected"),
    "a result that is an object": (whole(enveloped(result={"isAllowed": True})), "data expected"),
    "no 0x": (whole(enveloped(result=ALLOWING[2:])), "data expected"),
    "half a byte": (whole(enveloped(result=ALLOWING + "0")), "data expected"),
    "no hex": (whole(enveloped(result="0x" + "zz" * 96)), "data expected"),
    "a line break after it": (whole(enveloped(result=ALLOWING + "\n")), "data expected"),
    "no contract": (result_of("0x"), "is there a contract at KMS_CONTRACT_ADDR"),
    "a truncated answer": (result_of(ALLOWING[:-64]), "cannot be decoded"),
    "a bool that is 2": (result_of("0x" + word(2) + ALLOWING[66:]), "a bool expected"),
    "a bool alone": (result_of("0x" + word(1)), "two words expected"),
    "more after it": (result_of(ALLOWING + word(0)), "cannot be decoded"),
    "a revert's data": (result_of("0x08c379a0" + abi_text("no")), "cannot be decoded"),
    "an array": (whole(lambda r: [enveloped()(r)]), "one JSON object expected"),
    "a text": (whole(b'"0x01"'), "one JSON object expected"),
    "nothing": (whole(b""), "not JSON"),
    "HTML": (whole(b"<html>200 OK</html>", headers={"Content-Type": "text/html"}), "not JSON"),
    "NaN": (whole(b'{"jsonrpc":"2.0","id":NaN}'), "not JSON"),
    "no UTF-8": (whole(b'"\xff"'), "not JSON"),
    "a member twice": (whole(b'{"jsonrpc":"2.0","result":"0x","result":"0x01"}'), "duplicate field"),
    "deep nesting": (whole(b"[" * 1000), "not JSON"),
    "many values": (whole(b"[" + b"1," * 2000 + b"1]"), "at most 1024 JSON values"),
    "a huge text": (result_of(abi_decision(True, "x" * MAX_RPC_ANSWER)), "longer than"),
    "a large reason of which a KMS wants none": (result_of("0x" + word(1) + word(64) + word(1 << 255)), "decoded"),
    "a compressed flood": (whole(BOMB, headers={"Content-Encoding": "gzip"}), "longer than"),
    "no compression that was promised": (whole(b"{}", headers={"Content-Encoding": "gzip"}), "not HTTP"),
    "half of its length": (whole(b"{}", length=1000), "connection closed within the answer"),
    "too many requests": (whole(enveloped(), status=429, headers={"Retry-After": "1"}), "429 Too Many Requests"),
    "an error of the server": (whole(enveloped(), status=500), "500 Internal Server Error"),
    "a gateway without a node": (whole(b"<html>", status=502), "502 Bad Gateway"),
    "a login": (whole(enveloped(), status=401), "401 Unauthorized"),
    "a status that is not modified": (whole(enveloped(), status=304), "304 Not Modified"),
    "pruned": (failing("isAppAllowed", "isKmsAllowed", error=RpcError("missing trie node")), "missing trie node"),
    "reverted": (
        failing("isAppAllowed", "isKmsAllowed", error=RpcError("execution reverted: no", 3, data="0x08c379a0")),
        "execution reverted: no",
    ),
    "a gateway that fails": (failing("gatewayAppId"), "contract call failed"),
    "a gateway that is no text": (result_of(ALLOWING, "gatewayAppId"), "cannot be decoded"),
    "a gateway that is no UTF-8": (
        result_of("0x" + word(32) + word(1) + "ff".ljust(64, "0"), "gatewayAppId"),
        "text in UTF-8 expected",
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_denies(chain: Chain, name: str) -> None:
    chain.fault, cause = NONSENSE[name]
    settings = EthSettings(chain.url, CONTRACT, "0.5.11")
    async with deciding(settings) as service:
        for is_kms in (False, True):
            decision = await service.decide(ASKED, is_kms)
            assert (decision.is_allowed, decision.gateway_app_id, decision.rule) == (False, "", "chain")
            assert cause in decision.reason
    async with deciding(replace(settings, revision="next")) as service:
        assert (await service.decide(ASKED, False)).reason == UNAVAILABLE


@pytest.mark.parametrize("value", [None, 1337, "1337", "0x", "0x0539", "0xzz", "0x1" + "0" * 16, "-0x1", "0x5 ", True])
@pytest.mark.parametrize("method", ["eth_chainId", "eth_blockNumber"])
async def test_what_is_no_quantity_denies(chain: Chain, method: str, value: Any) -> None:
    def fault(name: str, request: dict[str, Any]) -> Any:
        if name == method:
            return HttpReply(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": value}).encode())
        return None

    chain.fault = fault
    async with webhook(chain) as client:
        assert await ask(client) == denied()
        if method == "eth_chainId":
            assert (await health(client))[0] == 500


async def test_a_redirect_is_not_followed(chain: Chain) -> None:
    with running_chain() as other:
        for status in (301, 302, 307, 308):
            chain.fault = whole(b"", status=status, headers={"Location": other.url})
            async with webhook(chain) as client:
                assert await ask(client) == denied()
        assert other.calls == []


async def test_a_chain_that_is_down_denies_and_is_asked_again(chain: Chain) -> None:
    with refusing_port() as port:
        down = f"http://127.0.0.1:{port}"
        async with webhook(chain, rpc_url=down) as client:
            assert await ask(client) == await ask(client, "kms") == denied()
            assert await health(client) == (500, {"status": "error", "message": UNAVAILABLE})
        async with webhook(chain, "0.5.11", rpc_url=down) as client:
            assert await ask(client) == denied("eth_call: Connection refused")
            assert await health(client) == (500, {"status": "error", "message": "eth_call: Connection refused"})


async def test_a_chain_that_does_not_answer_in_time_denies(chain: Chain) -> None:
    held = threading.Event()
    try:
        chain.fault = whole(enveloped(), held=held)
        async with webhook(chain, "0.5.11", timeout=0.05) as client:
            assert await ask(client) == denied("eth_call: no answer within 0.05 s")
        async with webhook(chain, timeout=0.05) as client:
            assert await ask(client) == denied()
    finally:
        held.set()


async def test_credentials_of_the_url_are_sent_and_never_said(chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = chain.url.replace("://", "://name:word@") + "/v3/key?x=y"
    async with webhook(chain, rpc_url=url) as client:
        assert (await health(client))[1]["ethRpcUrl"] == chain.url
    async with webhook(chain, "0.5.11", rpc_url=url) as client:
        assert (await health(client))[1]["ethRpcUrl"] == chain.url + "/v3/key?x=y"
        chain.fault = whole(b"", status=500)
        assert "word" not in (await ask(client))["reason"]
    assert "word@" not in caplog.text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.builds(lambda tail: bytes.fromhex(word(1)) + tail, st.binary(max_size=160)),
        st.builds(
            lambda place, value: bytes.fromhex(ALLOWING[2:])[:place] + value + bytes.fromhex(ALLOWING[2:])[place + 1 :],
            st.integers(0, 95),
            st.binary(min_size=1, max_size=1),
        ),
        st.just(bytes.fromhex(ALLOWING[2:])),
    )
)
def test_whatever_the_contract_returns_it_is_allowed_only_if_the_bytes_say_true(chain: Chain, data: bytes) -> None:
    chain.fault = result_of(f"0x{data.hex()}")

    async def decide() -> PolicyDecision:
        async with deciding(EthSettings(chain.url, CONTRACT, "0.5.11")) as service:
            return await service.decide(ASKED, False)

    decision = asyncio.run(decide())
    assert not decision.is_allowed or f"0x{data.hex()}" == abi_decision(True, decision.reason)


# ---- the number of the latest block


class Clock:
    """A clock that a test moves, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_with_the_block_cache_a_revoked_app_is_allowed_until_it_ends_and_the_log_says_so(chain: Chain) -> None:
    clock = Clock()
    service = EthAuth(EthSettings(chain.url, CONTRACT, "next"), head=KeptHead(4, clock))

    def by_block(name: str, request: dict[str, Any]) -> Any:
        if name == "isAppAllowed":
            return abi_decision(*((True, "") if request["params"][1] == "0x64" else (False, "revoked")))
        return None

    chain.fault = by_block
    try:
        first = await service.decide(ASKED, False)
        assert (first.is_allowed, first.state) == (True, "block 100 of chain 1337, latest 100, just asked")
        chain.head = 101
        clock.now += 3.9
        stale = await service.decide(ASKED, False)
        assert (stale.is_allowed, stale.state) == (True, "block 100 of chain 1337, latest 100, known for 3.9 s")
        clock.now += 0.1
        fresh = await service.decide(ASKED, False)
        assert (fresh.reason, fresh.state) == ("revoked", "block 101 of chain 1337, latest 101, just asked")
        clock.now -= 60  # a clock that goes back keeps nothing
        chain.head = 102
        assert (await service.decide(ASKED, False)).state.startswith("block 102 ")
    finally:
        await service.close()


async def test_without_the_block_cache_a_revoked_app_is_denied_at_once(chain: Chain) -> None:
    async with webhook(chain) as client:
        assert await ask(client) == allowed()
        chain.head, chain.decision = 101, (False, "revoked")
        assert await ask(client) == denied("revoked", "0xgateway")
        assert [name for name, _ in chain.calls].count("eth_blockNumber") == 2


async def test_the_log_has_answer_rule_and_block(chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dstack_emu.auth.eth")
    chain.decision = False, "Compose hash not allowed"
    seen: list[tuple[bool, PolicyDecision]] = []
    app = eth_app(
        EthSettings(chain.url, CONTRACT, "next"), observer=lambda _, is_kms, decision: seen.append((is_kms, decision))
    )
    async with TestClient(TestServer(app)) as client:
        await ask(client)
    answer = '{"isAllowed":false,"reason":"Compose hash not allowed","gatewayAppId":"0xgateway"}'
    assert caplog.messages == [
        "app boot denied by rule app_compose_hash of the contract",
        f"app boot auth result: {answer} (block 100 of chain 1337, latest 100, just asked)",
    ]
    assert [(is_kms, decision.rule) for is_kms, decision in seen] == [(False, "app_compose_hash")]


async def test_requests_at_once_do_not_mix(chain: Chain) -> None:
    def by_app(name: str, request: dict[str, Any]) -> Any:
        if name == "isAppAllowed":
            return abi_decision(True, request["params"][0]["data"][10 + 64 : 10 + 128][-4:])
        return None

    chain.fault = by_app
    async with webhook(chain) as client:
        answers = await asyncio.gather(*(ask(client, appId=f"{number:04x}") for number in range(16)))
    assert [answer["reason"] for answer in answers] == [f"{number:04x}" for number in range(16)]


# ---- settings


DEFAULTS = EthSettings.from_env({}, default_revision="next")


def test_empty_variables_are_absent_ones() -> None:
    names = ("ETH_RPC_URL", "KMS_CONTRACT_ADDR", "ETH_CHAIN_ID", "ETH_FINALITY_CONFIRMATIONS", "AUTH_ETH_COMPAT")
    assert EthSettings.from_env(dict.fromkeys(names, ""), default_revision="next") == DEFAULTS
    assert DEFAULTS.rpc_url == "http://localhost:8545"
    assert DEFAULTS.kms_contract == "0x" + "0" * 40
    assert (DEFAULTS.chain_id, DEFAULTS.confirmations, DEFAULTS.block_cache) == (None, 0, 0)


def test_variables_are_read() -> None:
    environment = {
        "ETH_RPC_URL": "https://node.example/v3/key",
        "KMS_CONTRACT_ADDR": CONTRACT,
        "ETH_CHAIN_ID": "0",
        "ETH_FINALITY_CONFIRMATIONS": "9007199254740991",
        "AUTH_ETH_BLOCK_CACHE": "4",
    }
    read = EthSettings.from_env(environment, default_revision="next")
    assert read == EthSettings(environment["ETH_RPC_URL"], CONTRACT, "next", 0, 9007199254740991, 4)
    assert read.answered_rpc_url == "https://node.example"
    assert unread_variables(read, environment) == ()
    older = EthSettings.from_env({**environment, "AUTH_ETH_COMPAT": "0.5.11"}, default_revision="next")
    assert older == replace(read, revision="0.5.11", chain_id=None, confirmations=0, block_cache=0)
    assert unread_variables(older, environment) == tuple(environment)[2:]
    assert older.answered_rpc_url == "https://node.example/v3/key"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("HTTP://LocalHost:8545/", "http://localhost:8545"),
        ("http://h:80", "http://h"),
        ("https://u:p@h:443/x", "https://h"),
        ("http://h:443", "http://h:443"),
        ("http://[::1]:8545", "http://[::1]:8545"),
    ],
)
def test_next_shows_scheme_and_host_of_the_url(url: str, shown: str) -> None:
    assert EthSettings(url, revision="next").answered_rpc_url == shown


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("ETH_CHAIN_ID", "-1", "ETH_CHAIN_ID must be a non-negative integer"),
        ("ETH_CHAIN_ID", "01", "ETH_CHAIN_ID must be a non-negative integer"),
        ("ETH_CHAIN_ID", "0x1", "ETH_CHAIN_ID must be a non-negative integer"),
        ("ETH_CHAIN_ID", " 1", "ETH_CHAIN_ID must be a non-negative integer"),
        ("ETH_CHAIN_ID", "1\n", "ETH_CHAIN_ID must be a non-negative integer"),
        ("ETH_CHAIN_ID", "9007199254740992", "ETH_CHAIN_ID exceeds the safe integer range"),
        ("ETH_FINALITY_CONFIRMATIONS", "1e3", "ETH_FINALITY_CONFIRMATIONS must be a non-negative integer"),
        ("ETH_FINALITY_CONFIRMATIONS", "9" * 5000, "ETH_FINALITY_CONFIRMATIONS exceeds the safe integer range"),
        ("ETH_RPC_URL", "localhost:8545", "ETH_RPC_URL: http\\(s\\)://host:port expected, got 'localhost:8545'"),
        ("ETH_RPC_URL", "ws://u:word@h", "ETH_RPC_URL: http\\(s\\)://host:port expected, got 'ws://h'"),
        ("KMS_CONTRACT_ADDR", "0x1234", "KMS_CONTRACT_ADDR: an address expected, 0x and 40 hex digits, got '0x1234'"),
        ("KMS_CONTRACT_ADDR", "0x" + "aB" * 20, "KMS_CONTRACT_ADDR: the address 0x.* has a wrong checksum"),
        ("AUTH_ETH_COMPAT", "0.5", 'AUTH_ETH_COMPAT is "0.5", expected one of 0.5.11, next'),
        ("AUTH_ETH_BLOCK_CACHE", "-1", 'AUTH_ETH_BLOCK_CACHE is "-1", expected seconds from 0 to 3600'),
        ("AUTH_ETH_BLOCK_CACHE", "inf", "expected seconds from 0 to 3600"),
        ("AUTH_ETH_BLOCK_CACHE", "3601", "expected seconds from 0 to 3600"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(variable: str, value: str, complaint: str) -> None:
    with pytest.raises(AuthConfigError, match=complaint):
        EthSettings.from_env({variable: value}, default_revision="next")
