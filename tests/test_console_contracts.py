"""The contracts of a stack's chain in the console, in a real Chromium: what they hold, and transactions from the pages.

It runs if DSTACK_EMU_BROWSER is set (`make browser`).
"""

import json
import os
from collections.abc import Iterator

import pytest

from tests.axe import violations
from tests.browser import Tab
from tests.console import control_call, open_page
from tests.running import RunningStack, running_stack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]


@pytest.fixture(scope="module")
def running_with_chain() -> Iterator[RunningStack]:
    """One stack whose chain decides."""
    with running_stack("--auth", "eth") as stack:
        yield stack


@pytest.fixture
def stack(running_with_chain: RunningStack) -> Iterator[RunningStack]:
    """The same, as it became ready."""
    yield running_with_chain
    running_with_chain.reset()


@pytest.fixture
def tab(console_tab: Tab) -> Tab:
    """An empty page."""
    return console_tab


def boot(stack: RunningStack) -> tuple[int, str]:
    content = ("-H", "Content-Type: application/json", "-d", "{}")
    return stack.curl(f"{stack.services['control']}/guests/app/boot", *content)


def test_boot_that_contracts_refused_is_allowed_by_a_transaction_from_the_call(stack: RunningStack, tab: Tab) -> None:
    compose_hash = "0x" + stack.description["app"]["compose_hash"]
    control_call(stack, "POST", "/chain/remove", json.dumps({"kind": "compose-hash", "value": compose_hash}))
    assert "Compose hash not allowed" in boot(stack)[1]
    open_page(tab, stack, "calls")
    tab.tab_to("Calls, the newest last")
    tab.press("ArrowUp", "Enter")
    tab.see("The rule app compose hash: composeHash", "section")
    tab.see("It looks at allowedComposeHashes of 0x", "section")
    assert violations(tab) == []
    tab.tab_to("Allow this")
    tab.press("Enter")
    tab.see(f"+{compose_hash}", ".diff")
    assert boot(stack)[0] == 403
    tab.tab_to("Send the transaction")
    tab.press("Enter")
    tab.see("The contracts allow it now: the next request asks them.", "section")
    tab.see("app: denied: Compose hash not allowed before, allowed after it", "section")
    assert boot(stack)[0] == 200


def test_transactions_of_a_call_are_not_sent_if_there_are_others_since(stack: RunningStack, tab: Tab) -> None:
    act = json.dumps({"kind": "compose-hash", "value": stack.description["app"]["compose_hash"]})
    control_call(stack, "POST", "/chain/remove", act)
    boot(stack)
    open_page(tab, stack, "calls")
    tab.tab_to("Calls, the newest last")
    tab.press("ArrowUp", "Enter")
    tab.tab_to("Allow this")
    tab.press("Enter")
    control_call(stack, "POST", "/chain/app-set", '{"setting": "allow-any-device", "value": false}')
    tab.tab_to("Send the transaction")
    tab.press("Enter")
    tab.see("The chain has other transactions since", "section")
    assert "Compose hash not allowed" in boot(stack)[1]


def test_app_is_revoked_by_a_transaction_that_the_page_of_policies_sends(stack: RunningStack, tab: Tab) -> None:
    compose_hash = stack.description["app"]["compose_hash"]
    open_page(tab, stack, "policies")
    tab.see("app: allowed")
    tab.see(f"0x{compose_hash} (app)")
    tab.see("deployAndRegisterApp")
    tab.see("ComposeHashAdded")
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for width, dark in ((1280, False), (640, True), (360, False)):
        tab.resize(width, 800, dark=dark)
        assert violations(tab) == []
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    tab.resize(1280, 900)
    tab.tab_to(f"Remove compose-hash 0x{compose_hash}")
    tab.press("Enter")
    tab.see("app: allowed before, denied: Compose hash not allowed after it", "section")
    assert boot(stack)[0] == 200  # nothing has been sent
    tab.wait("document.activeElement.innerText === 'What remove would do'")
    tab.tab_to("Send the transaction")
    tab.press("Enter")
    tab.see("Sent: compose-hash", "section")
    tab.see("app: denied, Compose hash not allowed")
    tab.see("removeComposeHash(composeHash")
    assert "Compose hash not allowed" in boot(stack)[1]


@pytest.mark.parametrize("title", ["The app is revoked", "kms-src is revoked"])
def test_scenario_is_begun_and_undone_by_transactions(stack: RunningStack, tab: Tab, title: str) -> None:
    open_page(tab, stack, "conditions")
    tab.see("A transaction removes", ".scenarios")
    card = f"[...document.querySelectorAll('.scenarios li')].find((each) => each.innerText.startsWith('{title}'))"
    says = tab.run(f"{card}.querySelector('code').innerText")
    for button, status in (("Begin", 403), ("Undo", 200)):
        tab.run(f"{card}.querySelector('button').focus()")
        assert tab.focused() == f"{button}: {title}"
        tab.press("Enter")
        tab.see(f"{'In force' if button == 'Begin' else 'Undone'}: {title}.", "main")
        answer = boot(stack)
        assert (answer[0], says in answer[1]) == (status, status == 403)


def test_form_of_an_act_says_what_is_wrong_and_sends_what_was_confirmed(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "policies")
    tab.see("Allow an entry of a list")
    tab.tab_to("Allow an entry of a list")
    tab.press("Enter")
    tab.tab_to("kind")
    tab.run("document.activeElement.value = 'os-image'")
    tab.tab_to("value")
    tab.write("11")
    tab.press("Enter")
    tab.see("value: 32 bytes in hex expected", "form[aria-label='Allow an entry of a list'] .alert")
    tab.wait("document.getElementById('allow value').getAttribute('aria-invalid') === 'true'")
    tab.run("document.getElementById('allow value').value = ''")
    tab.write("11" * 32)
    tab.run("document.getElementById('allow sender').selectedIndex = 2")
    tab.press("Enter")
    tab.see("OwnableUnauthorizedAccount(0x", "form[aria-label='Allow an entry of a list'] .alert")
    tab.run("document.getElementById('allow sender').selectedIndex = 0")
    tab.press("Enter")
    tab.see(f"os-image 0x{'11' * 32}: not allowed before, allowed after it.", "section")
    tab.tab_to("Send the transaction")
    tab.press("Enter")
    tab.see("Sent: os-image", "section")
    tab.wait(f"document.querySelector('[aria-label=\"Remove os-image 0x{'11' * 32}\"]')")
