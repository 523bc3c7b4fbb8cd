"""The pictures of the documents, made by Chromium over stacks of this file's own.

Each is the same pixels whenever it is made: seed and names are those of any stack, and what differs from run to run
(times, durations, ports, the state folder) is replaced in what the stack answers, before a page reads it. Another
Chromium, or other fonts, make other pixels, so no test compares a picture with that of the documents.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from dstack_emu.transport.ports import PORTS
from tests.browser import Tab
from tests.commands import run_command
from tests.console import control_call, fill, open_page
from tests.running import RunningStack, running_stack

pytestmark = [
    pytest.mark.skipif(
        not {"DSTACK_EMU_BROWSER", "DSTACK_EMU_PICTURES"} <= os.environ.keys(),
        reason="DSTACK_EMU_PICTURES names no folder for the pictures: `make pictures`",
    ),
]

FOLDER: Final = Path(os.environ.get("DSTACK_EMU_PICTURES", "."))
FRAMES: Final = "new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))"
TIME: Final = "2026-06-01T12:00:00"
STATE: Final = "/tmp/emu"
_STEADY: Final = """
(() => {
  const places = %s, began = Date.now(), theirs = window.fetch;
  const isNow = (ms) => Math.abs(ms - began) < 864e5;
  const inside = (record) => (record.inner ?? []).reduce((sum, each) => sum + 1 + inside(each), 0);
  function value(name, each) {
    if (name === "ms" && each !== null) return 3 * inside(this) + 2;
    if (typeof each === "number" && isNow(1000 * each)) return Date.parse("%sZ") / 1000;
    if (typeof each !== "string") return each;
    const second = (this.id?.split?.(".")[0] ?? 0) %% 60;
    const time = `%s`.slice(0, 17) + String(second).padStart(2, "0");
    return each
      .replace(/20[\\d-]{8}T[\\d:]{8}/g, (found) => isNow(Date.parse(found + "Z")) ? time : found)
      .replace(/(?<=T[\\d:]+)\\.\\d+(?=Z)/g, ".000").replace(/· \\d+ ms/g, "· 5 ms");
  }
  const steady = (line) => {
    for (const [place, other] of places) line = line.replaceAll(place, other);
    return line.trim() ? JSON.stringify(JSON.parse(line, value)) : line;
  };
  window.fetch = async (...given) => {
    const answer = await theirs(...given);
    if (String(given[0]).includes("/journal/stream")) {
      let rest = "";
      const lines = new TransformStream({transform(chunk, out) {
        const found = (rest + chunk).split("\\n");
        rest = found.pop();
        for (const each of found) out.enqueue(steady(each) + "\\n");
      }});
      const body = answer.body.pipeThrough(new TextDecoderStream()).pipeThrough(lines);
      return new Response(body.pipeThrough(new TextEncoderStream()), answer);
    }
    return new Response(steady(await answer.text()), answer);
  };
})();
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    """A stack with all parts, in which every page has something to show."""
    with running_stack("--vmm", "--gateway") as started:
        fill(started)
        yield started


def steady(tab: Tab, stack: RunningStack) -> None:
    """Let the tab's pages read answers without what differs from run to run."""
    places = [[stack.description["state"], STATE]]
    for name, url in stack.services.items():
        port = url.rsplit(":", 1)[1].rstrip("/")
        places.append([f"127.0.0.1:{port}", f"127.0.0.1:{PORTS[name]}"])
        places.append([f":{port}", f":{PORTS[name]}"])
    tab.send("Page.addScriptToEvaluateOnNewDocument", source=_STEADY % (json.dumps(places), TIME, TIME))


def keep(tab: Tab, name: str, top: str = "") -> None:
    """Write the picture, from the element `top` (a selector) on if one is named."""
    if top:
        tab.run(f"document.querySelector({json.dumps(top)}).scrollIntoView()")
    tab.run("document.activeElement.blur()")
    for scale in (2, 1):  # all of it is drawn anew, because corners differ a little after a part alone was drawn
        tab.resize(1280, 900, scale=scale)
        tab.run(FRAMES)
    tab.screenshot(FOLDER / name)


def of_stack(tab: Tab) -> None:
    tab.wait("document.querySelectorAll('svg .arrow.ok').length > 5")
    tab.wait("document.querySelector('svg .arrow.denied')")
    tab.tab_to("app, has keys")
    tab.press("Enter")
    tab.see("compose hash", "section")


def of_calls(tab: Tab) -> None:
    tab.see("Boot", ".windowed")
    tab.tab_to("Calls, the newest last")
    tab.press("ArrowUp", "Enter")
    tab.see("The rule app registered", "section")


def of_policies(tab: Tab) -> None:
    tab.see("Nothing.")
    tab.run("document.getElementById('policy-text').select()")
    tab.write('{"osImage": [],}')
    tab.see("not JSON", "ul[aria-label=Problems]")


def of_evidence(tab: Tab) -> None:
    tab.see("The rule app registered: appId")
    tab.see("Line ", ".card")


def of_conditions(tab: Tab) -> None:
    tab.see("Start kms-src anew")
    tab.see("status 503", "tbody")


def of_snapshots(tab: Tab) -> None:
    tab.tab_to("Compare before")
    tab.press("Enter")
    tab.see("policy of kms-src", "section")


PAGES: Final[dict[str, tuple[str, Callable[[Tab], None], str]]] = {
    "stack": ("stack", of_stack, ""),
    "calls": ("calls", of_calls, ""),
    "policies": ("policies/src", of_policies, ""),
    "evidence": ("evidence/guest/app", of_evidence, "h2 ~ h2 ~ h2"),
    "conditions": ("conditions", of_conditions, ""),
    "snapshots": ("snapshots", of_snapshots, ""),
}
"""Of each picture of the console the page, what is opened on it, and the element that is at the top."""


@pytest.mark.parametrize("name", list(PAGES))
def test_picture_of_a_page_of_the_console(stack: RunningStack, console_tab: Tab, name: str) -> None:
    page, fill_page, top = PAGES[name]
    steady(console_tab, stack)
    open_page(console_tab, stack, page)
    fill_page(console_tab)
    assert stack.description["state"] not in console_tab.text()
    keep(console_tab, f"console-{name}.png", top)


def test_picture_of_the_contracts(console_tab: Tab) -> None:
    with running_stack("--auth", "eth") as stack:
        steady(console_tab, stack)
        open_page(console_tab, stack, "policies")
        console_tab.see("app: allowed")
        console_tab.tab_to(f"Remove compose-hash 0x{stack.description['app']['compose_hash']}")
        console_tab.press("Enter")
        console_tab.see("app: allowed before, denied: Compose hash not allowed after it", "section")
        console_tab.run("document.querySelectorAll('details').forEach((each) => { each.open = false; })")
        keep(console_tab, "console-contracts.png")
        console_tab.open("about:blank")
        console_tab.requests.clear()


def test_picture_of_a_kms_without_keys(console_tab: Tab) -> None:
    with running_stack("--fresh") as stack:
        control_call(stack, "POST", "/policies/dst/allow", '{"guest": "kms-dst"}')
        steady(console_tab, stack)
        console_tab.open(stack.services["kms-dst"] + "/")
        console_tab.see(stack.description["kms"]["dst"]["mr_aggregated"], "#measured")
        keep(console_tab, "kms-setup.png")
        console_tab.open("about:blank")
        console_tab.requests.clear()


def test_picture_of_a_runbooks_evidence(console_tab: Tab, tmp_path: Path) -> None:
    done = run_command("runbook", "--evidence", str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    page = tmp_path / "index.html"
    text = re.sub(r"\b\d+ ms", "5 ms", page.read_text())
    text = re.sub(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", f"{TIME}Z", text)
    page.write_text(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:9301", text))
    console_tab.open(page.as_uri())
    console_tab.see("KMS authorization runbook")
    keep(console_tab, "runbook-evidence.png", "[id='step-1.3']")
