"""The archive of a run as a page for people: `index.html`, which opens from a folder, without a server or a script.

It is made of the archive's other files alone, and so has no secret that they do not have; equal files give an equal
page. It loads nothing, which its Content-Security-Policy enforces: pictures are SVG in the page itself.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Final
from urllib.parse import quote

from dstack_emu.observability.record import Record
from dstack_emu.observability.sequence_diagram import sequence_diagram
from dstack_emu.observability.svg import STYLE, inline_svg
from dstack_emu.runbook.comparison import asked, decisions, denial, plain
from dstack_emu.runbook.markup import Markup, tag
from dstack_emu.transport.html import colours

INDEX: Final = "index.html"
REPORT: Final = "runbook.json"
CALLS: Final = "calls.json"
SHOWN_CHARACTERS: Final = 200
"""Characters of a value in a request or an answer; the file has all of it."""
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_OF_ITS_OWN: Final = "It ran on a stack of its own, which is an emulation: nothing here is evidence of hardware."
_ELSEWHERE: Final = "It ran on a stack that runs elsewhere, of which it saw what it called itself."
_STATES: Final = {True: ("passed", "holds"), False: ("failed", "FAILED"), None: ("skipped", "skipped")}
_RESULTS: Final = {True: ("passed", "passed"), False: ("failed", "FAILED"), None: ("skipped", "not checked")}
_ABOUT: Final = {
    "upstream": "Release of dstack",
    "emulator": "Version of dstack-emu",
    "seed": "Seed",
    "transport": "How the KMS were called",
    "deploy": "Where the KMS ran",
    "auth": "What decided",
}


def evidence_page(files: Mapping[str, str]) -> str:
    """Return the page of an archive (HTML); `files` are the texts of its other files, except the manifest, by name."""
    return _Page(files).text()


class _Page:
    """The page in the making."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files
        self._report: dict[str, Any] = json.loads(files[REPORT])
        self._calls: dict[str, list[Record]] = json.loads(files.get(CALLS, "{}"))
        self._cases: list[dict[str, Any]] = self._report["cases"]

    def text(self) -> str:
        css = resources.files(__package__).joinpath("static", "evidence.css").read_text(encoding="utf-8")
        head = tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("title", f"KMS authorization runbook: {self._result()}"),
            Markup(f"<style>\n{colours()}{css}{STYLE}</style>"),
        )
        body = tag(
            "body",
            tag("a", "Skip to the cases", href="#case-0", class_="skip"),
            self._header(),
            self._contents(),
            tag("main", self._measured(), *map(self._case, self._cases), self._all_files()),
            tag(
                "footer",
                tag("p", "Written by dstack-emu, which emulates a deployment and protects nothing.", class_="dim"),
            ),
        )
        return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"

    # ---- what ran

    def _result(self) -> str:
        passed = sum(case["ok"] is True for case in self._cases)
        return "passed" if self._report["ok"] else f"{passed} of {len(self._cases)} parts passed"

    def _header(self) -> Markup:
        state = "passed" if self._report["ok"] else "failed"
        facts = [
            (tag("dt", words), tag("dd", self._report[name])) for name, words in _ABOUT.items() if name in self._report
        ]
        rows = [self._summary_row(case) for case in self._cases]
        heads = [
            tag("th", name, scope="col") for name in ("case", "what it shows", "held", "failed", "skipped", "result")
        ]
        return tag(
            "header",
            tag("h1", "KMS authorization runbook"),
            tag("p", _OF_ITS_OWN if "seed" in self._report else _ELSEWHERE, class_="warning"),
            tag("p", "Result: ", _result(self._result(), state)),
            tag("dl", facts),
            tag("table", tag("caption", "The cases"), tag("thead", tag("tr", heads)), tag("tbody", rows)),
        )

    def _summary_row(self, case: dict[str, Any]) -> Markup:
        counts = [sum(step["ok"] is state for step in case["steps"]) for state in (True, False, None)]
        kind, word = _RESULTS[case["ok"]]
        name = tag("a", str(case["case"]), href=f"#case-{case['case']}")
        cells = [tag("td", str(count)) for count in counts]
        return tag("tr", tag("th", name, scope="row"), tag("td", case["title"]), cells, tag("td", _result(word, kind)))

    def _contents(self) -> Markup:
        items = [tag("li", tag("a", _title(case), href=f"#case-{case['case']}")) for case in self._cases]
        others = [("#measured", "What was measured"), ("#files", "The files of the archive")]
        items += [tag("li", tag("a", words, href=href)) for href, words in others]
        return tag("nav", tag("ul", items), aria_label="Contents")

    def _measured(self) -> Markup:
        """Show what both KMS state of themselves, as the first case recorded it."""
        found = {}
        for name, text in self._files.items():
            for side in ("kms-src", "kms-dst"):
                if name.startswith("responses/") and name.endswith(f"-{side}-attestation.json"):
                    found[side] = (name, json.loads(text)["body"])
        parts: list[Markup] = [tag("h2", "What was measured", id="measured")]
        for side, (name, body) in found.items():
            values = body if isinstance(body, dict) else {}
            rows = [(tag("dt", key), tag("dd", _short(plain(value)), class_="mono")) for key, value in values.items()]
            parts += [tag("h3", f"{side} states of itself"), tag("dl", rows), tag("p", self._link(name))]
        if not found:
            parts.append(tag("p", "Nothing: no KMS said what it measures."))
        return tag("section", parts, aria_labelledby="measured")

    # ---- cases and steps

    def _case(self, case: dict[str, Any]) -> Markup:
        kind, word = _RESULTS[case["ok"]]
        heading = tag("h2", f"{_title(case)}: ", _result(word, kind), id=f"case-{case['case']}", tabindex="-1")
        return tag("section", heading, *map(self._step, case["steps"]), aria_labelledby=f"case-{case['case']}")

    def _step(self, step: dict[str, Any]) -> Markup:
        kind, word = _STATES[step["ok"]]
        calls = self._calls.get(step["name"], [])
        names = [name for name in self._files if _step_of(name) == step["name"]]
        facts = [("Question", step["asked"]), ("Answer", step["got"]), ("Expected", step["expected"])]
        rows = [(tag("dt", name), tag("dd", value)) for name, value in facts if value]
        denials = [denial(each) for each in decisions(calls) if each["outcome"] == "denied"]
        subject = step["asked"].partition("(")[0].partition(", ")[0]
        heading = tag("h3", f"{step['name']} {subject}: ", _result(word, kind), id=f"step-{step['name']}")
        return tag(
            "article",
            heading,
            tag("dl", rows),
            (tag("h4", "Why it was denied"), denials) if denials else None,
            self._picture(step, calls),
            [asked(each) for each in decisions(calls)],
            [self._exchange(name) for name in names],
            aria_labelledby=f"step-{step['name']}",
        )

    def _picture(self, step: dict[str, Any], calls: list[Record]) -> Markup | None:
        if not calls:
            return None
        diagram = sequence_diagram(*calls)
        is_open = any(each["outcome"] != "ok" for each in calls)
        picture = tag(
            "div",
            Markup(inline_svg(diagram)),
            class_="scroll",
            tabindex="0",
            role="group",
            aria_label=f"Sequence diagram of step {step['name']}",
        )
        lines = tag("ol", [tag("li", line) for line in diagram.description.split("\n")])
        as_text = tag("details", tag("summary", "The same as text"), lines)
        return tag("details", tag("summary", "Sequence diagram"), tag("figure", picture), as_text, open=is_open)

    def _exchange(self, name: str) -> Markup:
        """Show a file of a step: its name and sum, and its content with long values shortened."""
        content = json.dumps(_shortened(json.loads(self._files[name])), indent=2, ensure_ascii=False)
        pre = tag("pre", content, tabindex="0", role="group", aria_label=f"Content of {name}")
        return tag("div", tag("p", self._link(name)), tag("details", tag("summary", "Its content, shortened"), pre))

    # ---- files

    def _link(self, name: str) -> Iterator[Markup | str]:
        data = self._files[name].encode()
        yield tag("a", name, href=quote(name))
        yield f" ({len(data)} bytes, SHA-256 "
        yield tag("code", hashlib.sha256(data).hexdigest())
        yield ")"

    def _all_files(self) -> Markup:
        items = [tag("li", self._link(name)) for name in sorted(self._files)]
        manifest = tag(
            "li", tag("a", "manifest.json", href="manifest.json"), " has the sums of all files, and of this page"
        )
        heading = tag("h2", "The files of the archive", id="files")
        return tag("section", heading, tag("ul", items, manifest, class_="files"), aria_labelledby="files")


def _result(word: str, kind: str) -> Markup:
    return tag("span", word, class_=f"result {kind}")


def _title(case: dict[str, Any]) -> str:
    title = str(case["title"])
    return f"Case {case['case']}: {title}" if case["case"] else title.capitalize()


def _step_of(name: str) -> str:
    """Return the name of the step that a file belongs to, such as 3.2; empty if it belongs to none."""
    folder, _, rest = name.partition("/")
    case, _, number = rest.partition("-")[0].partition(".")
    if folder not in ("policies", "responses") or not (case.isdecimal() and number.isdecimal()):
        return ""
    return f"{case}.{int(number)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text)} characters)"


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shortened(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    return _short(value) if isinstance(value, str) else value
