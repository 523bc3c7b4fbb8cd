"""`testing` in one's own process: what is found, made and refused, and what happens when a stack is gone."""

import asyncio
import datetime
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dstack_sdk import DstackClient

from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.errors import PartEndedError, StackError
from dstack_emu.testing import LiveJournal, LiveKms, LivePolicy, LiveStack, LiveTrustDomain, Refused, refused
from dstack_emu.testing.stack_thread import StackThread

# ---- refusals


def refuse(text: str) -> None:
    raise Refused(text)


def test_refused_gives_the_words_that_it_met() -> None:
    with refused("not allowed") as refusal:
        refuse("KMS is not allowed: why")
    assert refusal.text == "KMS is not allowed: why"


def test_refused_in_other_words_is_a_failure() -> None:
    words = "^refused with another text: 'no', expected it to contain 'not allowed'$"
    with pytest.raises(AssertionError, match=words), refused("not allowed"):
        refuse("no")


def test_nothing_refused_is_a_failure() -> None:
    with (
        pytest.raises(AssertionError, match="^nothing was refused; expected a refusal that contains 'no'$"),
        refused("no"),
    ):
        pass


def test_what_is_no_refusal_goes_through(dstack_stack: LiveStack) -> None:
    with pytest.raises(ControlError, match="there is no KMS 'nowhere'"), refused():
        dstack_stack.boot(kms="nowhere")
    with pytest.raises(ZeroDivisionError), refused():
        1 // 0  # noqa: B018


def test_refusal_of_an_agent_has_its_words_and_status(dstack_app: Callable[..., LiveTrustDomain]) -> None:
    with pytest.raises(Refused, match="Unsupported algorithm") as refusal:
        dstack_app().rpc("GetKey", path="a", algorithm="rot13")
    assert refusal.value.status == 400


# ---- what is found, and what is made


def test_names_are_found_or_made(dstack_stack: LiveStack) -> None:
    live = dstack_stack
    assert live.app().info == live.app("app").info == live.trust_domain("app").info
    manifest = {"manifest_version": 2, "name": "made", "runner": "docker-compose"}
    made = live.app(compose=manifest)
    assert (made.name, made.has_keys, live.app(compose=json.dumps(manifest)).name) == ("app-2", False, "app-3")
    assert live.trust_domain("app-2").info == made.info
    assert live.platform().name == "machine-1"
    assert live.platform("host of app").device_id == live.app().platform.device_id
    assert live.kms().name == "src"
    third = live.kms("third", webhook=live.kms("dst"))
    assert (third.phase, third.policy.path, live.kms("third").url) == ("onboard", live.policy("dst").path, third.url)
    third.remove()
    made.remove()
    assert "kms-third" not in live.services


def test_setting_for_what_is_there_is_refused(dstack_stack: LiveStack) -> None:
    with pytest.raises(ControlError, match="there is a service app already"):
        dstack_stack.app("app", debug=True)
    with pytest.raises(ControlError, match="there is a KMS src already"):
        dstack_stack.kms("src", webhook="own")


def test_images_are_measured_and_booted(dstack_stack: LiveStack, dstack_policy: Callable[..., LivePolicy]) -> None:
    own, other = dstack_stack.image(), dstack_stack.image("other", "0.6.0")
    assert own.os_image_hash == dstack_stack.app().info["os_image_hash"] != other.os_image_hash
    app = dstack_stack.app("wallet", image=other)
    assert app.info["os_image_hash"] == other.os_image_hash
    with refused("OS image is not allowed"):
        app.boot()
    dstack_policy().allow(app)
    assert app.boot("src").has_keys


def test_policy_of_a_foreign_webhook_is_none_of_the_stacks(dstack_kms: Callable[..., LiveKms]) -> None:
    kms = dstack_kms("mine", webhook="http://127.0.0.1:1")
    with pytest.raises(ControlError, match="kms-mine asks the webhook http://127.0.0.1:1: change its policy there"):
        _ = kms.policy


def test_policy_is_read_and_replaced(dstack_policy: Callable[..., LivePolicy], dstack_stack: LiveStack) -> None:
    policy = dstack_policy("src")
    assert json.loads(policy.path.read_text()) == policy.content
    policy.set({**policy.content, "osImages": []})
    with refused("OS image is not allowed"):
        dstack_stack.boot()


def test_kms_answers_under_its_own_root(dstack_kms: Callable[..., LiveKms], dstack_fresh_stack: LiveStack) -> None:
    kms = dstack_kms("src")
    assert kms.rpc("GetAttestationInfo")["mr_aggregated"] == kms.trust_domain.mr_aggregated
    assert kms.platform.name == "host of kms-src"
    kms.policy.allow("kms-src")
    kms.bootstrap()
    assert kms.rpc("GetMeta")["ca_cert"] == kms.root_ca.read_text()
    with pytest.raises(ControlError, match="kms-src has keys already: it is in its runtime phase"):
        kms.bootstrap()


def test_sdk_finds_the_app_by_the_environment(dstack_env: dict[str, str]) -> None:
    assert DstackClient().info().app_name == "app"
    assert Path(dstack_env["DSTACK_EMU_POLICY_SRC"]).exists()


def test_control_has_every_call_and_no_more(dstack_stack: LiveStack) -> None:
    control = dstack_stack.control
    assert control.health()["kms-src"] == "ok"
    assert set(control.describe()["guests"]) == {"app", "kms-src", "kms-dst"}
    for name in ("journal", "became_rich", "_apply"):
        with pytest.raises(AttributeError, match=f"the control has no call '{name}'"):
            getattr(control, name)


# ---- what is seen and broken


def test_journal_looks_at_the_test_alone(dstack_stack: LiveStack, dstack_journal: LiveJournal) -> None:
    assert dstack_journal.records() == []
    dstack_stack.boot()
    assert dstack_journal.calls("GetAppKey", service="kms-src") == dstack_journal.calls("SignCert") == 1
    (asked,) = dstack_journal.find("/bootAuth/app", caller="kms-src", outcome="ok")[:1]
    assert asked["decision"]["allowed"] is True
    assert "stack → app Boot  200" in dstack_journal.text()
    dstack_journal.start()
    assert (dstack_journal.calls(), dstack_journal.text()) == (0, "")


def test_fault_ends_with_its_block_and_counts(dstack_stack: LiveStack) -> None:
    hang = dstack_stack.fault(service="auth-src", call="/bootAuth/app", kind="hang")
    with hang as fault, refused("no answer within 5 s"):
        dstack_stack.boot()
    assert fault.met == 1
    dstack_stack.boot()
    fault.lift()  # once more, which is nothing
    assert dstack_stack.control.faults() == []


def test_block_whose_fault_applied_to_nothing_fails_unless_told_otherwise(dstack_stack: LiveStack) -> None:
    unused = r"the fault \(service='auth-dst', kind='hang'\) was applied to no call of its block: 0 calls matched it"
    with pytest.raises(AssertionError, match=unused), dstack_stack.fault(service="auth-dst", kind="hang"):
        dstack_stack.boot()
    assert dstack_stack.control.faults() == []
    with dstack_stack.fault(service="auth-dst", kind="hang", must_apply=False):
        dstack_stack.boot()
    with pytest.raises(ZeroDivisionError), dstack_stack.fault(service="auth-dst", kind="hang"):
        _ = 1 / 0  # an error of the block is not hidden


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (
            lambda live: live.journal.calls("/bootAuth/kmss"),
            "call: '/bootAuth/kmss' is no call of the journal; did you mean '/bootAuth/kms'?",
        ),
        (lambda live: live.journal.calls("zzz"), "call: 'zzz' is no call of the journal; there is /, /bootAuth/app, "),
        (lambda live: live.journal.find(service="kms-scr"), "service: 'kms-scr' is no service of the journal"),
        (lambda live: live.journal.find(outcome="denid"), "did you mean 'denied'?"),
        (lambda live: live.journal.find(caller="outsider"), "did you mean 'outside'?"),
        (lambda live: live.policy("scr"), "there is no KMS 'scr': src, dst; did you mean 'src'?"),
        (lambda live: live.boot("ap"), "there is no trust domain 'ap': kms-src, kms-dst, app; did you mean 'app'?"),
        (lambda live: live.boot("app", kms="dts"), "there is no KMS 'dts': src, dst; did you mean 'dst'?"),
        (
            lambda live: live.policy("src").allow("kms-srx"),
            "no trust domain 'kms-srx': kms-src, kms-dst, app;",
        ),
        (lambda live: live.revert("redy"), "did you mean 'ready'?"),
        (lambda live: live.control.platform("host of ap"), "did you mean 'host of app'?"),
        (lambda live: live.vendor.set(qe_statu="Revoked"), "qe_statu: unknown key; did you mean 'qe_status'?"),
        (lambda live: live.app("more", memory="2G"), "memory: unknown key; did you mean 'memory_size'?"),
        (lambda live: live.kms("more", webhook="scr"), "got 'scr'; did you mean 'src'?"),
    ],
)
def test_name_that_does_not_exist_is_refused_with_the_nearest(
    dstack_stack: LiveStack, call: Callable[[LiveStack], Any], problem: str
) -> None:
    with pytest.raises(ControlError) as refused:
        call(dstack_stack)
    assert problem in str(refused.value)


def test_setting_that_no_stack_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"^a stack has no setting 'patiance'; did you mean 'patience'\?$"):
        LiveStack(patiance=1)


def test_journal_knows_every_name_that_it_has_recorded(dstack_stack: LiveStack) -> None:
    with pytest.raises(ControlError, match="'other' is no caller"):
        dstack_stack.journal.calls(caller="other")
    dstack_stack.policy("src").allow(dstack_stack.app("other"))
    dstack_stack.boot("other")
    dstack_stack.control.remove_guest("other")
    assert dstack_stack.journal.calls("KMS.GetAppKey", caller="other") == 1
    assert dstack_stack.journal.calls("/bootAuth/*", service="webhook") == 0
    assert dstack_stack.journal.calls("Boot") == 1


def test_clock_takes_moments_of_any_form(dstack_stack: LiveStack) -> None:
    clock, moment = dstack_stack.clock, datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    for form in (moment, moment.replace(tzinfo=None), moment.timestamp(), "2030-01-01"):
        clock.freeze(form)
        assert clock.now == moment
    clock.advance(datetime.timedelta(hours=12))
    clock.advance("12h")
    assert clock.now == moment + datetime.timedelta(days=1)
    clock.set("2031-01-01")
    clock.freeze()
    assert clock.now == datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
    clock.resume()
    clock.follow_the_wall()
    assert dstack_stack.control.clock()["touched"] is False


def test_snapshots_of_ones_own(dstack_stack: LiveStack) -> None:
    dstack_stack.snapshot("mine")
    dstack_stack.vendor.set(qe_status="Revoked")
    with refused("TCB status is invalid: Revoked"):
        dstack_stack.boot()
    dstack_stack.revert("mine")
    assert dstack_stack.vendor.state["qe_status"] == "UpToDate"
    dstack_stack.app().emit_event("mine", "00")
    dstack_stack.reset()
    dstack_stack.boot()


# ---- threads and ends


async def test_calls_are_made_from_many_threads_at_once(dstack_stack: LiveStack, dstack_journal: LiveJournal) -> None:
    names = [f"app-{number}" for number in range(2, 8)]
    apps = await asyncio.gather(*(asyncio.to_thread(dstack_stack.app, name) for name in names))
    await asyncio.to_thread(dstack_stack.policy().allow, *apps)
    await asyncio.gather(*(asyncio.to_thread(app.boot) for app in apps))
    assert dstack_journal.calls("GetAppKey", outcome="ok") == len(names)


def test_own_thread_does_not_wait_for_itself(dstack_stack: LiveStack) -> None:
    with pytest.raises(StackError, match="the stack's own thread cannot wait for itself"):
        dstack_stack.in_thread(lambda stack: dstack_stack.services)


def test_stack_that_cannot_come_up_says_why(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text('{"seed": "another"}')
    with pytest.raises(StackError, match="was made with the seed 'another', not 'mine'"):
        LiveStack(state=tmp_path, seed="mine").__enter__()


def test_stack_that_is_gone_says_so() -> None:
    with LiveStack(fresh=True) as live:
        pass
    with pytest.raises(StackError, match="^the stack does not run$"):
        _ = live.services


def test_part_that_fails_ends_what_waits_and_is_named() -> None:
    thread = StackThread(StackConfig.on_free_ports(fresh=True))
    stack = thread.start()
    urllib.request.urlopen(f"{stack.services['kms-src']}/finish").close()  # too early: it has no keys
    with pytest.raises(StackError, match="^the stack does not run: kms-src ended: Failed to onboard$"):
        thread.wait(asyncio.Event().wait())
    with pytest.raises(PartEndedError, match="^kms-src ended: Failed to onboard$"):
        thread.stop()
