"""Journal, faults, health and going back, where a stack serves gRPC: the same as by pRPC, or the nearest to it."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import grpc
import pytest
import pytest_asyncio

from dstack_emu.control.api import Control
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.health import check_health
from dstack_emu.observability.fault_rules import KINDS, KINDS_OF_CHAIN
from dstack_emu.observability.record_text import lines
from dstack_emu.stack import Stack
from tests import foreign
from tests.foreign import Guest
from tests.own_stack import own_stack
from tests.reflected import Outcome, Reflected, reflected

pytestmark = pytest.mark.asyncio(loop_scope="module")

T = TypeVar("T")
GET_META = "kms.KMS/GetMeta"
INFO = "dstack_guest.DstackGuest/Info"
ENDED = "reset by peer|Broken pipe"
"""What grpcio says of a connection that ends: the second if it was still writing."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Stack]:
    """One ready stack that serves gRPC, too."""
    async with own_stack(grpc=True) as stack:
        stack.control.set_clock(freeze=True)
        stack.control.snapshot()
        yield stack


@pytest_asyncio.fixture(loop_scope="module")
async def stack(running: Stack) -> AsyncIterator[Stack]:
    """The same, as it was made."""
    yield running
    await running.control.revert()


@pytest.fixture
def control(stack: Stack) -> Control:
    """Its control."""
    return stack.control


async def by_grpc(stack: Stack, name: str, do: Callable[[Reflected], T], identity: Any = None) -> T:
    """Do something as a client of one listener, in a thread of its own: the stack runs in ours."""
    root_ca = stack.kms_ca.read_text() if name.startswith("kms-") else None

    def run() -> T:
        with reflected(stack.grpc[name], root_ca, identity) as client:
            return do(client)

    return await asyncio.to_thread(run)


async def asked(stack: Stack, name: str, method: str, **options: Any) -> Outcome:
    """Ask one RPC, once the server's reflection has answered."""
    return await by_grpc(stack, name, lambda client: client.call(method, **options))


async def over_http(url: str, document: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """POST JSON."""
    async with aiohttp.ClientSession() as session, session.post(url, json=document or {}, ssl=False) as response:
        return response.status, await response.json(content_type=None)


# ---- the journal


def comparable(record: Any) -> Any:
    """A record without its numbers, and without what only one of the two transports has."""
    if isinstance(record, dict):
        return {key: comparable(value) for key, value in record.items() if key not in ("id", "grpc")}
    return [comparable(child) for child in record] if isinstance(record, list) else record


@pytest.mark.parametrize(
    ("method", "arguments", "code"),
    [
        ("GetMeta", {}, "OK"),
        ("GetTempCaCert", {}, "OK"),
        ("GetAppKey", {"api_version": 1}, "UNAUTHENTICATED"),
        ("SignCert", {"api_version": 9}, "INVALID_ARGUMENT"),
    ],
)
async def test_call_by_grpc_leaves_the_record_that_prpc_leaves_and_its_statuss_name(
    stack: Stack, control: Control, method: str, arguments: dict[str, Any], code: str
) -> None:
    before = control.journal.position
    await over_http(f"{stack.services['kms-src']}/prpc/KMS.{method}?json", arguments)
    outcome = await asked(stack, "kms-src-grpc", f"kms.KMS/{method}", **arguments)
    assert outcome.code == code
    one, other = control.journal.records(since=before)
    assert comparable(one) == comparable(other)
    assert "grpc" not in one
    assert other["grpc"] == code
    assert other["status"] == (200 if code == "OK" else 400)
    assert f"kms-src {method}  {code}" in next(lines(other))


async def test_attested_call_is_one_trace_with_decisions_verdict_and_release(stack: Stack, control: Control) -> None:
    def make() -> Any:
        return Guest.of(stack.services["kms-src"], stack.services["app"]).identity()

    identity = await asyncio.to_thread(make)
    before = control.journal.position

    def ask(client: Reflected) -> Outcome:
        return client.call("kms.KMS/GetAppKey", api_version=1)

    answers = await asyncio.gather(*(by_grpc(stack, "kms-src-grpc-mtls", ask, identity) for _ in range(3)))
    assert {answer.code for answer in answers} == {"OK"}
    records = control.journal.records(since=before)
    assert [record["call"] for record in records] == ["GetAppKey"] * 3, "nothing that it asked is a trace of its own"
    for record in records:
        assert record["grpc"] == "OK"
        assert record["released"]["fields"] == ["disk_crypt_key", "env_crypt_key", "k256_key"]
        assert record["released"]["to"]["app_id"] == control.guest("app")["app_id"]
        kinds = [inner.get("call", inner.get("attestation")) for inner in record["inner"]]
        assert kinds == ["holds", "/bootAuth/kms", "/bootAuth/app"]
        assert all(inner.get("caller", "kms-src") == "kms-src" for inner in record["inner"])
    secrets = [answers[0].value[name] for name in ("disk_crypt_key", "env_crypt_key", "k256_key")]
    assert [secret for secret in secrets if secret in json.dumps(records)] == []


async def test_agents_calls_and_methods_that_nobody_serves_are_noted_and_health_is_not(
    stack: Stack, control: Control
) -> None:
    before = control.journal.position
    assert (await asked(stack, "app-grpc", INFO)).code == "OK"
    assert (await asked(stack, "agent-src-grpc", "dstack_guest.Worker/Version")).code == "OK"
    await control.health()

    def unknown(client: Reflected) -> str:
        with pytest.raises(grpc.RpcError) as refusal:
            client.channel.unary_unary("/dstack_guest.DstackGuest/Nothing")(b"", timeout=foreign.TIMEOUT)
        return str(refusal.value.code().name)

    assert await by_grpc(stack, "app-grpc", unknown) == "UNIMPLEMENTED"
    by_grpc_alone = [record for record in control.journal.records(since=before) if record["call"] != "/"]  # webhooks'
    assert [(r["service"], r["call"], r["grpc"], r["outcome"]) for r in by_grpc_alone] == [
        ("app", "Info", "OK", "ok"),
        ("agent-src", "Version", "OK", "ok"),
        ("app", "/dstack_guest.DstackGuest/Nothing", "UNIMPLEMENTED", "refused"),
    ]


async def test_journal_that_is_off_notes_nothing_and_faults_go_on(stack: Stack, control: Control) -> None:
    control.journal.enabled = False
    try:
        before = control.journal.position
        rule = control.add_fault(service="app", call="Info", kind="status", times=1)
        assert (await asked(stack, "app-grpc", INFO)).code == "UNKNOWN"
        assert (await asked(stack, "app-grpc", INFO)).code == "OK"
        assert (rule.met, control.journal.position) == (1, before)
    finally:
        control.journal.enabled = True


# ---- faults


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        ({"kind": "status"}, "UNKNOWN", "made by fault f1"),
        ({"kind": "status", "status": 503, "body": "back soon"}, "UNAVAILABLE", "back soon"),
        ({"kind": "status", "status": 403}, "PERMISSION_DENIED", "made by fault f1"),
        ({"kind": "status", "grpc_status": "RESOURCE_EXHAUSTED"}, "RESOURCE_EXHAUSTED", "made by fault f1"),
        ({"script": ["429", "pass"]}, "UNAVAILABLE", "made by fault f1"),
        ({"kind": "reset"}, "UNAVAILABLE", ENDED),
        ({"kind": "drop"}, "UNAVAILABLE", ENDED),
        ({"kind": "hang"}, "DEADLINE_EXCEEDED", "Deadline Exceeded"),
        ({"kind": "delay", "seconds": 60}, "DEADLINE_EXCEEDED", "Deadline Exceeded"),
        ({"kind": "slow", "seconds": 60}, "DEADLINE_EXCEEDED", "Deadline Exceeded"),
        ({"kind": "truncate"}, "INTERNAL", "deserializing"),
        ({"kind": "malformed"}, "INTERNAL", "deserializing"),
        ({"kind": "delay", "seconds": 0}, "OK", ""),
        ({"kind": "slow", "seconds": 0}, "OK", ""),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
async def test_fault_does_by_grpc_what_is_nearest(
    stack: Stack, control: Control, fault: dict[str, Any], code: str, text: str
) -> None:
    follower = control.journal.follow()
    coming = asyncio.ensure_future(anext(follower))
    await asyncio.sleep(0)
    rule = control.add_fault(service="kms-src", call="GetMeta", caller="outside", **fault)
    late = code == "DEADLINE_EXCEEDED"
    outcome = await asked(stack, "kms-src-grpc", GET_META, timeout=2.0 if late else foreign.TIMEOUT)
    assert (outcome.code, bool(re.search(text, outcome.text))) == (code, True), outcome
    assert rule.met == 1
    kind = fault.get("kind", "status")
    record = await coming  # when the server knows, too, that a client is gone
    assert record["fault"] == {"id": rule.id, "kind": kind}
    unanswered = late or kind in ("reset", "drop")
    assert record["outcome"] == ("unanswered" if unanswered else "refused" if kind == "status" else "ok")
    assert record.get("grpc") == (None if unanswered else code if code != "INTERNAL" else "OK")
    control.lift_fault(rule.id)
    assert (await asked(stack, "kms-src-grpc", GET_META)).code == "OK"


OF_OTHERS = ("decision", "stale", *KINDS_OF_CHAIN)
"""The kinds of faults of webhooks, of the PCCS and of a chain, which have no gRPC."""


async def test_every_kind_of_fault_is_tried_by_grpc() -> None:
    (tried,) = (m for m in test_fault_does_by_grpc_what_is_nearest.pytestmark if m.name == "parametrize")
    assert {fault.get("kind") for fault, *_ in tried.args[1]} | {"wrong-type", *OF_OTHERS} == {*KINDS, None}


async def test_wrong_value_of_a_fault_is_a_message_of_the_rpc(stack: Stack, control: Control) -> None:
    rule = control.add_fault(service="app", call="Info", kind="status", status=200, body={"app_name": "another"})
    assert (await asked(stack, "app-grpc", INFO)).value["app_name"] == "another"
    control.lift_fault(rule.id)
    assert (await asked(stack, "app-grpc", INFO)).value["app_name"] == "app"
    control.add_fault(service="app", call="Info", kind="status", status=200, body={"app_name": 5})
    outcome = await asked(stack, "app-grpc", INFO)
    assert (outcome.code, outcome.text.startswith("body of the fault: ")) == ("INTERNAL", True)


async def test_answer_of_wrong_types_is_a_message_without_its_fields(stack: Stack, control: Control) -> None:
    control.add_fault(service="app", call="Info", kind="wrong-type")
    told = (await asked(stack, "app-grpc", INFO)).value
    assert {value or None for value in told.values()} == {None}


async def test_call_that_hangs_is_reset_once_the_fault_is_lifted(stack: Stack, control: Control) -> None:
    rule = control.add_fault(service="app", call="Info", kind="hang")
    waiting = asyncio.create_task(asked(stack, "app-grpc", INFO))
    while not rule.met:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0)
    control.lift_fault(rule.id)
    outcome = await waiting
    assert (outcome.code, bool(re.search(ENDED, outcome.text))) == ("UNAVAILABLE", True), outcome


async def test_fault_on_a_socket_file_ends_the_call_alone(stack: Stack, control: Control) -> None:
    control.add_fault(service="app", call="Info", kind="reset", times=1)
    path = Path(stack.description()["app"]["grpc_sock"])

    def run() -> list[Outcome]:
        with reflected(f"unix:{path}") as client:
            return [client.call(INFO), client.call(INFO)]

    refused, answered = await asyncio.to_thread(run)
    assert (refused.code, refused.text) == ("UNAVAILABLE", "the connection is reset: fault f1")
    assert answered.code == "OK"


async def test_status_that_is_none_of_grpc_is_refused(control: Control) -> None:
    with pytest.raises(ControlError, match="grpc_status: Input should be 'CANCELLED', 'UNKNOWN'"):
        control.add_fault(kind="status", grpc_status="OK")
    with pytest.raises(ControlError, match="grpc_status: has no meaning for the kind hang"):
        control.add_fault(kind="hang", grpc_status="ABORTED")


# ---- health, and going back


GRPC_NAMES = {"app-grpc", *(f"{part}-{side}-grpc" for part in ("agent", "kms") for side in ("src", "dst"))}
MTLS_NAMES = {f"kms-{side}-grpc-mtls" for side in ("src", "dst")}


async def test_health_names_every_grpc_port_and_what_is_wrong_with_it(stack: Stack, control: Control) -> None:
    health = await control.health()
    assert {name for name in health if "-grpc" in name} == GRPC_NAMES | MTLS_NAMES
    assert {health[name] for name in GRPC_NAMES | MTLS_NAMES} == {"ok"}
    assert await check_health(stack.state) == []
    control.add_fault(service="app", call="/grpc.health.v1.Health/Check", kind="status", grpc_status="UNAVAILABLE")
    problem = f"app-grpc at {stack.grpc['app-grpc']} answered UNAVAILABLE"
    assert (await control.health())["app-grpc"] == problem
    assert await check_health(stack.state) == [problem]


async def test_kms_and_guest_that_are_made_have_grpc_ports_until_they_are_removed(
    stack: Stack, control: Control
) -> None:
    before = dict(stack.grpc)
    await control.add_guest("other")
    await control.add_kms("third", webhook="src")
    assert stack.grpc.keys() - before.keys() == {
        "other-grpc",
        "agent-third-grpc",
        "kms-third-grpc",
        "kms-third-grpc-mtls",
    }
    health = await control.health()
    assert {health[name] for name in ("other-grpc", "kms-third-grpc")} == {"ok"}
    assert "kms-third-grpc-mtls" not in health, "before there are keys nothing is served there"
    await control.remove_kms("third")
    await control.remove_guest("other")
    assert stack.grpc == before


async def test_kms_that_goes_back_to_before_its_keys_keeps_its_grpc_ports() -> None:
    async with own_stack(grpc=True, fresh=True) as stack:
        control, ports = stack.control, dict(stack.grpc)
        assert MTLS_NAMES.isdisjoint(await control.health())
        control.allow("src", "kms-src")
        await control.onboard_kms("src", None)
        assert (await control.health())["kms-src-grpc-mtls"] == "ok"
        assert await check_health(stack.state) == [], "stack.json is from before its keys"
        await control.reset()
        assert stack.grpc == ports
        assert {*(await control.health()).values()} == {"ok"}
        with_plain = await asyncio.to_thread(_fresh_info, stack.grpc["kms-src-grpc"])
        assert with_plain.value["mr_aggregated"] == control.kms("src")["guest"]["mr_aggregated"]


def _fresh_info(target: str) -> Outcome:
    with reflected(target) as client:
        return client.call("kms.Onboard/GetAttestationInfo")


# ---- the verifier


async def test_verifiers_verdicts_are_noted_and_faults_meet_it(stack: Stack, control: Control) -> None:
    before = control.journal.position
    attestation = (await asked(stack, "app-grpc", "dstack_guest.DstackGuest/Attest", report_data="00" * 64)).value
    evidence = bytearray.fromhex(attestation["attestation"])
    url = f"{stack.services['verifier']}/verify"
    status, good = await over_http(url, {"attestation": evidence.hex()})
    assert (status, good["is_valid"]) == (200, True)
    evidence[300] ^= 1
    status, bad = await over_http(url, {"attestation": evidence.hex()})
    assert (status, bad["is_valid"]) == (200, False)
    control.add_fault(service="verifier", call="/verify", kind="status", status=503, times=1)
    async with aiohttp.ClientSession() as session, session.post(url, json={}) as response:
        assert (response.status, await response.text()) == (503, "made by fault f1")
    holds, refused, faulty = control.journal.find("/verify", service="verifier", since=before)
    guest = control.guest("app")
    names = ("app_id", "os_image_hash", "mr_aggregated")
    assert holds["verdict"] == {"is_valid": True, **{name: guest[name] for name in names}}
    assert [inner["attestation"] for inner in holds["inner"]] == ["holds"]
    assert refused["outcome"] == "denied"
    assert refused["verdict"] == {"is_valid": False, "reason": bad["reason"]}
    assert (faulty["outcome"], faulty["fault"]["kind"]) == ("refused", "status")
    assert "verdict" not in faulty
    assert f"valid: app {guest['app_id']}" in next(lines(holds))
    assert f"not valid: {bad['reason']}"[:60] in next(lines(refused))
    assert "verifier" in control.describe()["services"]
    assert (await control.health())["verifier"] == "ok"


async def test_clock_that_makes_a_certificate_invalid_ends_the_handshake_and_the_log_says_why(
    stack: Stack, control: Control, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC clients name the TLS alert in words of their own; what was wrong is in the log of the KMS."""
    guest = await asyncio.to_thread(Guest.of, stack.services["kms-src"], stack.services["app"])
    identity = await asyncio.to_thread(guest.identity)
    caplog.set_level(logging.INFO)
    for port in ("kms-src-grpc", "kms-src-grpc-mtls"):
        control.set_clock(set=1_000_000_000)
        caplog.clear()
        with pytest.raises(grpc.RpcError) as refusal:
            await by_grpc(stack, port, lambda client: client.call(GET_META), identity)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        hint = "the clock of this KMS is at 2001-09-09T01:46:40Z, before that date"
        assert f'reason="client certificate is not yet valid" hint="{hint}"' in caplog.text
        await control.revert()
        assert (await by_grpc(stack, port, lambda client: client.call(GET_META), identity)).value
