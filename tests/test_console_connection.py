"""The console beside a stack that is busier than the page, that ends, and that starts again.

It runs if DSTACK_EMU_BROWSER is set (`make browser`).
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dstack_emu import Stack
from dstack_emu.testing import LiveStack
from tests.browser import Tab
from tests.running import running_stack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]
MISSED = r"/^connected; (\d+) calls were missed$/.exec(document.getElementById('connection').innerText)"

HELD = """{
  const send = window.fetch, released = new Promise((resolve) => { window.release = resolve; });
  window.fetch = async (target, ...others) => {
    if (String(target.url ?? target).includes("/journal/stream")) {
      window.asked = true;
      await released;
    }
    return send(target, ...others);
  };
}"""
"""The page's next requests for the journal's stream wait until `release` is called."""


@pytest.fixture
def tab(console_tab: Tab) -> Tab:
    """An empty page."""
    return console_tab


def calls(first: int, last: int) -> Callable[[Stack], None]:
    """Make what records calls of those numbers in a stack."""

    def record(stack: Stack) -> None:
        for index in range(first, last):
            journal = stack.control.journal
            journal.end(journal.begin("app", f"Call{index}", None, 0, "outside"), 200)

    return record


def test_page_that_calls_overtake_says_how_many_it_missed_and_continues(tab: Tab) -> None:
    with LiveStack(fresh=True) as stack:
        tab.open(f"{stack.services['control']}/console/#/calls")
        tab.see("connected", "#connection")
        stack.in_thread(calls(1, 6001))  # nobody can read meanwhile: the stack keeps 1000 for a follower
        tab.wait(MISSED)
        missed = int(tab.run(f"{MISSED}[1]"))
        assert missed == 5000
        tab.see("5000 are missing: this page read more slowly than calls ended", ".note")
        tab.see("Call6000", ".windowed")
        stack.in_thread(calls(6001, 6101))
        tab.see("Call6100", ".windowed")
        assert int(tab.run(f"{MISSED}[1]")) == 5000
        tab.open("about:blank")
        tab.requests.clear()


def test_page_says_how_many_calls_ended_before_its_stream_began_and_are_gone(tab: Tab) -> None:
    with LiveStack(fresh=True) as stack:
        tab.open(f"{stack.services['control']}/console/#/calls")
        stack.in_thread(calls(0, 1))
        tab.see("Call0", ".windowed")
        tab.run(HELD)
        tab.run("document.dispatchEvent(new Event('resume'))")  # the page reads the journal anew, then its stream
        tab.wait("window.asked")
        stack.in_thread(calls(1, 6001))  # the stack keeps 2000
        tab.run("window.release()")
        tab.wait(MISSED)
        assert int(tab.run(f"{MISSED}[1]")) == 4000
        tab.see("Call6000", ".windowed")
        tab.open("about:blank")
        tab.requests.clear()


def test_page_connects_again_to_the_stack_that_starts_again(tab: Tab, tmp_path: Path) -> None:
    with running_stack("--fresh", "--state", str(tmp_path)) as first:
        control = first.services["control"]
        tab.open(f"{control}/console/#/calls")
        tab.see("connected", "#connection")
        for _ in range(3):
            first.curl(f"{first.services['agent-src']}/prpc/Version?json")
        tab.wait("document.querySelectorAll('.item').length >= 3")
    tab.see("not connected: the stack", "#connection")
    port = control.rpartition(":")[2]
    with running_stack("--fresh", "--state", str(tmp_path), "--port", f"control={port}") as second:
        tab.wait("document.getElementById('connection').innerText === 'connected'")
        second.curl(f"{second.services['agent-src']}/prpc/Nothing?json")
        tab.see("Nothing", ".windowed")
        assert "Version" not in tab.text(".windowed")  # its calls are those of this stack
        tab.complaints.clear()  # a refused connection is an error in Chromium's console
        tab.open("about:blank")
        tab.requests.clear()


def test_page_that_was_frozen_in_the_background_catches_up(tab: Tab) -> None:
    with LiveStack(fresh=True) as stack:
        tab.open(f"{stack.services['control']}/console/#/calls")
        tab.see("connected", "#connection")
        tab.run("import('/console/journal.js').then(({journal}) => { window.journal = journal; })")
        tab.send("Page.setWebLifecycleState", state="frozen")
        stack.in_thread(calls(1, 301))
        tab.send("Page.setWebLifecycleState", state="active")
        # It stays hidden in a browser without windows, and so draws nothing.
        tab.wait("journal.entries.at(-1)?.call === 'Call300'")
        stack.in_thread(calls(301, 302))
        tab.wait("journal.entries.at(-1).call === 'Call301'")
        tab.wait("document.getElementById('connection').textContent === 'connected'")
        tab.open("about:blank")
        tab.requests.clear()
