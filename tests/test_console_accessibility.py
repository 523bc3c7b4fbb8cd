"""The console for everyone: by axe-core, by the keyboard alone, with a screen reader, enlarged, and on a phone.

It runs if DSTACK_EMU_BROWSER is set (`make browser`).
"""

import json
import os

import pytest

from tests.axe import violations
from tests.browser import Tab
from tests.console import CUT, PAGES, fill, open_filled, open_page
from tests.running import RunningStack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]

WINDOW, ENLARGED, PHONE = (1280, 900), (640, 450), (360, 640)
"""Sizes in CSS pixels; the second is the first at 200 %."""

# What takes a finger, except links within a text.
SMALL = """(least) =>
[...document.querySelectorAll('button, input, select, textarea, summary, nav a, [role=button], [role=option]')]
.filter((each) => each.getClientRects().length).filter((each) => {
  const {width, height} = each.getBoundingClientRect();
  return width < least || height < (each.matches('[role=option]') ? 24 : least);
}).map((each) => each.outerHTML.slice(0, 200))
"""
# How the focus is shown: an outline, or the border of a part in the picture.
LOOK = """
(() => {
  const each = document.activeElement, box = each.querySelector(':scope > .box'), style = getComputedStyle(each);
  const isOutlined = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
  const {left, top, right, bottom} = each.getBoundingClientRect();
  return {
    isEnd: each === document.body || each === document.documentElement,
    isShown: isOutlined || (box !== null && getComputedStyle(box).strokeWidth === '3px'),
    isInSight: right > 0 && bottom > 0 && left < innerWidth && top < innerHeight,
    isInOrder: !window.last || !!(window.last.compareDocumentPosition(each) & Node.DOCUMENT_POSITION_FOLLOWING),
    what: (window.last = each).outerHTML.slice(0, 150),
  };
})()
"""


@pytest.fixture
def stack(full_stack: RunningStack) -> RunningStack:
    """A stack in which every page has much to show."""
    fill(full_stack)
    return full_stack


@pytest.fixture
def tab(console_tab: Tab) -> Tab:
    """An empty page."""
    return console_tab


def pages(tab: Tab, stack: RunningStack) -> list[str]:
    open_page(tab, stack, "stack")
    return list(tab.run(PAGES))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_page_violates_a_rule_of_axe_at_any_size(stack: RunningStack, tab: Tab, dark: bool) -> None:
    for page in pages(tab, stack):
        tab.resize(*WINDOW, dark=dark)
        open_filled(tab, stack, page)
        for size in (WINDOW, ENLARGED, PHONE):
            tab.resize(*size, dark=dark, mobile=size is PHONE)
            assert violations(tab) == [], (page, size)


def test_everything_fits_enlarged_and_on_a_phone_and_is_large_enough_for_a_finger(
    stack: RunningStack, tab: Tab
) -> None:
    for page in pages(tab, stack):
        tab.resize(*WINDOW)
        open_filled(tab, stack, page)
        for size in (ENLARGED, PHONE):
            tab.resize(*size, mobile=size is PHONE)
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), (page, size)
            assert tab.run(CUT) == [], (page, size)
            assert tab.run(f"({SMALL})({44 if size is PHONE else 24})") == [], (page, size)


def test_focus_is_seen_at_each_stop_and_goes_through_each_page_in_its_order(stack: RunningStack, tab: Tab) -> None:
    for page in pages(tab, stack):
        open_filled(tab, stack, page)
        tab.run("document.getElementById('skip').focus(), window.last = null")
        tab.press("Shift")  # the keyboard is used
        stops = 0
        while not (look := tab.run(LOOK))["isEnd"]:
            assert (look["isShown"], look["isInSight"], look["isInOrder"]) == (True, True, True), (page, look)
            stops += 1
            tab.press("Tab")
        assert stops >= 1 + len(tab.run(PAGES)) + tab.run("document.querySelectorAll('main button:enabled').length")


def test_skip_link_leads_past_the_navigation(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "snapshots")
    tab.press("Tab")
    assert tab.focused() == "Skip to the content"
    tab.press("Enter")
    assert tab.run("document.activeElement.id") == "main"
    tab.press("Tab")
    assert tab.focused() == "Name"


def test_colours_that_the_system_forces_keep_focus_and_choice_visible(stack: RunningStack, tab: Tab) -> None:
    for page in pages(tab, stack):
        open_filled(tab, stack, page)
        tab.send("Emulation.setEmulatedMedia", features=[{"name": "forced-colors", "value": "active"}])
        assert tab.run("matchMedia('(forced-colors: active)').matches")
        assert tab.run("getComputedStyle(document.querySelector('nav [aria-current]')).outlineStyle") == "solid"
        if page == "calls":
            assert tab.run("getComputedStyle(document.querySelector('[aria-selected=true]')).outlineStyle") == "solid"
        assert violations(tab) == []
        tab.resize(*WINDOW)


def test_nothing_moves(stack: RunningStack, tab: Tab) -> None:
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    for page in pages(tab, stack):
        open_filled(tab, stack, page)
        assert tab.run("document.getAnimations().length") == 0
        moving = (
            "[...document.querySelectorAll('*')].filter((each) => getComputedStyle(each).scrollBehavior === 'smooth' "
        )
        assert tab.run(f"{moving} || getComputedStyle(each).transitionDuration !== '0s').length") == 0


def test_what_arrives_by_itself_is_not_announced(stack: RunningStack, tab: Tab) -> None:
    """A screen reader would read every call, and the time every three seconds."""
    watch = """
    window.said = [];
    for (const each of document.querySelectorAll('[role=status], [role=alert], [aria-live=polite]'))
      new MutationObserver(() => said.push(each.outerHTML))
        .observe(each, {childList: true, characterData: true, subtree: true});
    """
    for page in pages(tab, stack):
        open_filled(tab, stack, page)
        tab.run(watch)
        if page == "conditions":
            tab.run("window.time = document.querySelector('main p').innerText")
            tab.wait("document.querySelector('main p').innerText !== window.time")
        shown = {"stack": "tbody", "calls": ".note"}.get(page)  # where calls arrive
        before = tab.text(shown or "h1")
        stack.curl(f"{stack.services['app']}/GetQuote?report_data={page.encode().hex()}")
        if shown:
            tab.wait(f"document.querySelector('{shown}').innerText !== {json.dumps(before)}")
        assert tab.run("window.said") == [], page


def test_refusal_is_tied_to_the_field_that_it_is_about(stack: RunningStack, tab: Tab) -> None:
    told = """(() => {
      const {ariaInvalid, attributes} = document.activeElement, ids = attributes['aria-describedby'].value.split(' ');
      return [ariaInvalid, ids.map((id) => document.getElementById(id).innerText).join(' ')];
    })()"""
    open_page(tab, stack, "snapshots")
    tab.tab_to("Name")
    tab.write("<b>")
    tab.press("Enter")
    tab.see("String should match", "[role=alert]:not(:empty)")
    invalid, text = tab.run(told)
    assert (invalid, "String should match" in text) == ("true", True)
    open_page(tab, stack, "policies")
    tab.tab_to("Policy (JSON)")
    tab.wait("!document.activeElement.readOnly")  # it has its text
    tab.write("x")
    tab.wait("document.activeElement.ariaInvalid === 'true'")
    assert "not JSON" in tab.run(told)[1]
    open_page(tab, stack, "conditions")
    tab.see("Start kms-src anew")
    tab.tab_to("times (at most)")
    tab.write("-1")
    tab.press("Enter")
    tab.see("times: ", "[role=alert]:not(:empty)")
    assert tab.run("[...document.querySelectorAll('[aria-invalid=true]')].map((each) => each.id)") == ["fault-times"]
