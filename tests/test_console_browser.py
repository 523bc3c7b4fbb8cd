"""The console in a real Chromium, over real stacks: by keyboard, and with hostile names.

It runs if DSTACK_EMU_BROWSER is set (`make browser`): starting a browser takes seconds.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, Tab, chromium, program
from tests.running import RunningStack, running_stack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
    pytest.mark.timeout(240),
]

PICTURES = os.environ.get("DSTACK_EMU_PICTURES")
"""A folder for a picture of each page; none are made without it."""
HOSTILE = '<img src=x onerror="alert(1)"><b>bold</b>'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for the file."""
    if program() is None:
        pytest.fail("DSTACK_EMU_BROWSER is set, but there is no Chromium: install Debian's chromium-headless-shell")
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def running() -> Iterator[RunningStack]:
    """One stack for the file."""
    with running_stack("--vmm") as stack:
        yield stack


@pytest.fixture
def stack(running: RunningStack) -> Iterator[RunningStack]:
    """The same, as it became ready."""
    yield running
    running.reset()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """An empty page, which must have asked nobody but the stack, and complained of nothing."""
    tab = browser.tab()
    tab.resize(1280, 900)
    yield tab
    assert tab.complaints == []
    assert {url.split("/")[2] for url in tab.requests if url.startswith("http")} <= {tab.run("location.host")}


def control_call(stack: RunningStack, method: str, path: str, body: str = "{}") -> None:
    content = ("-H", "Content-Type: application/json", "-d", body)
    status, answer = stack.curl(stack.services["control"] + path, "-X", method, *content)
    assert status == 200, answer


def open_page(tab: Tab, stack: RunningStack, page: str) -> None:
    tab.open(f"{stack.services['control']}/console/#/{page}")
    tab.see("connected", "#connection")


def check_accessible(tab: Tab, name: str) -> None:
    """Everything that takes the focus has a name, and the page fits at 200 % and on a phone."""
    assert tab.unnamed() == []
    if PICTURES:
        tab.screenshot(Path(PICTURES, f"console-{name}.png"))
    for width, dark in ((640, False), (390, True)):  # 1280 at 200 %, and a phone
        tab.resize(width, 800, dark=dark)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than {width}"
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
    check_accessible(tab, "stack")


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
        tab.write("another")
        tab.press("Enter")
        tab.see("The stack has another token.", "dialog[open]")
        tab.run("document.getElementById('token').value = ''")
        tab.write(token)
        tab.press("Enter")
        tab.see("connected", "#connection")
        tab.see("onboard phase", "main")
        tab.run("location.reload()")
        tab.see("onboard phase", "main")  # without asking again
        assert not tab.run("document.getElementById('login').open")
        assert not any(token in url for url in tab.requests)
        assert token not in tab.run("location.href") + tab.text()
        other = browser.tab()  # nobody else's
        other.open(f"{stack.services['control']}/console/")
        other.see("This stack demands a token", "dialog[open]")
        tab.open("about:blank")
        other.open("about:blank")
        tab.requests.clear()
        tab.complaints.clear()  # a refused request is an error in Chromium's console
