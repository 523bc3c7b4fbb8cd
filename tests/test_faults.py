"""Every fault at every place a KMS talks to: a refusal or an error in time, never an allow, and recovery after it.

One stack for the file, whose services wait a second for one another; each case puts the stack back where it was.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.control.api import Control
from dstack_emu.control.schemas import ControlError
from dstack_emu.observability.fault_rules import KINDS, KINDS_OF_CHAIN
from dstack_emu.stack import Stack
from tests import tls
from tests.own_stack import PATIENCE, own_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 60.0
"""Seconds after which a call counts as hanging: many times what the services wait."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """One ready stack, with a third KMS that is allowed, and has no keys."""
    async with own_stack(patience=PATIENCE) as stack:
        control = stack.control
        await control.add_kms("third", webhook="own")
        for guest in ("kms-src", "kms-third"):
            control.allow("third", guest)
        control.allow("src", "kms-third")
        control.snapshot()
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


async def _boots(control: Control) -> None:
    async with asyncio.timeout(LIMIT):
        await control.boot_guest("app")


async def _onboards(control: Control) -> None:
    async with asyncio.timeout(LIMIT):
        await control.onboard_kms("third", "src")


def harm(kind: str, **where: str) -> dict[str, Any]:
    """The fault of a kind that does harm: one that is late is later than anybody waits, a decision is a no."""
    more: dict[str, dict[str, Any]] = {
        "delay": {"seconds": 60},
        "slow": {"seconds": 60},
        "decision": {"allow": False},
    }
    return {"kind": kind, **more.get(kind, {}), **where}


# What a kind means only at some places: a decision is a webhook's, and only collateral gets stale.
OF_SERVICES = [kind for kind in KINDS if kind not in KINDS_OF_CHAIN]
WEBHOOK_KINDS = [kind for kind in OF_SERVICES if kind != "stale"]
PCCS_KINDS = [kind for kind in OF_SERVICES if kind != "decision"]
OTHER_KINDS = [kind for kind in OF_SERVICES if kind not in ("stale", "decision")]

APP_KEY_CASES = [
    *(("auth-src", "/bootAuth/app", kind) for kind in WEBHOOK_KINDS),
    *(("pccs", "/tdx/certification/v4/tcb", kind) for kind in PCCS_KINDS),
    *(("pccs", "/sgx/certification/v4/pckcrl", kind) for kind in ("truncate", "malformed", "stale")),
]


@pytest.mark.parametrize(("service", "call", "kind"), APP_KEY_CASES)
async def test_fault_on_the_way_to_an_apps_keys_is_refused_in_time_and_passes_once_lifted(
    control: Control, service: str, call: str, kind: str
) -> None:
    before = control.journal.position
    rule = control.add_fault(**harm(kind, service=service, call=call))
    with pytest.raises(ControlError) as refused:
        await _boots(control)
    assert refused.value.status == 403
    assert rule.met >= 1
    assert control.journal.calls("GetAppKey", service="kms-src", outcome="ok", since=before) == 0
    control.lift_fault(rule.id)
    await _boots(control)


ONBOARD_CASES = [
    *(("agent-third", "Attest", kind) for kind in OTHER_KINDS),
    *(("kms-src", "GetKmsKey", kind) for kind in OTHER_KINDS),
    *(("auth-third", "/bootAuth/kms", kind) for kind in WEBHOOK_KINDS),
]


@pytest.mark.parametrize(("service", "call", "kind"), ONBOARD_CASES)
async def test_fault_on_the_way_to_root_keys_leaves_the_kms_without_any_and_passes_once_lifted(
    control: Control, service: str, call: str, kind: str
) -> None:
    rule = control.add_fault(**harm(kind, service=service, call=call))
    with pytest.raises(ControlError) as refused:
        await _onboards(control)
    assert refused.value.status == 403
    assert rule.met >= 1
    assert os.listdir(control.kms("third")["certs"]) == []
    assert control.kms("third")["phase"] == "onboard"
    control.lift_fault(rule.id)
    await _onboards(control)
    assert control.kms("third")["phase"] == "runtime"


async def test_wrong_yes_of_a_webhook_is_believed_and_noted_as_a_fault(control: Control) -> None:
    control.deny("src", "app")
    control.add_fault(service="auth-src", call="/bootAuth/app", kind="decision")
    await _boots(control)
    (record,) = control.journal.find("/bootAuth/app", service="auth-src")[-1:]
    assert record["decision"]["rule"] == "fault"
    assert record["decision"]["allowed"] is True


async def test_scripted_webhook_answers_step_by_step_and_then_as_it_should(control: Control) -> None:
    # A boot asks twice about the app: for its keys, and for the certificate that its agent shows.
    control.deny("src", "app")
    control.add_fault(
        service="auth-src", call="/bootAuth/app", script=["allow", "allow", "allow", "deny", "500", "hang"]
    )
    refusals = []
    for _ in range(5):
        try:
            await _boots(control)
            refusals.append("")
        except ControlError as error:
            refusals.append(str(error))
    expected = ("", "decided by a fault", "returned 500", f"no answer within {PATIENCE:g} s", "app not registered")
    assert [text in refusal for text, refusal in zip(expected, refusals, strict=True)] == [True] * 5
    assert refusals[0] == ""


async def test_boot_whose_last_certificate_is_refused_leaves_no_keys(control: Control) -> None:
    await control.add_guest("late", platform="host of app")
    control.allow("src", "late")
    control.add_fault(service="auth-src", call="/bootAuth/app", kind="decision", allow=False, after=1)
    with pytest.raises(ControlError, match="Boot denied: decided by a fault"):
        await control.boot_guest("late")
    assert not control.guest("late")["has_keys"]
    control.clear_faults()
    assert (await control.boot_guest("late"))["has_keys"]


async def test_answer_without_a_disk_key_is_refused_as_upstreams_guest_does(control: Control) -> None:
    control.add_fault(service="kms-src", call="GetAppKey", kind="status", status=200, body="{}")
    with pytest.raises(ControlError, match="Failed to get valid key phrase from KMS"):
        await control.boot_guest("app")


async def test_answer_that_a_fault_made_up_is_no_release(control: Control) -> None:
    control.add_fault(service="kms-src", call="GetTempCaCert", kind="status", status=200, body={})
    position = control.journal.position
    with pytest.raises(ControlError):
        await control.boot_guest("app")
    (call,) = control.journal.find("GetTempCaCert", since=position)
    assert (call["status"], call["fault"]["kind"], "released" in call) == (200, "status", False)


async def test_fault_meets_only_the_caller_it_names(control: Control) -> None:
    control.add_fault(service="pccs", caller="kms-dst", kind="status")
    await _boots(control)
    assert [fault["met"] for fault in control.faults()] == [0]


async def test_fault_passes_after_so_many_calls_and_meets_so_many(control: Control) -> None:
    control.add_fault(service="auth-src", call="/bootAuth/app", kind="status", status=503, after=1, times=1)
    with pytest.raises(ControlError, match="returned 503 Service Unavailable: made by fault f1"):
        await _boots(control)  # its SignCert is the second question
    await _boots(control)
    assert [(f["met"], f["spent"]) for f in control.faults()] == [(1, True)]


async def test_chances_are_the_same_after_going_back(control: Control) -> None:
    def tries() -> list[bool]:
        rule = control.add_fault(service="x", kind="status", probability=0.5, later=True)
        return [rule.meet("x", "y", "z") is not None for _ in range(64)]

    first = tries()
    await control.revert()
    assert tries() == first
    assert 8 < sum(first) < 56


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({}, "either a kind (delay, status"),
        ({"kind": "explode"}, "kind: Input should be 'delay', 'status'"),
        ({"kind": "hang", "script": ["allow"]}, "either a kind"),
        ({"kind": "hang", "status": 500}, "status: has no meaning for the kind hang"),
        ({"kind": "status", "status": 199}, "status: Input should be greater than or equal to 200"),
        ({"kind": "status", "status": 200}, "body: the answer of the status 200 expected, as JSON or as text"),
        ({"kind": "status", "status": 204, "body": ""}, "status: one whose answer has a body expected, got 204"),
        ({"kind": "delay", "seconds": -1}, "seconds: Input should be greater than or equal to 0"),
        ({"kind": "delay", "seconds": float("nan")}, "seconds: Input should be"),
        ({"script": ["maybe"]}, "script: allow, deny, pass, hang"),
        ({"script": ["allow"], "times": 2}, "times and probability"),
        ({"kind": "hang", "services": "pccs"}, "services: unknown key; did you mean 'service'?"),
        ({"kind": "hang", "path": "/"}, "path: unknown key; known: service, call, "),
    ],
)
async def test_fault_that_makes_no_sense_is_refused(control: Control, fault: dict[str, Any], problem: str) -> None:
    with pytest.raises(ControlError) as refused:
        control.add_fault(**fault)
    assert problem in str(refused.value)
    assert control.faults() == []


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"service": "auth-scr"}, "'auth-scr' is no service of the stack; there is agent-dst, agent-src, "),
        ({"service": "auth-scr"}, "; did you mean 'auth-src'?"),
        ({"service": "control"}, "service: 'control' is no service of the stack"),
        ({"service": "auth-src", "call": "bootAuth/app"}, "no call of auth-src; there is /, /bootAuth/app, /bootAuth"),
        ({"service": "auth-src", "call": "bootAuth/app"}, "did you mean '/bootAuth/app'?"),
        ({"service": "kms-src", "call": "KMS.GetAppKey"}, "did you mean 'GetAppKey'?"),
        ({"service": "kms-*", "call": "GetQuote"}, "call: 'GetQuote' is no call of kms-dst, kms-src, kms-third"),
        ({"service": "pccs", "call": "/bootAuth/app"}, "call: '/bootAuth/app' is no call of pccs"),
        ({"call": "/bootAuth/*s"}, None),
        ({"call": "/bootAuth/kmss"}, "call: '/bootAuth/kmss' is no call of any service"),
        ({"caller": "kms-scr"}, "caller: 'kms-scr' is no caller; there is app, kms-dst, kms-src"),
        (
            {"service": "pccs", "kind": "decision"},
            "decision: only a webhook of the stack decides; service: auth-dst",
        ),
        ({"service": "app", "kind": "stale"}, "stale: only the PCCS has documents that expire; service: pccs expected"),
        ({"kind": "stale"}, None),
    ],
)
async def test_fault_that_can_never_apply_is_refused_with_what_there_is(
    control: Control, fault: dict[str, Any], problem: str | None
) -> None:
    rule = {"kind": "hang", **fault}
    if problem is not None:
        with pytest.raises(ControlError) as refused:
            control.add_fault(**rule)
        assert problem in str(refused.value)
        assert control.faults() == []
        rule["later"] = True
    control.add_fault(**rule)
    assert len(control.faults()) == 1


async def test_fault_of_a_service_that_comes_later_applies_to_it(control: Control) -> None:
    with pytest.raises(ControlError, match="'agent-fourth' is no service"):
        control.add_fault(service="agent-fourth", kind="status")
    rule = control.add_fault(service="agent-fourth", kind="status", later=True)
    with pytest.raises(ControlError, match=f"made by fault {rule.id}"):
        await control.add_kms("fourth")
    assert rule.met >= 1
    control.lift_fault(rule.id)
    await control.add_kms("fourth")
    control.add_fault(service="agent-fourth", kind="status", times=1)
    await control.remove_kms("fourth")
    with pytest.raises(ControlError, match="'agent-fourth' is no service"):
        control.add_fault(service="agent-fourth", kind="status")


async def test_calls_of_the_journal_are_those_that_faults_know(control: Control) -> None:
    await _boots(control)
    await _onboards(control)
    calls = {(found["service"], found["call"]) for found in control.journal.find() if found["call"] != "Boot"}
    assert len(calls) > 10
    for service, call in calls:
        control.add_fault(service=service, call=call, kind="hang")


@pytest.mark.parametrize("body", [{"isAllowed": True}, '{"isAllowed": true}'], ids=["object", "text"])
async def test_wrong_value_in_a_well_formed_answer_reaches_the_decoder_of_the_client(
    stack: Stack, control: Control, body: Any
) -> None:
    rule = control.add_fault(service="auth-src", call="/bootAuth/app", kind="status", status=200, body=body)
    url = f"{stack.services['auth-src']}/bootAuth/app"
    async with aiohttp.ClientSession() as session, session.post(url, json={}) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.json() == {"isAllowed": True}
    with pytest.raises(ControlError, match="failed to decode response from .*: missing field `reason`"):
        await _boots(control)
    assert rule.met == 2
    control.lift_fault(rule.id)
    await _boots(control)


async def test_dropped_answer_promises_more_than_comes(stack: Stack, control: Control) -> None:
    control.add_fault(service="pccs", kind="drop")
    async with aiohttp.ClientSession() as session, session.get(f"{stack.services['pccs']}/root-ca.pem") as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_secrets_of_answers_are_nowhere_in_the_journal(stack: Stack, control: Control) -> None:
    await _boots(control)
    await _onboards(control)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls.client())) as session:
        async with session.get(f"{stack.services['kms-src']}/prpc/KMS.GetTempCaCert?json") as response:
            temp_ca_key = (await response.json())["temp_ca_key"]
        async with session.get(f"{stack.services['app']}/GetKey?path=wallet") as response:
            app_key = (await response.json())["key"]
    journal = json.dumps(control.journal.records())
    keys = stack.app.agent.keys
    secrets = {app_key, *(key.hex() for key in (keys.disk_crypt_key, keys.env_crypt_key, keys.k256_key))}
    for side in ("src", "dst", "third"):
        folder = Path(control.kms(side)["certs"])
        secrets |= {(folder / "root-k256.key").read_bytes().hex()}
        secrets |= {line for name in ("root-ca", "tmp-ca", "rpc") for line in _body(folder / f"{name}.key")}
    secrets |= set(temp_ca_key.splitlines()[1:-1])
    assert len(secrets) > 10
    assert [secret for secret in secrets if secret in journal] == []
    assert "PRIVATE KEY" not in journal
    (released,) = [r["released"] for r in control.journal.find("GetAppKey", outcome="ok")][-1:]
    assert released["fields"] == ["disk_crypt_key", "env_crypt_key", "k256_key"]
    assert set(released["fields"]) <= set(pb.AppKeyResponse.DESCRIPTOR.fields_by_name)


def _body(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:-1]
