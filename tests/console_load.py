"""`make console-load`: how fast the console is over a long journal, and beside a stack under load, in Chromium.

It prints figures, and judges none: they depend on the machine. A long task is one of more than 50 ms, during which the
page answers nobody.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dstack_emu import Stack
from dstack_emu.testing import LiveStack
from tests.browser import Tab, chromium

_LONG = (
    "window.long = []; new PerformanceObserver((list) => { for (const each of list.getEntries()) "
    "window.long.push(Math.round(each.duration)); }).observe({type: 'longtask', buffered: true})"
)
_OLDER = "[...document.querySelectorAll('button')].find((each) => each.innerText.startsWith('Load older'))"
_SCROLL = """(async () => {
  const list = document.querySelector('.windowed'), frames = [];
  let last = performance.now();
  for (let step = 0; step < 120; step += 1) {
    list.scrollTop = list.scrollHeight * (step % 2 ? step / 120 : 1 - step / 120);
    await new Promise((resolve) => requestAnimationFrame(resolve));
    frames.push(performance.now() - last);
    last = performance.now();
  }
  frames.sort((one, other) => one - other);
  return [Math.round(frames[60]), Math.round(frames[119])];
})()"""


def _calls(count: int, service: str = "app") -> Callable[[Stack], None]:
    def record(stack: Stack) -> None:
        journal = stack.control.journal
        for index in range(count):
            journal.end(journal.begin(service, f"Call{index}", None, 0, "outside"), 200)

    return record


def _say(name: str, value: object, unit: str) -> None:
    print(f"{name:<44} {value!s:>10} {unit}", flush=True)


def _heap(tab: Tab) -> float:
    tab.send("HeapProfiler.collectGarbage")
    return round(float(tab.send("Runtime.getHeapUsage")["usedSize"]) / 2**20, 1)


def _long_tasks(tab: Tab) -> str:
    tasks = tab.run("window.long.splice(0)")
    return f"{len(tasks)}, longest {max(tasks, default=0)} ms"


def measure(tab: Tab, stack: LiveStack, entries: int, seconds: float) -> None:
    """Print the figures of one page of calls."""
    stack.in_thread(_calls(entries))
    tab.send("Page.addScriptToEvaluateOnNewDocument", source=_LONG)
    began = time.monotonic()
    tab.open(f"{stack.services['control']}/console/#/calls")
    tab.see("of 500 calls", "main")
    _say("calls in the journal", entries, "")
    _say("until the list is shown", round(1000 * (time.monotonic() - began)), "ms")
    paint = "Math.round(performance.getEntriesByName('first-contentful-paint')[0].startTime)"
    _say("first paint", tab.run(paint), "ms")
    _say("long tasks until then", _long_tasks(tab), "")
    began = time.monotonic()
    while not tab.run(f"{_OLDER}.hidden"):
        tab.run(f"{_OLDER}.click()")
        tab.wait(f"{_OLDER}.hidden || !{_OLDER}.disabled")
    _say("loading all of them, by 1000", round(time.monotonic() - began, 1), "s")
    _say("long tasks meanwhile", _long_tasks(tab), "")
    _say("heap with all of them", _heap(tab), "MiB")
    median, worst = tab.run(_SCROLL)
    _say("frame while scrolling", f"{median}, longest {worst}", "ms")
    _say("long tasks while scrolling", _long_tasks(tab), "")
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        stack.in_thread(_calls(50))
        count += 50
        tab.run("document.title")  # the page answers
    _say(f"calls during {seconds:g} s", count, "")
    _say("long tasks meanwhile", _long_tasks(tab), "")
    _say("heap after them", _heap(tab), "MiB")


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(prog="python -m tests.console_load", description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000, metavar="N", help="calls in the journal (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5, metavar="N", help="how long calls arrive (%(default)g)")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        LiveStack(journal_size=arguments.entries + 1000, fresh=True) as stack,
        chromium(Path(folder)) as browser,
    ):
        tab = browser.tab()
        tab.resize(1280, 900)
        measure(tab, stack, arguments.entries, arguments.seconds)


if __name__ == "__main__":
    main()
