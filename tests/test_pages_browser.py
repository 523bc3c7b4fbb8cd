"""The pages of KMS, guest agent, VMM and gateway in a real Chromium: one product with the console, and for everyone.

It runs if DSTACK_EMU_BROWSER is set (`make browser`).
"""

import os
from collections.abc import Iterator
from typing import Final

import pytest

from dstack_emu.transport.html import content_security_policy, page, style_sheet, table
from tests.axe import violations
from tests.browser import Browser, Tab
from tests.console import control_call
from tests.running import RunningStack, running_stack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]

PAGES: Final = {
    "setup": "A fresh dstack KMS",
    "kms-src": "A dstack KMS",
    "app": "app (EMULATED)",
    "agent-src": "kms-src (EMULATED)",
    "vmm": "(EMULATED)",
    "gateway-admin": "dstack gateway 1 (EMULATED)",
}
"""The service that has each page (`setup`: that of a KMS without keys), and its heading."""
# Everything that makes two pages look alike: colours, letters, and the bar at the top.
LOOK: Final = """
[['body', 'backgroundColor', 'color', 'fontFamily', 'fontSize'], ['header', 'backgroundColor', 'borderBottom'],
 ['header .name', 'fontWeight'], ['header .name strong', 'color'], ['main h1', 'fontSize', 'fontWeight']]
.map(([selector, ...names]) => {
  const style = getComputedStyle(document.querySelector(selector));
  return names.map((name) => style[name]);
})
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[RunningStack]:
    """A stack whose KMS have no keys."""
    with running_stack("--fresh") as stack:
        yield stack


@pytest.fixture
def tab(browser: Browser) -> Tab:
    """An empty page that accepts the emulated certificates."""
    tab = browser.tab()
    tab.send("Security.setIgnoreCertificateErrors", ignore=True)
    return tab


def look(tab: Tab, *, dark: bool) -> object:
    tab.resize(1280, 900, dark=dark)
    return tab.run(LOOK)


def open_page(tab: Tab, stack: RunningStack, fresh: RunningStack, name: str) -> None:
    service, of = ("kms-src", fresh) if name == "setup" else (name, stack)
    tab.open(of.services[service] + "/")
    tab.see(PAGES[name], "h1")
    if name == "setup":
        tab.see(fresh.description["kms"]["src"]["mr_aggregated"], "#measured")


@pytest.mark.parametrize("name", list(PAGES))
def test_page_looks_like_the_console_and_can_be_used_by_everyone(
    full_stack: RunningStack, fresh: RunningStack, tab: Tab, name: str
) -> None:
    tab.open(f"{full_stack.services['control']}/console/")
    tab.see("connected", "#connection")
    wanted = {dark: look(tab, dark=dark) for dark in (False, True)}
    open_page(tab, full_stack, fresh, name)
    tab.requests.clear()
    for dark in (False, True):
        assert look(tab, dark=dark) == wanted[dark]
        for width, height, mobile in ((1280, 900, False), (640, 450, False), (360, 640, True)):
            tab.resize(width, height, dark=dark, mobile=mobile)
            assert violations(tab) == []
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), width
    assert wanted[False] != wanted[True]
    assert tab.unnamed() == []
    assert "protects nothing" in tab.text("header")
    assert tab.complaints == []  # of the Content-Security-Policy, too
    assert tab.requests == []  # it loads nothing


def test_kms_is_set_up_by_the_keyboard(fresh: RunningStack, full_stack: RunningStack, tab: Tab) -> None:
    control_call(fresh, "POST", "/policies/dst/allow", '{"guest": "kms-dst"}')
    tab.open(fresh.services["kms-dst"] + "/")
    tab.see(fresh.description["kms"]["dst"]["mr_aggregated"], "#measured")
    tab.tab_to("Bootstrap")
    tab.press("Enter")
    tab.see("k256_pubkey", "#bootstrap")
    tab.tab_to("Finish")
    tab.press("Enter")
    tab.see("Finished.", "#finished")
    assert tab.complaints == []
    fresh.reset()


def test_markup_in_names_stays_text(full_stack: RunningStack, tab: Tab) -> None:
    hostile = '<img src=x onerror="alert(1)"><b>bold</b>'
    compose = '{"manifest_version": 2, "name": "<b>bold</b><img src=x>", "runner": "docker-compose"}'
    body = '{"name": "hostile", "compose": ' + _json(compose) + "}"
    control_call(full_stack, "POST", "/guests", body)
    url = full_stack.curl(f"{full_stack.services['control']}/guests/hostile")[1].split('"url": "')[1].split('"')[0]
    tab.open(url + "/")
    tab.see("<b>bold</b><img src=x> (EMULATED)", "h1")
    assert tab.run("document.querySelectorAll('main b, main img').length") == 0
    shown = page(hostile, hostile, table(hostile, [hostile], [[hostile]], ""))
    assert "<img" not in shown
    assert "<b>" not in shown
    assert tab.complaints == []


def _json(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def test_style_is_one_file_and_the_policy_names_its_hash(full_stack: RunningStack) -> None:
    control = full_stack.services["control"]
    assert full_stack.curl(f"{control}/console/style.css") == (200, style_sheet())
    for name in ("app", "vmm", "gateway-admin"):
        status, answer = full_stack.curl(full_stack.services[name] + "/", "-i", "-H", "Accept: text/html")
        assert (status, f"<style>{style_sheet()}</style>" in answer.replace("\r", "")) == (200, True)
        assert f"Content-Security-Policy: {content_security_policy()}" in answer.replace("\r", "")
