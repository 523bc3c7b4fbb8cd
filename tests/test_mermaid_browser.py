"""Mermaid itself, in Chromium, draws the diagrams of calls, and shows every name as text.

It runs if DSTACK_EMU_BROWSER is set (`make browser`, which puts Mermaid into `.mermaid`). Mermaid is set as GitHub sets
it, which shows such diagrams in the text of a pull request.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import pytest

from dstack_emu.observability.mermaid import mermaid
from tests.browser import Browser, Tab
from tests.console import fill
from tests.repository import ROOT
from tests.running import RunningStack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]

SCRIPT: Final = ROOT / ".mermaid" / "mermaidx" / "assets" / "mermaid.js"
START: Final = "mermaid.initialize({startOnLoad: false, securityLevel: 'strict'})"
DRAW: Final = """
(async (text) => {
  await mermaid.parse(text);
  document.body.innerHTML = (await mermaid.render('drawn', text)).svg;
  const all = [...document.querySelectorAll('body *')], of = (selector) => all.filter((each) => each.matches(selector));
  return {
    lanes: of('text.actor-box').map((each) => each.textContent),
    arrows: of('.messageText').map((each) => each.textContent),
    notes: of('.noteText').map((each) => each.textContent),
    title: of('svg > title')[0].textContent,
    tags: all.map((each) => each.localName),
    attributes: all.flatMap((each) => [...each.attributes]).map(({name, value}) => `${name}=${value}`),
  };
})
"""
HARMLESS: Final = {
    *("svg", "title", "style", "g", "rect", "line", "text", "tspan", "defs", "symbol", "path", "marker", "circle"),
}
HOSTILE: Final = (
    *("end", "loop", "alt x", "participant", "autonumber", "sequenceDiagram", "end note", "a as b", "activate p0"),
    *("a; p0->>p1: forged", "x\n  p0->>p1: forged", "-->>+p0: x", "->>", "-", "()", "[", ",", "...", " ", ""),
    *("# comment", "%% comment", "%%{init: {'securityLevel': 'loose'}}%%", "---\nconfig: x\n---"),
    *("@{ 'type': 'database' }", "wrap: x", "nowrap:x", "style a:b<c;", "title: x", "accDescr {", "$$x$$", "{{x}}"),
    *("rect rgb(0,0,0)", 'click p0 href "javascript:window.ran=1"', "link p0: x @ //x.example", "/?a=b&c"),
    *("<img src=x onerror=window.ran=1>", "<script>window.ran=1</script>", "<b>b</b>", "<br/>", "a<br>b", "&lt;b&gt;"),
    *("[x](javascript:window.ran=1)", "**bold** `code`", "\"'`", "\\n", "a\\b", "#quot;", "#35;", "#9829;", "&amp;"),
    *("__proto__", "constructor", "\ufb02\N{DEGREE SIGN}\N{DEGREE SIGN}35\N{PILCROW SIGN}\xdf", "\u202edesrever"),
    *("\x1b[31m", "\0", "\ud800", "\N{GRINNING FACE}", "\N{CJK UNIFIED IDEOGRAPH-4E00}", "x\u2028y"),
    *("w " * 3000, "<" * 40_000),
)  # fmt: skip


@pytest.fixture(scope="module")
def drawing(browser: Browser) -> Iterator[Tab]:
    """A page with Mermaid, which must ask nobody, run nothing and complain of nothing."""
    if not SCRIPT.is_file():
        pytest.fail(f"there is no Mermaid in {SCRIPT}: `make browser` installs it")
    tab = browser.tab()
    tab.run(f"{SCRIPT.read_text()}; {START}")
    yield tab
    assert tab.run("window.ran === undefined")
    assert (tab.requests, tab.complaints) == ([], [])


def drawn(tab: Tab, text: str) -> dict[str, Any]:
    """Draw a diagram, and return its texts; it may have nothing but lines and texts."""
    found: dict[str, Any] = tab.run(f"({DRAW})({json.dumps(text)})")
    assert set(found["tags"]) <= HARMLESS
    assert not [each for each in found["attributes"] if each.startswith(("on", "href", "xlink:href", "src"))]
    return found


def shown(text: str) -> str:
    """Return a name as it is shown: on one line, cut, without what is no character of a document."""
    text = " ".join(text.split()) or "(empty)"
    text = text if len(text) <= 200 else text[:199] + "\N{HORIZONTAL ELLIPSIS}"
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").replace("\ud800", "\N{REPLACEMENT CHARACTER}")


def arrows(record: dict[str, Any]) -> Iterator[str]:
    """Yield what each arrow begins with: the name of a call, and after what it caused the outcome."""
    if "call" in record:
        yield shown(record["call"])
    for inner in record.get("inner", []):
        if "call" in record or inner["outcome"] != "ok" or "fault" in inner:
            yield from arrows(inner)
    if "call" in record:
        yield record["outcome"]


def agree(found: dict[str, Any], record: dict[str, Any]) -> None:
    expected = list(arrows(record))
    assert len(found["arrows"]) == len(expected)
    assert all(said.startswith(begin) for said, begin in zip(found["arrows"], expected, strict=True)), found["arrows"]


def test_every_call_of_a_stack_is_drawn(full_stack: RunningStack, drawing: Tab) -> None:
    fill(full_stack)
    journal = f"{full_stack.services['control']}/journal"
    records = json.loads(full_stack.curl(f"{journal}?limit=2000")[1])["records"]
    for record in records:
        found = drawn(drawing, full_stack.curl(f"{journal}/{record['id']}/mermaid")[1])
        agree(found, record)
        assert found["title"].startswith(f"{record['caller']} to {record['service']} {record['call']}: ")
        assert {record["caller"], record["service"]} <= set(found["lanes"])
    assert len(records) > 10
    assert any("app_registered" in note for note in found["notes"]), found["notes"]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: ascii(hostile[:20]))
def test_hostile_text_is_shown_as_it_is(drawing: Tab, hostile: str) -> None:
    record: dict[str, Any] = {
        **{"id": "1", "time": "2026-06-01T00:00:00.000Z", "ms": 2.5, "status": 400, "outcome": "refused"},
        **{"caller": hostile, "service": f"service {hostile}", "call": hostile, "error": hostile},
    }
    inner = {
        **record,
        "outcome": "denied",
        "decision": {"about": "app", "allowed": False, "reason": hostile, "rule": hostile},
    }
    unverified = {"id": "1.2", "attestation": "refused", "error": hostile, "inner": [inner]}
    found = drawn(drawing, "\n".join(mermaid({**record, "inner": [inner, unverified]})))
    assert found["arrows"].count(shown(hostile)) == 3
    assert Counter(found["lanes"]) == {shown(hostile): 2, shown(f"service {hostile}"): 2}  # above and below
    rule = {shown(f"rule {hostile}")} if hostile else set()
    assert set(found["notes"]) == {shown(f"evidence refused: {hostile}"), *rule}


def test_diagram_of_very_many_calls_is_drawn_and_says_what_it_lacks(drawing: Tab) -> None:
    call = {"id": "1", "time": "2026-06-01T00:00:00.000Z", "ms": None, "status": 200, "outcome": "ok"}
    call |= {"caller": "app", "service": "kms-src", "call": "/<b>"}
    found = drawn(drawing, "\n".join(mermaid({**call, "inner": [call] * 2000})))
    (note,) = found["notes"]
    number, words = note.split(" ", 1)
    assert words == "further lines are left out"
    assert len(found["arrows"]) + int(number) == 4002
    assert len(found["arrows"]) > 1000
