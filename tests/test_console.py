"""The console's files as the control port serves them, and the guards that hold for them. No browser is needed."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dstack_emu.console.pages import CONTENT_SECURITY_POLICY
from tests.repository import ROOT
from tests.running import RunningStack, running_stack

STATIC = ROOT / "dstack_emu" / "console" / "static"
STYLES = ROOT / "dstack_emu" / "transport" / "static"
FILES = {path.name: path.read_text() for path in sorted(STATIC.iterdir())}
FILES["style.css"] = "".join((STYLES / name).read_text() for name in ("colours.css", "style.css"))


class Links(HTMLParser):
    """Finds what a page loads, and what a Content-Security-Policy without inline code forbids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") and tag != "a"]
        if tag == "style" or (tag == "script" and "src" not in given) or any(n.startswith("on") for n in given):
            self.inline.append(tag)


def test_port_of_control_leads_to_the_console_and_its_files(ready_stack: RunningStack) -> None:
    control = ready_stack.services["control"]
    status, text = ready_stack.curl(f"{control}/", "-L")
    assert (status, text) == (200, (STATIC / "index.html").read_text())
    page = Links(text)
    assert page.inline == []
    assert set(page.loads) <= set(FILES)
    for name in FILES:
        assert ready_stack.curl(f"{control}/console/{name}") == (200, FILES[name])


def test_files_are_sent_with_a_policy_that_lets_nothing_else_run(ready_stack: RunningStack) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for name in FILES:
        _, answer = ready_stack.curl(f"{ready_stack.services['control']}/console/{name}", "-i")
        headers = answer.replace("\r", "").partition("\n\n")[0].splitlines()
        assert f"Content-Security-Policy: {CONTENT_SECURITY_POLICY}" in headers
        assert f"Content-Type: {kinds[name.rpartition('.')[2]]}; charset=utf-8" in headers
        assert "X-Content-Type-Options: nosniff" in headers


def test_scripts_load_nothing_from_elsewhere_and_make_no_markup_of_texts() -> None:
    for path in STATIC.glob("*.js"):
        text = path.read_text()
        assert set(re.findall(r"^(?:import|export) .*from \"(.*)\"", text, re.MULTILINE)) <= {f"./{n}" for n in FILES}
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|\beval\b|Function\(", text
        ), path
        assert set(re.findall(r"https?://[^\"'`\s]*", text)) <= {"http://www.w3.org/2000/svg"}, path


@pytest.mark.parametrize(
    "path", ["/console/nothing.js", "/console/..%2fpages.py", "/console/%2e%2e/pages.py", "/console/py.typed"]
)
def test_nothing_but_the_consoles_files_is_served(ready_stack: RunningStack, path: str) -> None:
    assert ready_stack.curl(ready_stack.services["control"] + path, "--path-as-is")[0] == 404


def test_page_of_a_foreign_name_gets_nothing(ready_stack: RunningStack) -> None:
    for path in ("/", "/console/", "/console/main.js"):
        assert ready_stack.curl(ready_stack.services["control"] + path, "-H", "Host: evil.example")[0] == 403


def test_answers_of_the_api_may_not_be_loaded_or_framed_by_other_pages(ready_stack: RunningStack) -> None:
    for path in ("/stack", "/nothing", "/health"):
        _, answer = ready_stack.curl(f"{ready_stack.services['control']}{path}", "-i")
        headers = answer.replace("\r", "").partition("\n\n")[0].splitlines()
        assert "Content-Security-Policy: default-src 'none'; frame-ancestors 'none'" in headers
        assert "X-Content-Type-Options: nosniff" in headers
        assert "Cross-Origin-Resource-Policy: same-origin" in headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_page_of_another_origin_may_link_to_the_console_and_use_nothing(ready_stack: RunningStack, site: str) -> None:
    def status(path: str, *more: str) -> int:
        return ready_stack.curl(ready_stack.services["control"] + path, "-H", f"Sec-Fetch-Site: {site}", *more)[0]

    link = ("-H", "Sec-Fetch-Mode: navigate", "-H", "Sec-Fetch-Dest: document")
    assert [status(path, *link) for path in ("/", "/console/", "/stack", "/console/main.js")] == [302, 200, 403, 200]
    for path in ("/console/", "/console/main.js", "/stack", "/journal/stream", "/health"):
        assert status(path, "-H", "Sec-Fetch-Dest: script") == 403
        assert status(path, "-H", "Sec-Fetch-Dest: iframe") == 403
    assert status("/journal/off", "-H", "Content-Type: application/json", "-d", "{}", *link) == 403


@pytest.fixture(scope="module")
def open_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack whose control API demands a token."""
    folder = tmp_path_factory.mktemp("s")
    with running_stack("--fresh", "--listen", "0.0.0.0", "--state", str(folder)) as stack:
        yield stack


def test_files_need_no_token_and_what_they_show_does(open_stack: RunningStack) -> None:
    control = open_stack.services["control"]
    token = (Path(open_stack.description["state"]) / "control.token").read_text().strip()
    for name in ("", *FILES):
        status, text = open_stack.curl(f"{control}/console/{name}")
        assert (status, token in text) == (200, False)
    assert open_stack.curl(f"{control}/stack")[0] == 401
    known = ("-H", f"Authorization: Bearer {token}", "-H", "Content-Type: application/json", "-d", "{}")
    named = ("-H", "Host: stack:8070", "-H", "Origin: http://stack:8070")
    assert open_stack.curl(f"{control}/journal/on", *known, *named)[0] == 200  # the console by a name of its network
    foreign = ("-H", "Host: stack:8070", "-H", "Origin: http://evil.example")
    assert open_stack.curl(f"{control}/journal/on", *known, *foreign)[0] == 403
