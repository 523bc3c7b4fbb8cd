"""The console's pages in a tab, and a stack in which each of them has much to show."""

import http.client
from contextlib import closing
from typing import Final

from tests.browser import Tab
from tests.running import RunningStack

PAGES: Final = "[...document.querySelectorAll('nav a')].map((each) => each.dataset.page)"
"""The names of all pages, as an expression."""

# What is cut off, or reaches out of the page, though nothing scrolls there. Rows of the list of calls are left out:
# each shows a part of what the call shows in full.
CUT: Final = """
[...document.querySelectorAll('body *')].filter((each) => {
  if (each.closest('.skip, .unseen, .item, svg, option') || !each.getClientRects().length) return false;
  const {left, right} = each.getBoundingClientRect(), style = getComputedStyle(each);
  const isClipped = !each.matches('input, select') && /hidden|clip/.test(style.overflowX) &&
    each.scrollWidth > each.clientWidth + 1;
  const scrolls = each.parentElement.closest('.scroll, pre, textarea, .windowed');
  return isClipped || (!scrolls && (left < -1 || right > innerWidth + 1));
}).map((each) => each.outerHTML.slice(0, 200))
"""
_REFUSED: Final = "section[aria-label='The call'] .denial"


def control_call(stack: RunningStack, method: str, path: str, body: str = "{}") -> None:
    """Make a call of the control API that must succeed."""
    headers = {"Content-Type": "application/json"}
    with closing(
        http.client.HTTPConnection(stack.services["control"].removeprefix("http://"), timeout=20)
    ) as connection:
        connection.request(method, path, body.encode(), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()


def open_page(tab: Tab, stack: RunningStack, page: str) -> None:
    """Load a page of the console, and wait until it follows the journal."""
    tab.open(f"{stack.services['control']}/console/#/{page}")
    tab.see("connected", "#connection")


def fill(stack: RunningStack) -> None:
    """Give every page something to show: a refused boot, a fault that was met, a snapshot that differs."""
    control_call(stack, "POST", "/snapshots", '{"name": "before"}')
    control_call(stack, "POST", "/policies/src/deny", '{"guest": "app"}')
    control_call(stack, "POST", "/faults", '{"service": "auth-dst", "kind": "status", "status": 503}')
    stack.curl(f"{stack.services['control']}/guests/app/boot", "-H", "Content-Type: application/json", "-d", "{}")


def open_filled(tab: Tab, stack: RunningStack, page: str) -> None:
    """Load a page after `fill`, and open everything on it that can be opened."""
    open_page(tab, stack, page)
    tab.wait("document.querySelectorAll('main > div > *').length > 1")
    if page == "stack":
        tab.tab_to("kms-src, runtime phase")
        tab.press("Enter")
        tab.see("root-ca.crt", "section")
    elif page == "calls":
        outcome = "document.getElementById('filter-outcome')"
        tab.run(f"{outcome}.value = 'denied', {outcome}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        tab.tab_to("Calls, the newest last")
        tab.press("ArrowUp", "Enter")
        tab.wait(f"document.querySelector({_REFUSED!r})")
        tab.tab_to("Allow this")
        tab.press("Enter")
    elif page == "policies":
        tab.see("Nothing.")
        tab.run("document.getElementById('policy-text').select()")
        tab.write('{"osImage": [],}')
        tab.see("not JSON", "ul[aria-label=Problems]")
    elif page == "evidence":
        tab.run("location.hash = '#/evidence/guest/app'")
        tab.see("Who would admit it?")
        tab.tab_to("Allow this")
        tab.press("Enter")
    elif page == "conditions":
        tab.see("Start kms-src anew")
        tab.see("status 503", "tbody")
    elif page == "snapshots":
        tab.tab_to("Compare before")
        tab.press("Enter")
        tab.see("policy of kms-src", "section")
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
