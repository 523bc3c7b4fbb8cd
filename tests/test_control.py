"""The control of a running stack: as Python, over HTTP, and from a shell; and that going back goes all the way back."""

import asyncio
import json
import os
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.typedefs import Handler

from dstack_emu.control.api import Control
from dstack_emu.control.journal_stream import JournalStream
from dstack_emu.control.routes import ROUTES, openapi
from dstack_emu.control.schemas import ControlError
from dstack_emu.control.server import Readiness, control_app
from dstack_emu.simulator.image import OsImage
from dstack_emu.stack import Stack
from dstack_emu.transport.listen import bind_tcp, serve
from tests import foreign
from tests.commands import ask
from tests.own_stack import own_stack
from tests.running import counted_turns

pytestmark = pytest.mark.asyncio(loop_scope="module")

MANIFEST = {"manifest_version": 2, "name": "app", "runner": "docker-compose"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Stack]:
    """One ready stack for the file."""
    async with own_stack() as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="module")
async def stack(running: Stack) -> AsyncIterator[Stack]:
    """The same, as it became ready."""
    yield running
    await running.control.reset()


@pytest.fixture
def control(stack: Stack) -> Control:
    """Its control."""
    return stack.control


# ---- machines and their vendor


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"tcb_status": "OutOfDate"}, "TCB status is not allowed"),
        ({"module_status": "Revoked"}, "TCB status is invalid: Revoked"),
        ({"pck_revoked": True}, "invalid quote: failed to verify TDX quote"),
        ({"other_root": True}, "invalid quote: failed to verify TDX quote"),
    ],
)
async def test_machine_that_is_changed_is_refused_at_once_and_admitted_when_changed_back(
    control: Control, changes: dict[str, Any], refusal: str
) -> None:
    before = control.platform("host of app")
    changed = control.set_platform("host of app", **changes)
    assert changed == before | changes
    with pytest.raises(ControlError) as refused:
        await control.boot_guest("app")
    assert refusal in str(refused.value)
    control.set_platform("host of app", **{name: before[name] for name in changes})
    await control.boot_guest("app")


async def test_kms_judges_its_downgraded_platform_only_when_it_is_started_anew(stack: Stack, control: Control) -> None:
    assert (await asyncio.to_thread(_ask_kms, stack, "GetTempCaCert")).status == 200
    answer = control.set_platform("host of kms-src", tcb_status="OutOfDate")
    assert "`ctl kms restart src` makes it verify the present state" in answer["note"]
    assert "note" not in control.set_platform("host of app", tcb_status="UpToDate")
    assert (await asyncio.to_thread(_ask_kms, stack, "GetTempCaCert")).status == 200
    files, url = _files(control.kms("src")["certs"]), control.kms("src")["url"]
    restarted = await control.restart_kms("src")
    assert (restarted["phase"], restarted["url"]) == ("runtime", url)
    assert _files(restarted["certs"])["root-ca.key"] == files["root-ca.key"]
    refused = await asyncio.to_thread(_ask_kms, stack, "GetTempCaCert")
    assert (refused.status, "TCB status is not allowed" in refused.error) == (400, True)
    assert "note" in control.set_platform("host of kms-src", tcb_status="UpToDate")  # it was judged OutOfDate
    await control.restart_kms("src")
    assert "note" not in control.set_platform("host of kms-src", tcb_status="UpToDate")  # it has judged nothing yet
    assert (await asyncio.to_thread(_ask_kms, stack, "GetTempCaCert")).status == 200
    await control.boot_guest("app")


async def test_kms_that_did_not_start_anew_can_be_restarted_or_put_back(stack: Stack, control: Control) -> None:
    url = control.kms("src")["url"]
    for put_back in (lambda: control.restart_kms("src"), control.reset):
        control.add_fault(service="agent-src", call="Attest", kind="wrong-type")
        with pytest.raises(ControlError, match="kms-src: Failed to reissue the attested KMS RPC certificate"):
            await control.restart_kms("src")
        assert (control.kms("src")["phase"], control.kms("src")["url"]) == ("stopped", url)
        with pytest.raises(ControlError, match=r"kms-src does not run: `ctl kms restart src` starts it with its keys"):
            await control.boot_guest("app")
        assert control.set_platform("host of kms-src", tcb_status="UpToDate")["tcb_status"] == "UpToDate"
        control.clear_faults()
        await put_back()
        assert (control.kms("src")["phase"], control.kms("src")["url"]) == ("runtime", url)
        await control.boot_guest("app")
        assert stack.guests["app"].agent.has_keys


async def test_reset_gives_a_kms_a_certificate_with_its_own_evidence_again(stack: Stack, control: Control) -> None:
    certificate = _files(control.kms("src")["certs"])["rpc.crt"]
    given = {"report_data": bytes(64).hex()}
    other = await asyncio.to_thread(foreign.ask_agent, stack.services["agent-dst"], "Attest", given)
    control.add_fault(service="agent-src", call="Attest", kind="status", status=200, body=other)
    await control.restart_kms("src")
    control.clear_faults()
    with pytest.raises(ControlError, match="report data mismatch"):
        await control.boot_guest("app")
    await control.reset()
    assert _files(control.kms("src")["certs"])["rpc.crt"] == certificate
    await control.boot_guest("app")


async def test_times_are_shown_as_times(control: Control) -> None:
    control.set_clock(freeze="2026-06-01T12:00:00Z")
    assert (control.clock()["now"], control.clock()["time"]) == (1_780_315_200, "2026-06-01T12:00:00Z")
    control.set_vendor(tcb_info_dating={"issued": "2026-05-20", "next_update": "2026-06-19T00:00:00Z"})
    dates = {"issued": "2026-05-20T00:00:00Z", "next_update": "2026-06-19T00:00:00Z"}
    assert control.vendor()["tcb_info_dating"] == dates
    assert control.set_vendor(tcb_info_dating=dates)["tcb_info_dating"] == dates
    with pytest.raises(
        ControlError, match="both from 2024-01-01T00:00:00Z to 2099-12-31T00:00:00Z, expected, got 1970"
    ):
        control.set_vendor(collateral={"issued": 5, "next_update": "2026-06-19"})


@pytest.mark.parametrize("status", [{"qe_status": "OutOfDate"}, {"pck_ca_revoked": True}, {"collateral": "expired"}])
async def test_vendor_that_is_changed_speaks_for_all_machines(control: Control, status: dict[str, Any]) -> None:
    control.set_vendor(**status)
    with pytest.raises(ControlError):
        await control.boot_guest("app")


async def test_collateral_that_expires_at_a_date_is_refused_from_then_on(control: Control) -> None:
    control.set_clock(freeze="2026-05-31T23:59:59Z")
    control.set_vendor(collateral_until="2026-06-01")
    await control.boot_guest("app")
    control.set_clock(advance="2s")
    with pytest.raises(ControlError, match="CrlExpired"):
        await control.boot_guest("app")
    control.set_vendor(collateral="current")
    await control.boot_guest("app")


# ---- the clock


async def test_certificates_and_timestamps_follow_the_clock_once_it_is_set(stack: Stack, control: Control) -> None:
    def dates() -> str:
        answer: dict[str, Any] = foreign.ask_agent(stack.services["app"], "GetTlsKey", {"subject": "x"})
        command = ["openssl", "x509", "-noout", "-enddate"]
        pem: str = answer["certificate_chain"][0]
        return subprocess.run(command, input=pem, capture_output=True, text=True, check=True).stdout.strip()

    assert await asyncio.to_thread(dates) == "notAfter=Dec 30 00:00:00 2035 GMT"  # ten years of 365 days from ISSUED_AT
    control.set_clock(freeze="2030-01-01T00:00:00Z")
    assert await asyncio.to_thread(dates) == "notAfter=Dec 30 00:00:00 2039 GMT"
    answer = await asyncio.to_thread(_ask_kms, stack, "GetAppEnvEncryptPubKey", app_id="00" * 20)
    assert int(answer.value["timestamp"]) == 1_893_456_000


def _ask_kms(stack: Stack, method: str, **arguments: Any) -> foreign.Answer:
    """Ask the source KMS as anyone would."""
    with foreign.kms(stack.services["kms-src"]) as connection:
        return connection.call(method, **arguments)


def _files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---- going back


async def test_going_back_restores_all_that_was_changed(stack: Stack, control: Control) -> None:
    def seen() -> dict[str, Any]:
        state = control.save()
        return {**state, "journal": None}

    before, key = seen(), stack.app.agent.keys.k256_key
    description = control.describe()
    control.snapshot("before")
    control.set_clock(freeze=1_900_000_000)
    control.set_vendor(qe_status="OutOfDate")
    control.set_platform("host of app", tcb_status="Revoked")
    control.set_policy("src", {"osImages": []})
    control.add_fault(kind="hang", service="nobody", later=True)
    control.emit_event("app", "more", "ff")
    await control.add_guest("other")
    await control.add_kms("third")
    foreign_quote = stack.app.domain.attest(bytes(64)).quote
    assert seen() != before
    await control.revert("before")
    assert seen() == before
    assert {**control.describe(), "snapshots": []} == {**description, "snapshots": []}
    assert stack.app.domain.attest(bytes(64)).quote != foreign_quote
    await control.boot_guest("app")
    assert stack.app.agent.keys.k256_key == key


async def test_reset_names_a_policy_that_cannot_be_written(control: Control) -> None:
    folder = Path(control.policies()["src"]).parent
    away = folder.rename(folder.with_name("away"))
    try:
        with pytest.raises(
            ControlError, match="the state cannot be restored: .*auth-src.json cannot be written: No such"
        ):
            await control.reset()
    finally:
        away.rename(folder)


async def test_reset_makes_a_kms_fresh_again_that_got_keys_since_and_the_same_script_makes_the_same_keys() -> None:
    async with own_stack(fresh=True) as stack:
        control = stack.control
        keys = []
        for _ in range(2):
            assert control.kms("src")["phase"] == "onboard"
            control.allow("src", "kms-src")
            await control.onboard_kms("src", None)
            assert control.kms("src")["phase"] == "runtime"
            folder = control.kms("src")["certs"]
            keys.append(_files(folder))
            assert stat.S_IMODE(os.stat(f"{folder}/root-ca.key").st_mode) == 0o600
            assert control.kms("src")["url"].startswith("https://")
            control.snapshot("with-keys")
            await control.reset()
            assert os.listdir(folder) == []
            assert control.kms("src")["url"].startswith("http://")
        assert keys[0] == keys[1]
        await control.revert("with-keys")  # and the other way round
        assert _files(folder) == keys[0]
        assert (await asyncio.to_thread(_ask_kms, stack, "GetTempCaCert")).status == 200


async def test_saved_state_is_the_same_stack_in_another_process_with_its_keys(stack: Stack, control: Control) -> None:
    await control.add_guest("other", app_id="ab" * 20)
    control.allow("src", "other")
    await control.boot_guest("other")
    await control.add_kms("third")
    control.add_fault(service="x", script=["allow", "deny"], later=True)
    document = json.loads(json.dumps(control.save()))
    key = stack.guests["other"].agent.keys.disk_crypt_key
    async with own_stack() as second:
        await second.control.load(document)
        assert second.control.save() == document
        assert second.guests["other"].agent.keys.disk_crypt_key == key
        assert second.control.kms("third")["phase"] == "onboard"
        # It is certified by the second process's KMS, with what the first one's gave it.
        answer = await asyncio.to_thread(foreign.ask_agent, second.services["other"], "GetTlsKey", {"subject": "x"})
        assert len(answer["certificate_chain"]) == 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "state: version 1 expected, got 2"),
        ({"format": "other"}, "a document of the format 'dstack-emu state' expected"),
        ({"seed": "another"}, "the state is of a stack with the seed 'another'"),
        ({"release": "0.5"}, "the state is of a stack with the release '0.5', not '0.6'"),
        ({"clock": {"frozen_at": -1}}, "clock: "),
        ({"more": 1}, "more: unknown key"),
        ({"guests": {}}, "state: app, kms-dst, kms-src: missing"),
        ({"policies": {}}, "state: policies: dst, src expected"),
        ({"vendor": {"qe_status": "Fine"}}, "vendor"),
        ({"journal": -1}, "journal: Input should be greater than or equal to 0"),
    ],
)
async def test_wrong_state_is_refused_by_name_and_changes_nothing(
    control: Control, change: dict[str, Any], problem: str
) -> None:
    before = control.save()
    with pytest.raises(ControlError) as refused:
        await control.load({**before, **change})
    assert problem in str(refused.value)
    assert control.save() == before


# ---- who there is


async def test_boots_of_one_trust_domain_at_once_come_one_after_the_other(control: Control) -> None:
    await control.boot_guest("app")
    measured = control.guest("app")["mr_aggregated"]
    booted = await asyncio.gather(*(control.boot_guest("app") for _ in range(3)))
    assert [each["mr_aggregated"] for each in booted] == [measured] * 3


async def test_trust_domain_of_any_identity_boots_if_it_is_allowed(stack: Stack, control: Control) -> None:
    compose = json.dumps({**MANIFEST, "name": "mine", "public_tcbinfo": False})
    made = await control.add_guest(
        "mine",
        app_id="0x" + "cd" * 20,
        compose=compose,
        image="other-image",
        platform="another host",
        events=[{"event": "early", "payload": "01"}],
    )
    assert (made["app_id"], made["platform"], made["has_keys"]) == ("cd" * 20, "another host", False)
    assert made["device_id"] == control.platform("another host")["device_id"]
    assert made["os_image_hash"] != control.guest("app")["os_image_hash"]
    with pytest.raises(ControlError, match="OS image is not allowed"):
        await control.boot_guest("mine")
    control.allow("src", "mine", this_device_only=True)
    assert (await control.boot_guest("mine"))["has_keys"] is True
    answer = await asyncio.to_thread(foreign.ask_agent, made["dstack_sock"], "GetKey", {"path": "a"})
    assert len(bytes.fromhex(answer["key"])) == 32
    await control.remove_guest("mine")
    assert os.listdir(os.path.dirname(made["dstack_sock"])) == []


async def test_version_of_the_stacks_own_image_may_be_given(stack: Stack, control: Control) -> None:
    own = stack.context.image
    made = {
        version: (await control.add_guest(f"v{index}", image_version=version))["os_image_hash"]
        for index, version in enumerate((own.version, "0.4.2", "0.4.3"))
    }
    assert made[own.version] == own.os_image_hash.hex()
    assert len(set(made.values())) == 3
    assert made["0.4.2"] == OsImage.from_seed(stack.context.seed.derive, own.name, "0.4.2").os_image_hash.hex()
    kms = await control.add_kms("versioned", image_version="0.4.2")
    assert kms["guest"]["os_image_hash"] == made["0.4.2"]


async def test_version_of_an_image_of_a_folder_cannot_be_chosen(stack: Stack, tmp_path: Path) -> None:
    for name, data in stack.context.image.files.items():
        (tmp_path / name).write_bytes(data)
    async with own_stack(image_dir=tmp_path, fresh=True) as other:
        own = other.context.image
        with pytest.raises(ControlError) as refused:
            await other.control.add_guest("mine", image_version="0.4.2")
        assert str(refused.value) == (
            f"trust domain mine: image_version: the stack boots the image of a folder, of version {own.version}; "
            "for version 0.4.2 name an image too"
        )
        made = await other.control.add_guest("mine", image_version=own.version)
        assert made["os_image_hash"] == own.os_image_hash.hex()


async def test_what_an_app_keeps_private_is_hidden_outside(stack: Stack, control: Control) -> None:
    compose = json.dumps({**MANIFEST, "public_tcbinfo": False})
    url = (await control.add_guest("private", compose=compose))["url"]
    for path, hidden in (("/prpc/Info", True), ("/prpc/Worker.Info", True), ("/prpc/Tappd.Info", False)):
        _, answer = await asyncio.to_thread(ask, url, path, {})
        assert [answer[name] == "" for name in ("tcb_info", "vm_config")] == [hidden, hidden], path


@pytest.mark.parametrize(
    ("spec", "refusal"),
    [
        ({"events": [{"event": "forged", "measured": False}]}, "RTMR3 mismatch"),
        ({"debug": True}, "Debug mode"),
    ],
)
async def test_trust_domain_that_lies_or_is_debugged_gets_no_keys(
    control: Control, spec: dict[str, Any], refusal: str
) -> None:
    await control.add_guest("liar", **spec)
    control.allow("src", "liar")
    with pytest.raises(ControlError) as refused:
        await control.boot_guest("liar")
    assert refusal in str(refused.value)


@pytest.mark.parametrize(
    ("name", "spec", "problem"),
    [
        ("app", {}, "there is a service app already"),
        ("pccs", {}, "there is a service pccs already"),
        ("kms-x", {}, "belongs to a KMS"),
        ("../x", {}, "name: String should match pattern"),
        ("x", {"app_id": "00"}, "app_id: 20 bytes expected, got 1"),
        ("x", {"compose": "{"}, "app-compose: Expecting property name"),
        ("x", {"memory_size": 5}, "requires memory_size =="),
        ("x", {"colour": "red"}, "colour: unknown key"),
        (
            "x",
            {"encrypted_env": "00" * (256 * 1024 + 2)},
            "encrypted_env: String should have at most 524290 characters",
        ),
    ],
)
async def test_trust_domain_that_cannot_be_is_refused_and_leaves_nothing(
    stack: Stack, control: Control, name: str, spec: dict[str, Any], problem: str
) -> None:
    services, platforms = dict(stack.services), control.platforms()
    with pytest.raises(ControlError) as refused:
        await control.add_guest(name, **spec)
    assert problem in str(refused.value)
    assert (stack.services, control.platforms()) == (services, platforms)


async def test_kms_that_shares_a_webhook_onboards_and_gives_the_same_keys(stack: Stack, control: Control) -> None:
    made = await control.add_kms("third", webhook="src")
    assert made["policy"] is None
    with pytest.raises(ControlError, match="aggregated MR not allowed"):
        await control.onboard_kms("third")
    control.allow("src", "kms-third")
    assert (await control.onboard_kms("third"))["phase"] == "runtime"
    with pytest.raises(ControlError, match="it is in its runtime phase"):
        await control.onboard_kms("third")
    before = stack.app.agent.keys.k256_key
    await control.boot_guest("app", "third")
    assert stack.app.agent.keys.k256_key == before
    with pytest.raises(ControlError, match="part of every stack"):
        await control.remove_kms("src")


async def test_kms_of_an_older_release_is_a_source_that_carries_its_evidence_in_the_legacy_form(
    stack: Stack, control: Control
) -> None:
    await control.add_kms("old", webhook="src", rpc_cert_evidence="legacy")
    await control.add_kms("third", webhook="src")
    for name in ("kms-old", "kms-third"):
        control.allow("src", name)
    await control.onboard_kms("old", "src")
    assert (await control.onboard_kms("third", "old"))["phase"] == "runtime"
    before = stack.app.agent.keys.k256_key
    await control.boot_guest("app", "third")
    assert stack.app.agent.keys.k256_key == before


async def test_kms_waits_for_its_webhook_as_long_as_its_settings_say(control: Control) -> None:
    timeout = {"auth_api": {"webhook": {"timeout": "1s"}}}
    await control.add_kms("impatient", webhook="src", settings=timeout)
    control.add_fault(service="auth-src", kind="hang")
    with pytest.raises(ControlError, match=r"error sending request for url \(.*/bootAuth/kms\): no answer within 1 s"):
        await control.onboard_kms("impatient", None)
    for wrong in ("500ms", 30):
        settings = {"auth_api": {"webhook": {"timeout": wrong}}}
        said = f"kms-hasty: kms.toml: core.auth_api.webhook.timeout: .* expected, got {wrong!r}"
        with pytest.raises(ControlError, match=said):
            await control.add_kms("hasty", webhook="src", settings=settings)


async def test_webhook_of_somebody_else_is_noted_and_is_sent_no_header_of_ours(control: Control) -> None:
    seen: list[set[str]] = []

    async def decide(request: web.Request) -> web.Response:
        seen.append({name.lower() for name in request.headers})
        return web.json_response({"isAllowed": len(seen) < 3, "reason": "enough", "gatewayAppId": ""})

    app = web.Application()
    app.router.add_post("/bootAuth/kms", decide)
    server = await serve(app, bind_tcp("127.0.0.1", 0))
    await control.add_kms("third", webhook=server.url)
    control.allow("src", "kms-third")
    before = control.journal.position
    await control.onboard_kms("third", "src")
    (asked,) = control.journal.find("/bootAuth/kms", service="webhook", caller="kms-third", since=before)
    assert (asked["outcome"], asked["decision"]["allowed"]) == ("ok", True)
    assert asked["decision"]["asked"]["mr_aggregated"] == control.guest("kms-src")["mr_aggregated"]
    evidence = json.dumps(control.guest_evidence("kms-third"))
    asked_now = (await control.admit(text=evidence, caller="kms"))["kms"]["third"]
    assert (asked_now["verdict"], asked_now["decider"]["where"]) == ("allowed", server.url)
    assert len(seen) == 2
    for names in seen:
        assert "user-agent" in names
        assert not [name for name in names if "emu" in name]
    await server.close()
    unanswered = (await control.admit(text=evidence, caller="kms"))["kms"]["third"]
    assert (unanswered["verdict"], "no decision, which a KMS takes" in unanswered["problem"]) == (None, True)


# ---- over HTTP


async def _ask(stack: Stack, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session:
        data = {} if body is None else {"json": body}
        async with session.request(method, stack.services["control"] + path, **data, **options) as response:
            return response.status, await response.json()


async def test_openapi_document_names_every_call_and_every_call_answers_or_refuses(stack: Stack) -> None:
    status, document = await _ask(stack, "GET", "/openapi.json")
    assert status == 200
    assert document == json.loads(json.dumps(openapi()))
    for operation in ROUTES:
        described = document["paths"][operation.path][operation.method.lower()]
        assert described["summary"]
        if operation.method == "GET" and "{" not in operation.path:
            assert (await _ask(stack, "GET", operation.path))[0] == 200
        path = operation.path.format(name="nobody", kms="nobody", id="nobody") if "{" in operation.path else ""
        if path and operation.method == "GET":
            status, answer = await _ask(stack, "GET", path)
            assert (status, "there is no" in answer["error"]) == (404, True)
    references = {text.split('"')[0] for text in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= document["components"]["schemas"].keys()


async def test_session_over_http_changes_and_turns_back(stack: Stack) -> None:
    assert (await _ask(stack, "POST", "/snapshots", {"name": "here"})) == (200, {"name": "here"})
    assert (await _ask(stack, "PATCH", "/platforms/host of app", {"tcb_status": "OutOfDate"}))[0] == 200
    status, answer = await _ask(stack, "POST", "/guests/app/boot", {})
    assert (status, "TCB status is not allowed" in answer["error"]) == (403, True)
    status, answer = await _ask(stack, "GET", "/journal/count?call=/bootAuth/app&outcome=denied")
    assert (status, answer) == (200, {"calls": 1})
    assert (await _ask(stack, "POST", "/snapshots/here/revert", {}))[0] == 200
    assert (await _ask(stack, "GET", "/journal/count?outcome=denied"))[1] == {"calls": 0}
    assert (await _ask(stack, "GET", "/platforms/host of app"))[1]["tcb_status"] == "UpToDate"


async def test_method_that_a_path_does_not_have_is_refused_with_those_that_it_has(stack: Stack) -> None:
    async with aiohttp.ClientSession() as session, session.delete(stack.services["control"] + "/clock") as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "GET,POST")


@pytest.mark.parametrize("since", ["x", "9" * 5000])
async def test_journal_is_not_streamed_from_what_is_no_number(stack: Stack, since: str) -> None:
    url = stack.services["control"] + "/journal/stream"
    async with aiohttp.ClientSession() as session, session.get(url, params={"since": since}) as answer:
        assert (answer.status, await answer.json()) == (400, {"error": f"since: a number expected, got {since!r:.40}"})


async def test_journal_streams_each_record_as_it_ends(stack: Stack, control: Control) -> None:
    url = stack.services["control"] + "/journal/stream"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, params={"since": str(control.journal.position)}) as lines,
        session.get(url, headers={"Accept": "text/event-stream"}) as events,
    ):
        await control.boot_guest("app")
        (expected,) = control.journal.records(limit=1)
        assert json.loads(await lines.content.readline()) == expected
        assert (await events.content.readline()).startswith(b'data: {"id":')
        assert events.content_type == "text/event-stream"


async def test_stream_of_events_of_a_quiet_stack_is_kept_alive_by_comments(control: Control) -> None:
    app = web.Application()
    app.router.add_get("/", JournalStream(control.journal, heartbeat=0.01).answer)
    server = await serve(app, bind_tcp("127.0.0.1", 0))
    try:
        async with (
            aiohttp.ClientSession(headers={"Accept": "text/event-stream"}) as session,
            session.get(server.url) as events,
        ):
            assert await events.content.readexactly(6) == b":\n\n:\n\n"
    finally:
        await server.close()


async def test_follower_of_the_journal_that_is_too_slow_is_told_how_many_records_it_has_lost(
    stack: Stack, control: Control
) -> None:
    url, journal = stack.services["control"] + "/journal/stream", control.journal
    in_python = journal.follow_in_batches()
    coming = asyncio.ensure_future(anext(in_python))
    async with aiohttp.ClientSession() as session, session.get(url) as one, session.get(url) as other:
        first = journal.position + 1
        for _ in range(1500):  # nobody can read meanwhile
            journal.end(journal.begin("app", "Info", None, 0, "outside"), 200)
        for lines in (one, other):
            assert json.loads(await lines.content.readline()) == {"lost": 500}
            assert json.loads(await lines.content.readline())["id"] == str(first + 500)
    lost, *records = await coming
    assert (lost, len(records), records[0]["id"]) == ({"lost": 500}, 1000, str(first + 500))
    await in_python.aclose()


@pytest.mark.parametrize(
    ("headers", "status", "problem"),
    [
        ({"Host": "evil.example"}, 403, "Host: localhost or an IP address expected"),
        ({"Host": "localhost.evil.example:80"}, 403, "Host: "),
        ({"Origin": "http://evil.example"}, 403, "Origin: "),
        ({"Origin": "null"}, 403, "Origin: "),
        ({"Content-Type": "text/plain"}, 415, "Content-Type: application/json expected"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "Content-Type: "),
    ],
)
async def test_request_as_a_web_page_could_send_it_is_refused(
    stack: Stack, control: Control, headers: dict[str, str], status: int, problem: str
) -> None:
    body = {"data": json.dumps({"kind": "hang"}), "headers": {"Content-Type": "application/json", **headers}}
    seen, answer = await _ask(stack, "POST", "/faults", **body)
    assert (seen, problem in answer["error"]) == (status, True)
    assert control.faults() == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "problem"),
    [
        ("POST", "/clock", {"set": "soon"}, 400, "Unix seconds or ISO 8601"),
        ("POST", "/clock", {"set": 1, "advance": 1}, 400, "one of set, advance, freeze"),
        ("POST", "/clock", {"set": -5}, 400, "set: Input should be greater than or equal to 0"),
        ("POST", "/clock", {"advance": "1y"}, 400, "a number with s, m, h, d or w"),
        ("PATCH", "/vendor", {"qe_status": "Fine"}, 400, "qe_status: Input should be 'UpToDate'"),
        ("PATCH", "/vendor", {"qe_status": "ConfigurationNeeded"}, 400, "'UpToDate', 'OutOfDate' or 'Revoked'"),
        ("PATCH", "/vendor", {"recovery_qe_status": "ConfigurationNeeded"}, 400, "'OutOfDate' or 'Revoked'"),
        ("PATCH", "/vendor", {"collateral_until": 5}, 400, "collateral dates: "),
        ("PATCH", "/platforms/host of app", {"module_status": "ConfigurationNeeded"}, 400, "'OutOfDate' or 'Revoked'"),
        ("PATCH", "/platforms/nobody", {}, 404, "there is no platform 'nobody'"),
        ("POST", "/guests/app/events", {"event": "x", "payload": "zz"}, 400, "payload: hex expected, got 'zz': "),
        ("POST", "/faults", [1], 400, "Input should be a valid dictionary"),
        ("PUT", "/policies/src", [1], 400, "a policy is a JSON object, got list"),
        ("POST", "/policies/src/allow", {"guest": "nobody"}, 404, "there is no trust domain 'nobody'"),
        ("POST", "/chain/upgrade", {}, 409, "no chain of its own: start it with --auth eth"),
        ("POST", "/snapshots/nothing/revert", {}, 404, "there is no snapshot 'nothing'"),
        ("PUT", "/state", {"version": 1}, 400, "a document of the format"),
        ("DELETE", "/snapshots/ready", None, 409, "cannot be deleted"),
        ("DELETE", "/guests/app", None, 409, "cannot be removed"),
        ("GET", "/journal?limit=x", None, 400, "limit: a number expected"),
        ("GET", "/journal?colour=x", None, 400, "'colour' is not a parameter of this call"),
        ("GET", "/nothing", None, 404, "/openapi.json lists what there is"),
        ("DELETE", "/clock", None, 405, "/openapi.json lists what there is"),
    ],
)
async def test_wrong_request_is_refused_with_the_reason(
    stack: Stack, method: str, path: str, body: Any, status: int, problem: str
) -> None:
    seen, answer = await _ask(stack, method, path, body)
    assert (seen, problem in answer["error"]) == (status, True), answer


async def test_method_that_does_not_exist_is_refused_as_such_whatever_its_body_is(stack: Stack) -> None:
    for content in ({}, {"data": "text", "headers": {"Content-Type": "text/plain"}}):
        assert (await _ask(stack, "PUT", "/clock", **content))[0] == 405


async def test_other_calls_are_answered_while_a_body_is_read_and_the_api_described(control: Control) -> None:
    turns: list[int] = []

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        await request.read()
        with counted_turns() as counted:
            try:
                return await handler(request)
            finally:
                turns.append(counted[0])

    app = control_app(control, Readiness(is_ready=True), None)
    app.middlewares.append(count)
    server = await serve(app, bind_tcp("127.0.0.1", 0))
    async with aiohttp.ClientSession(server.url) as session:
        for text, status in (("x" * 1024 * 1024, 400), ("soon", 400), ("2026-12-01T00:00:00Z", 200)):
            async with session.post("/clock", json={"set": text}) as answer:
                assert answer.status == status
        for _ in range(2):
            async with session.get("/openapi.json") as answer:
                assert (await answer.json())["openapi"] == "3.1.0"
    await server.close()
    assert turns[0] > 0
    assert turns[1:3] == [0, 0], "a small body needs no thread"
    assert turns[3] > turns[4] == 0, "the description is made once, beside the loop"
