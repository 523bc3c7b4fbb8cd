"""The console in a real Chromium, over real stacks: by keyboard, and with hostile names.

It runs if DSTACK_EMU_BROWSER is set (`make browser`): starting a browser takes seconds.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dstack_emu import Stack
from dstack_emu.testing import LiveStack
from tests.browser import TIMEOUT, Browser, Tab
from tests.console import control_call, open_page
from tests.running import RunningStack, running_stack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]

HOSTILE = '<img src=x onerror="alert(1)"><b>bold</b>'


@pytest.fixture
def stack(full_stack: RunningStack) -> RunningStack:
    """A stack with all parts, as it became ready."""
    return full_stack


@pytest.fixture
def tab(console_tab: Tab) -> Tab:
    """An empty page, which must ask nobody but the stack, and complain of nothing."""
    return console_tab


def check_accessible(tab: Tab) -> None:
    """Everything that takes the focus has a name, and the page fits at 200 % and on a phone."""
    assert tab.unnamed() == []
    for width, dark in ((640, False), (390, True)):  # 1280 at 200 %, and a phone
        tab.resize(width, 800, dark=dark)
        wide = (
            "[...document.querySelectorAll('body *')].filter((each) => each.getBoundingClientRect().right > innerWidth)"
        )
        widest = f"{wide}.map((each) => each.outerHTML.slice(0, 200))"
        assert tab.run("document.documentElement.scrollWidth <= innerWidth"), (width, tab.run(widest))
    tab.resize(1280, 900)


# ---- the stack


def test_stack_page_shows_each_part_and_its_last_calls(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "stack")
    tab.wait("document.querySelectorAll('svg .arrow.ok').length > 5")
    for name in stack.services.keys() - {"control"}:
        assert tab.run(f"!!document.querySelector('[data-key=\"part {name}\"]')"), name
    stack.curl(f"{stack.services['app']}/GetQuote?report_data=00")
    tab.see("GetQuote", "tbody")  # by the journal's stream
    control_call(stack, "POST", "/policies/src/deny", '{"guest": "app"}')
    tab.tab_to("app, has keys")
    tab.press("Enter")
    tab.tab_to("Boot it by kms-src")
    tab.press("Enter")
    tab.see("app not registered", "section")
    tab.wait("document.querySelector('svg .arrow.denied')")
    tab.see("denied: app not registered", "tbody")
    check_accessible(tab)


def test_part_that_is_opened_shows_measurements_and_certificates_but_no_key(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "stack")
    tab.tab_to("kms-src, runtime phase")
    tab.press("Enter")
    tab.see("root-ca.crt", "section")
    assert tab.focused() == "kms-src"
    assert stack.description["kms"]["src"]["mr_aggregated"] in tab.text("section")
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    tab.see("Dstack KMS CA", "details")
    assert "PRIVATE KEY" not in tab.text()
    certs = Path(stack.description["state"], "kms-src", "certs")
    assert certs.joinpath("root-k256.key").read_bytes().hex() not in tab.text()
    tab.tab_to("pccs")
    tab.press(" ")
    tab.see("tcb info dating", "section")
    tab.tab_to("ingress")
    tab.press("Enter")
    tab.see(stack.description["app"]["instance_id"], "section")  # which is registered at the gateway
    links = tab.run("[...document.querySelectorAll('section dd a')].map((each) => each.href.replace(/\\/$/, ''))")
    assert links == [stack.description["gateway"]["app_url"]] * 2
    tab.tab_to("vmm")
    tab.press("Enter")
    tab.see("There is none.", "section")


def test_hostile_name_is_shown_as_text(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "stack")
    control_call(stack, "PUT", "/platforms/%3Cb%3Ehost%3C%2Fb%3E")
    control_call(stack, "POST", "/guests", '{"name": "added", "platform": "<b>host</b>"}')
    tab.wait("document.querySelector('[data-key=\"part added\"]')")
    tab.tab_to("added, has no keys")
    tab.press("Enter")
    tab.see("<b>host</b>", "section")
    assert tab.run("document.querySelectorAll('main b, main img, main script').length") == 0


# ---- a stack that demands a token


def test_token_is_typed_once_and_is_in_no_address(browser: Browser, tab: Tab, tmp_path: Path) -> None:
    with running_stack("--fresh", "--listen", "0.0.0.0", "--state", str(tmp_path)) as stack:
        token = (tmp_path / "control.token").read_text().strip()
        tab.open(f"{stack.services['control']}/console/")
        tab.see("This stack demands a token", "dialog[open]")
        assert tab.unnamed() == []
        tab.press("Escape", "Escape", "Escape")
        # The dialog opens anew after it was told that it is closed; keys that come before that go nowhere.
        tab.run("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
        tab.wait("document.getElementById('login').open && document.activeElement.id === 'token'")
        tab.write("another")
        tab.press("Enter")
        tab.see("The stack has another token.", "dialog[open]")
        tab.run("document.getElementById('token').value = ''")
        tab.write(token)
        tab.press("Enter")
        tab.see("connected", "#connection")
        tab.see("onboard phase", "main")
        tab.run("window.isBefore = true, location.reload()")
        tab.wait("!window.isBefore && document.querySelector('main').innerText.includes('onboard phase')")
        assert not tab.run("document.getElementById('login').open")  # without asking again
        assert not any(token in url for url in tab.requests)
        assert token not in tab.run("location.href") + tab.text()
        other = browser.tab()  # nobody else's
        other.open(f"{stack.services['control']}/console/")
        other.see("This stack demands a token", "dialog[open]")
        tab.open("about:blank")
        other.open("about:blank")
        tab.requests.clear()
        tab.complaints.clear()  # a refused request is an error in Chromium's console


# ---- calls


def test_bootstrap_that_was_refused_is_allowed_by_what_the_call_shows(tab: Tab) -> None:
    with running_stack("--fresh") as stack:
        name = stack.description["kms_names"][0]
        assert stack.rpc("kms-src", "Onboard.Bootstrap", {"domain": name})[0] == 400
        open_page(tab, stack, "calls")
        tab.tab_to("Calls, the newest last")
        tab.press("ArrowUp", "Enter")
        tab.see("The rule kms mr aggregated: mrAggregated", "section")
        tab.wait("document.activeElement.innerText.startsWith('Call ')")
        line = next(
            number
            for number, text in enumerate(stack.policies["src"].read_text().splitlines(), 1)
            if "mrAggregated" in text
        )
        tab.see(f"Line {line} of the policy: ", "section")
        assert tab.run("document.querySelectorAll('svg[role=img] .arrow.denied').length") == 1
        check_accessible(tab)
        before = stack.policies["src"].read_text()
        tab.tab_to("Allow this")
        tab.press("Enter")
        tab.see(f'+      "0x{stack.description["kms"]["src"]["mr_aggregated"]}"', ".diff")
        assert stack.policies["src"].read_text() == before
        tab.tab_to("Change the policy of kms-src")
        tab.press("Enter")
        tab.see("The policy allows it now", "section")
        assert stack.rpc("kms-src", "Onboard.Bootstrap", {"domain": name})[0] == 200
        tab.see("Bootstrap", ".windowed")
        tab.wait("[...document.querySelectorAll('.item')].at(-1).innerText.includes('200')")
        tab.open("about:blank")
        tab.requests.clear()


def test_policy_that_changed_since_is_not_overwritten(stack: RunningStack, tab: Tab) -> None:
    control_call(stack, "POST", "/policies/src/deny", '{"guest": "app"}')
    stack.curl(f"{stack.services['control']}/guests/app/boot", "-H", "Content-Type: application/json", "-d", "{}")
    open_page(tab, stack, "calls")
    tab.tab_to("Calls, the newest last")
    tab.press("ArrowUp", "Enter")
    tab.tab_to("Allow this")
    tab.press("Enter")
    control_call(stack, "POST", "/policies/src/deny", '{"guest": "kms-dst"}')
    changed = stack.policies["src"].read_text()
    tab.tab_to("Change the policy of kms-src")
    tab.press("Enter")
    tab.see("The policy has changed since", "section")
    assert stack.policies["src"].read_text() == changed


def test_picture_of_a_call_is_saved_and_copied_as_the_command_prints_it(
    stack: RunningStack, tab: Tab, tmp_path: Path
) -> None:
    stack.curl(f"{stack.services['app']}/GetQuote?report_data=zz")
    open_page(tab, stack, "calls")
    tab.tab_to("Calls, the newest last")
    tab.press("ArrowUp", "Enter")
    own = {"browserContextId": tab.send("Target.getTargetInfo")["targetInfo"]["browserContextId"]}
    tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), **own)
    tab.tab_to("Save the picture")
    tab.press("Enter")
    tab.see("Saved as call-")
    name = tab.run("document.querySelector('main').innerText.match(/Saved as (call-\\d+\\.svg)/)[1]")
    number = name.removeprefix("call-").removesuffix(".svg")
    journal = f"{stack.services['control']}/journal/{number}"
    kept, end = tmp_path / name, time.monotonic() + TIMEOUT
    while not kept.exists() and time.monotonic() < end:
        tab.run("new Promise((resolve) => setTimeout(resolve, 20))")
    assert kept.read_text() == stack.curl(f"{journal}/svg")[1]
    tab.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"], **own)
    tab.tab_to("Copy as Mermaid")
    tab.press("Enter")
    tab.see("Copied")
    assert tab.run("navigator.clipboard.readText()") == f"```mermaid\n{stack.curl(f'{journal}/mermaid')[1]}```\n"
    tab.send("Browser.setPermission", permission={"name": "clipboard-write"}, setting="denied", **own)
    tab.tab_to("Copy as Mermaid")
    tab.press("Enter")
    tab.wait("document.querySelector('textarea[readonly]').value.startsWith('```mermaid\\nsequenceDiagram')")


def test_calls_are_found_by_service_rpc_outcome_and_app(stack: RunningStack, tab: Tab) -> None:
    stack.curl(f"{stack.services['app']}/GetQuote?report_data=00")
    stack.curl(f"{stack.services['app']}/GetQuote?report_data=zz")
    open_page(tab, stack, "calls")
    tab.see("GetQuote", ".windowed")
    app = stack.description["app"]["app_id"]
    tab.wait("document.getElementById('filter-service').options.length > 3")
    assert tab.run("document.getElementById('filter-service').value") == ""  # names that are offered choose nothing
    for field, value, found in (
        ("call", "getquote", {"GetQuote"}),
        ("outcome", "refused", {"GetQuote"}),
        ("service", "auth-dst", {"Onboard", "GetAttestationInfo"}),
        ("app", f"0x{app}", {"Boot"}),
        ("call", "nothing", set()),
    ):
        control = f"document.getElementById('filter-{field}')"
        tab.wait(f"{control}.tagName === 'INPUT' || {control}.options.length > 3")
        tab.run(f"{control}.value = '{value}', {control}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        shown = tab.run("[...document.querySelectorAll('.item .what')].map((each) => each.innerText.split(' ').at(-1))")
        assert set(shown) == found, (field, value)
        tab.run("[...document.querySelectorAll('form button')].find((each) => each.innerText === 'Show all').click()")
    stack.curl(f"{stack.services['app']}/prpc/%3Cimg%20src=x%3E?json")
    tab.see("<img src=x>", ".windowed")
    assert tab.run("document.querySelectorAll('main img').length") == 0


def test_hundred_thousand_calls_stay_usable(tab: Tab) -> None:
    def calls(first: int, last: int) -> Callable[[Stack], None]:
        def record(stack: Stack) -> None:
            for index in range(first, last):
                journal = stack.control.journal
                journal.end(journal.begin("app", f"Call{index}", None, 0, "outside"), 200)

        return record

    with LiveStack(journal_size=110_000, fresh=True) as stack:
        stack.in_thread(calls(0, 100_000))
        tab.open(f"{stack.services['control']}/console/#/calls")
        tab.see("500 of 500 calls", "main")
        button = "[...document.querySelectorAll('button')].find((each) => each.innerText.startsWith('Load older'))"
        while not tab.run(f"{button}.hidden"):
            tab.run(f"{button}.click()")
            tab.wait(f"{button}.hidden || !{button}.disabled")
        tab.wait("parseInt(document.querySelector('.note').innerText) >= 100_000")
        assert tab.run("document.querySelectorAll('.item').length") < 60
        tab.tab_to("Calls, the newest last")
        tab.press("Home")
        tab.see("Call0", ".windowed")
        tab.press("End")
        tab.see("Call99999", ".windowed")
        for first in range(100_000, 102_500, 500):
            stack.in_thread(calls(first, first + 500))
            tab.see(f"Call{first + 499}", ".windowed")
        tab.see("older ones were dropped here", ".note")
        assert tab.run("performance.memory.usedJSHeapSize") < 200 * 2**20
        tab.open("about:blank")
        tab.requests.clear()


# ---- policies


def test_policy_is_checked_while_it_is_typed_saved_and_reverted(stack: RunningStack, tab: Tab) -> None:
    file = stack.policies["src"]
    before = json.loads(file.read_text())
    open_page(tab, stack, "policies")
    tab.see("Nothing.")
    tab.tab_to("Policy (JSON)")
    tab.run("document.activeElement.setSelectionRange(0, 0)")
    tab.write("x")
    tab.see("Line 1: not JSON", "ul[aria-label=Problems]")
    assert tab.run("[...document.querySelectorAll('button')].find((each) => each.innerText === 'Save').disabled")
    check_accessible(tab)
    set_text(tab, json.dumps(before | {"osImage": [HOSTILE]}))
    tab.see("osImage: nothing reads this key, did you mean osImages?", "ul[aria-label=Problems]")
    set_text(tab, json.dumps(before | {"osImages": 1}))
    tab.see("Save all the same: it denies everyone")
    set_text(tab, json.dumps(before | {"apps": {}, "$note": HOSTILE}))
    tab.see(f'+  "$note": {json.dumps(HOSTILE)}', ".diff")
    assert json.loads(file.read_text()) == before
    tab.tab_to("Save")
    tab.press("Enter")
    tab.see("Saved: the next request reads it.")
    assert json.loads(file.read_text()) == before | {"apps": {}, "$note": HOSTILE}
    tab.run(
        "document.getElementById('policy-version').value = 'snapshot ready', "
        "document.getElementById('policy-version').dispatchEvent(new Event('change'))"
    )
    tab.see('-  "$note"', ".diff")
    tab.tab_to("Save")
    tab.press("Enter")
    tab.see("Saved: the next request reads it.")
    assert json.loads(file.read_text()) == before
    assert tab.run("document.querySelectorAll('main img, main b').length") == 0


def set_text(tab: Tab, text: str) -> None:
    """Replace the text of the editor, as by typing."""
    tab.run("document.getElementById('policy-text').select()")
    tab.write(text)


def test_policy_that_somebody_else_changes_is_not_overwritten_unseen(stack: RunningStack, tab: Tab) -> None:
    before = json.loads(stack.policies["src"].read_text())
    open_page(tab, stack, "policies/src")
    tab.see("Nothing.")
    set_text(tab, json.dumps(before | {"gatewayAppId": "mine"}))
    tab.see('+  "gatewayAppId": "mine"', ".diff")
    theirs = before | {"gatewayAppId": "theirs"}
    control_call(stack, "PUT", "/policies/src", json.dumps(theirs))
    tab.tab_to("Save")
    tab.press("Enter")
    tab.see("The file has changed meanwhile")
    tab.see('-  "gatewayAppId": "theirs"', ".diff")
    assert json.loads(stack.policies["src"].read_text()) == theirs
    tab.tab_to("Save")
    tab.press("Enter")
    tab.see("Saved: the next request reads it.")
    assert json.loads(stack.policies["src"].read_text())["gatewayAppId"] == "mine"


def test_app_is_revoked_and_allowed_again_by_a_button(stack: RunningStack, tab: Tab) -> None:
    boot = (f"{stack.services['control']}/guests/app/boot", "-H", "Content-Type: application/json", "-d", "{}")
    open_page(tab, stack, "policies/src")
    tab.wait("document.getElementById('policy-guest')")
    tab.run("document.getElementById('policy-guest').value = 'app'")
    for button, said, status in (("Deny it", "does not allow app now", 403), ("Allow it", "allows app now", 200)):
        tab.tab_to(button)
        tab.press("Enter")
        tab.see(said)
        assert stack.curl(*boot)[0] == status


# ---- faults, clock, platforms


def boot_app(stack: RunningStack) -> tuple[int, str]:
    url = f"{stack.services['control']}/guests/app/boot"
    return stack.curl(url, "-H", "Content-Type: application/json", "-d", "{}")


def test_fault_is_put_in_force_met_and_lifted(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "conditions")
    tab.see("Start kms-src anew")
    check_accessible(tab)
    tab.tab_to("A webhook that decides the opposite, once")
    tab.press("Enter")
    tab.see("kind decision", "tbody")
    assert boot_app(stack)[0] == 403
    tab.see("1, spent", "tbody")
    tab.run("document.getElementById('fault-service').value = 'kms-src'")
    tab.tab_to("call (RPC or path)")
    tab.write("GetNothing")
    tab.press("Enter")
    tab.see("'GetNothing'", "[role=alert]:not(:empty)")  # in the stack's words
    tab.run("document.getElementById('fault-call').value = ''")
    tab.tab_to("status")
    tab.write("418")
    tab.press("Enter")
    tab.see("status 418", "tbody")
    status, answer = boot_app(stack)
    assert (status, "418" in answer) == (403, True)
    tab.tab_to("Lift all faults")
    tab.press("Enter")
    tab.wait("document.querySelector('tbody').children.length === 0")
    assert boot_app(stack)[0] == 200


def test_each_scenario_has_the_effect_that_it_names_and_is_undone_by_the_same_button(
    stack: RunningStack, tab: Tab
) -> None:
    open_page(tab, stack, "conditions")
    tab.wait("document.querySelectorAll('.scenarios li:not([hidden])').length > 10")
    count = tab.run("document.querySelectorAll('.scenarios li:not([hidden])').length")
    policy = stack.policies["src"].read_text()
    for number in range(1, count + 1):
        card = f".scenarios li:nth-child({number})"
        title, says = tab.text(f"{card} h3"), tab.text(f"{card} code")
        tab.run(f"document.querySelector({f'{card} button'!r}).focus()")
        assert tab.focused() == f"Begin: {title}"
        tab.press("Enter")
        tab.wait(f"document.querySelector({f'{card} button'!r}).innerText === 'Undo'")
        answer = boot_app(stack)
        assert (answer[0], says in answer[1]) == (403 if says else 200, True), (title, answer)
        assert "in force" in tab.text(card)
        tab.wait(f"!document.querySelector({f'{card} button'!r}).disabled")
        tab.run(f"document.querySelector({f'{card} button'!r}).focus()")
        tab.press("Enter")
        tab.wait(f"document.querySelector({f'{card} button'!r}).innerText === 'Begin'")
        tab.wait(f"!document.querySelector({f'{card} button'!r}).disabled")
        assert boot_app(stack)[0] == 200, title
    assert json.loads(stack.policies["src"].read_text()) == json.loads(policy)
    assert json.loads(stack.curl(f"{stack.services['control']}/faults")[1]) == []
    assert json.loads(stack.curl(f"{stack.services['control']}/clock")[1])["touched"] is False


def test_scenario_that_somebody_else_began_is_seen_and_undone(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "conditions")
    control_call(stack, "POST", "/policies/src/deny", '{"guest": "app"}')
    tab.see("in force", ".scenarios")
    tab.tab_to("Boot the app by kms-src")
    tab.press("Enter")
    tab.see(" What happened in call")
    tab.tab_to("Undo: The app is revoked")
    tab.press("Enter")
    tab.see("Undone: The app is revoked.")
    tab.run("[...document.querySelectorAll('main a')].find((each) => each.innerText.includes('What happened')).click()")
    tab.see("auth-src denied it: app not registered", "section")
    assert boot_app(stack)[0] == 200


def test_clock_leaps_by_one_button(stack: RunningStack, tab: Tab) -> None:
    control_call(stack, "POST", "/clock", '{"freeze": "2026-06-01T00:00:00Z"}')
    open_page(tab, stack, "conditions")
    tab.see("2026-06-01T00:00:00Z, frozen")
    for label, then in (("An hour on", "06-01T01"), ("A day on", "06-02T01"), ("30 days on", "07-02T01")):
        tab.tab_to(label)
        tab.press("Enter")
        tab.see(f"2026-{then}:00:00Z, frozen")


def test_clock_and_platform_are_changed(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "conditions")
    tab.tab_to("Time or duration")
    tab.write("2027-01-02T03:04:05Z")
    tab.tab_to("Freeze")
    tab.press("Enter")
    tab.see("2027-01-02T03:04:05Z, frozen")
    tab.tab_to("Follow the system clock")
    tab.press("Enter")
    tab.see("running, changed" if "running, changed" in tab.text() else "as the system clock")
    control = stack.services["control"]
    names = list(json.loads(stack.curl(f"{control}/platforms")[1]))
    prefix = f"platform {names.index('host of app')}"
    tab.run(f"document.getElementById('{prefix} tcb_status').value = 'OutOfDate'")
    tab.run(f"document.getElementById('{prefix} advisory_ids').value = 'INTEL-SA-00001, {HOSTILE}'")
    tab.run(f"document.getElementById('{prefix} tcb_status').form.requestSubmit()")
    tab.see("Changed: the next quotes and documents have it.")
    state = json.loads(stack.curl(f"{control}/platforms/host%20of%20app")[1])
    assert (state["tcb_status"], state["advisory_ids"]) == ("OutOfDate", ["INTEL-SA-00001", HOSTILE])
    assert boot_app(stack)[0] == 403
    open_page(tab, stack, "conditions")
    tab.see("Start kms-src anew")
    assert tab.run(f"document.getElementById('{prefix} advisory_ids').value") == f"INTEL-SA-00001, {HOSTILE}"
    assert tab.run("document.querySelectorAll('main img, main b').length") == 0


# ---- snapshots


def test_snapshot_is_taken_and_reverted(stack: RunningStack, tab: Tab) -> None:
    before = stack.policies["src"].read_text()
    open_page(tab, stack, "snapshots")
    tab.tab_to("Name")
    tab.write(HOSTILE)
    tab.press("Enter")
    tab.see("name: String should match pattern", "[role=alert]:not(:empty)")
    tab.run("document.getElementById('snapshot-name').value = ''")
    tab.write("before")
    tab.press("Enter")
    tab.see("before is taken.")
    check_accessible(tab)
    control_call(stack, "POST", "/policies/src/deny", '{"guest": "app"}')
    tab.tab_to("Compare before")
    tab.press("Enter")
    tab.see("policy of kms-src", "section")
    assert tab.focused() == "From before to the present state"
    assert "composeHashes" in tab.text("section .diff .removed + .removed")
    tab.run("document.querySelector('section details').open = true")
    tab.see("/policies/src/apps", "section")
    tab.tab_to("Go back to before")
    tab.press("Enter")
    tab.see("The stack is as it was in before.")
    assert stack.policies["src"].read_text() == before
    tab.tab_to("Delete before")
    tab.press("Enter")
    tab.see("is deleted.")
    assert json.loads(stack.curl(f"{stack.services['control']}/snapshots")[1]) == ["ready"]
    assert tab.run("document.querySelectorAll('main img, main b').length") == 0
