"""The console against what others would do with it: foreign pages, injected scripts, and names that look like markup.

It runs if DSTACK_EMU_BROWSER is set (`make browser`).
"""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.browser import Browser, ScriptError, Tab
from tests.console import CUT, PAGES, control_call, fill, open_filled, open_page
from tests.running import RunningStack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]

MARKUP = "<img src=x onerror='window.ran=1'><b>bold</b>"
HOSTILE = f"{MARKUP}\u202edesrever\u2066\x07\x1b[31m"
LONG = HOSTILE * (100_000 // len(HOSTILE))


@pytest.fixture
def stack(full_stack: RunningStack) -> RunningStack:
    """A stack with all parts, as it became ready."""
    return full_stack


@pytest.fixture
def tab(console_tab: Tab) -> Tab:
    """An empty page, which must ask nobody but the stack, and complain of nothing."""
    return console_tab


def test_every_page_asks_nobody_but_the_stack_and_violates_no_policy(stack: RunningStack, tab: Tab) -> None:
    fill(stack)
    open_page(tab, stack, "stack")
    for page in tab.run(PAGES):
        open_filled(tab, stack, page)
    control = stack.services["control"]
    assert {url for url in tab.requests if not url.startswith(f"{control}/")} <= {"about:blank"}
    assert len(tab.requests) > 50


def test_script_that_gets_into_a_page_does_not_run(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "stack")
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.createElement('script').textContent = 'window.ran = 1'",
        "document.createElement('script').src = 'https://evil.example/x.js'",
        "document.body.setAttribute('onclick', 'window.ran = 1')",
        "setTimeout('window.ran = 1')",
        "fetch('http://127.0.0.1:9/')",
    ):
        with pytest.raises(ScriptError):
            tab.run(attempt)
    tab.complaints.clear()
    # Even as if a parser had met it.
    root = tab.send("DOM.getDocument")["root"]["nodeId"]
    main = tab.send("DOM.querySelector", nodeId=root, selector="main")["nodeId"]
    markup = "<main><img src='data:,' onerror='window.ran=1'><a href='javascript:window.ran=1'>x</a></main>"
    tab.send("DOM.setOuterHTML", nodeId=main, outerHTML=markup)
    tab.run("document.querySelector('main a').click()")
    tab.wait("document.querySelector('main img')")
    while len([each for each in tab.complaints if "CSP: " in each]) < 2:
        tab.run("new Promise((resolve) => setTimeout(resolve))")
    assert any("script-src" in each for each in tab.complaints)
    assert tab.run("window.ran === undefined")
    tab.complaints.clear()


@contextmanager
def foreign_site(folder: Path) -> Iterator[int]:
    """Serve a folder on a port of its own until the block ends; yield the port."""
    handler = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("host", ["foreign.example", "localhost", "127.0.0.1"])
def test_page_of_another_origin_can_neither_use_nor_frame_nor_load_it(
    stack: RunningStack, browser: Browser, tmp_path: Path, host: str
) -> None:
    control = stack.services["control"]
    (tmp_path / "index.html").write_text(
        f"<!DOCTYPE html><iframe src='{control}/console/'></iframe>"
        f"<form method=post enctype=text/plain action='{control}/journal/off' target=posted><input name='{{}}'></form>"
        "<iframe name=posted></iframe>"
    )
    call = """(url, method, type) => fetch(url, {{method, headers: type ? {{'Content-Type': type}} : {{}},
      body: method === 'POST' ? '{{}}' : undefined, mode: {mode!r}}}).then(({{type}}) => type, () => 'refused')"""
    with foreign_site(tmp_path) as port:
        tab = browser.tab()
        tab.open(f"http://{host}:{port}/")
        tab.wait("document.querySelector('form') && document.readyState === 'complete'")
        for method, path, kind in (
            ("GET", "/stack", ""),
            ("POST", "/journal/off", "application/json"),
            ("POST", "/journal/off", "text/plain"),
            ("DELETE", "/journal", ""),
        ):
            ask = call.format(mode="cors")
            assert tab.run(f"({ask})('{control}{path}', '{method}', '{kind}')") == "refused"
        opaque = call.format(mode="no-cors")
        tab.run(f"({opaque})('{control}/journal/off', 'POST', 'text/plain')")
        assert tab.run(f"({opaque})('{control}/console/main.js', 'GET', '')") == "refused"
        tab.run("document.querySelector('form').submit()")
        load = (
            "new Promise((resolve) => {{ const each = document.createElement('script'); each.src = '{url}'; "
            "each.onload = () => resolve(true); each.onerror = () => resolve(false); document.body.append(each); }})"
        )
        assert tab.run(load.format(url=f"{control}/console/diff.js")) is False
        frames = tab.send("Page.getFrameTree")["frameTree"]["childFrames"]
        assert not any(each["frame"].get("url", "").startswith(control) for each in frames)
    assert stack.curl(f"{stack.services['app']}/GetQuote?report_data=00")[0] == 200
    records = json.loads(stack.curl(f"{control}/journal?limit=1")[1])["records"]
    assert records[0]["call"] == "GetQuote"  # the journal was not switched off
    tab.open("about:blank")


def test_name_that_leads_here_opens_nothing(stack: RunningStack, browser: Browser) -> None:
    port = stack.services["control"].rpartition(":")[2]
    tab = browser.tab()
    for path in ("", "console/", "stack", "journal"):
        tab.open(f"http://rebound.example:{port}/{path}")
        tab.see("Host: localhost or an IP address expected")
    tab.open("about:blank")


@pytest.mark.parametrize("host", ["foreign.example", "127.0.0.1"])
def test_page_of_another_origin_makes_no_service_do_anything(
    stack: RunningStack, browser: Browser, tmp_path: Path, host: str
) -> None:
    vmm, app = stack.services["vmm"], stack.services["app"]
    (tmp_path / "index.html").write_text(
        f"<!DOCTYPE html><img src='{vmm}/prpc/RemoveVm?id=x'><iframe src='{app}/GetKey?path=x'></iframe>"
        f"<form method=post enctype=text/plain action='{vmm}/prpc/StopVm?json' target=posted><input name='{{}}'></form>"
        "<iframe name=posted></iframe>"
    )
    with foreign_site(tmp_path) as port:
        tab = browser.tab()
        tab.open(f"http://{host}:{port}/")
        tab.wait("document.querySelector('form') && document.readyState === 'complete'")
        tab.run("document.querySelector('form').submit()")
        for name in ("vmm", "app", "auth-src", "verifier", "gateway-admin"):
            sent = "{method: 'POST', mode: 'no-cors', body: '{}'}"
            tab.run(f"fetch('{stack.services[name]}/prpc/Info?json', {sent}).then(() => 1, () => 1)")
    assert stack.curl(f"{app}/GetQuote?report_data=00")[0] == 200
    records = json.loads(stack.curl(f"{stack.services['control']}/journal?limit=3")[1])["records"]
    assert [record["call"] for record in records if record["caller"] == "outside"] == ["GetQuote"]
    tab.open("about:blank")


def test_name_that_leads_here_opens_no_service(stack: RunningStack, browser: Browser) -> None:
    tab = browser.tab()
    for name in ("vmm", "app", "auth-src", "pccs", "gateway-admin"):
        port = stack.services[name].rpartition(":")[2]
        tab.open(f"http://rebound.attacker.com:{port}/")
        tab.see("Host: an IP address or a name of this machine expected")
    tab.open("about:blank")


def test_hostile_names_and_reasons_are_shown_as_text_and_break_no_page(stack: RunningStack, tab: Tab) -> None:
    policy = json.loads(stack.policies["src"].read_text())
    control_call(stack, "PUT", "/policies/src", json.dumps(policy | {"$note": LONG, HOSTILE: LONG}))
    advisories = json.dumps({"advisory_ids": [f"{MARKUP}\u202e"]})
    control_call(stack, "PATCH", "/platforms/host%20of%20app", advisories)
    denial = {"service": "auth-src", "call": "/bootAuth/app", "kind": "decision", "allow": False, "reason": LONG}
    control_call(stack, "POST", "/faults", json.dumps(denial))
    platform = f"{MARKUP} host"
    control_call(stack, "PUT", f"/platforms/{quote(platform, safe='')}")
    control_call(stack, "POST", "/guests", json.dumps({"name": "added", "platform": platform}))
    path = f"/prpc/%3Cb%3Ex%E2%80%AE{'y' * 3000}?json"
    stack.curl(stack.services["app"] + path, "-H", f"X-Dstack-Emu-Trace: {MARKUP}")
    boot = (f"{stack.services['control']}/guests/app/boot", "-H", "Content-Type: application/json", "-d", "{}")
    assert stack.curl(*boot)[0] == 403
    asked = json.dumps({"appId": LONG[:5000], "mrAggregated": HOSTILE})
    stack.curl(f"{stack.services['auth-src']}/bootAuth/app", "-H", "Content-Type: application/json", "-d", asked)
    open_page(tab, stack, "stack")
    last = json.loads(stack.curl(f"{stack.services['control']}/journal?limit=3")[1])["records"]
    addresses = [*tab.run(PAGES), *(f"calls/{record['id']}" for record in last)]
    for address in addresses:
        open_page(tab, stack, address)
        tab.wait("document.querySelectorAll('main > div > *').length > 1")
        if address == "stack":
            tab.tab_to("added, has no keys")
            tab.press("Enter")
            tab.see(MARKUP, "section")
        elif "/" in address:
            tab.see("The record", "section")
        elif address == "conditions":
            tab.see(MARKUP, "tbody")
        tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        for size in ((1280, 900), (360, 640)):
            tab.resize(*size)
            assert tab.run("document.querySelectorAll('main b, main img, main script').length") == 0
            assert tab.run("window.ran === undefined")
            assert tab.run(r"!/[\u202e\u2066\x07\x1b]/.test(document.body.innerText)"), address
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), (address, size)
            assert tab.run(CUT) == [], (address, size)
            assert tab.run("document.documentElement.scrollHeight < 40_000"), (address, size)
            widths = tab.run("[...document.querySelectorAll('svg')].map((each) => each.scrollWidth)")
            assert max([0, *widths]) < 5000, (address, widths)
        tab.resize(1280, 900)


def test_address_that_is_no_page_is_no_link(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "stack")
    for url, is_link in (("https://a.example/", True), ("HTTP://a.example", True), ("javascript:alert(1)", False)):
        facts = f"import('/console/dom.js').then(({{facts}}) => facts({{app_url: {url!r}}})"
        assert tab.run(f"{facts}.querySelector('a') !== null)") is is_link
        assert tab.run(f"{facts}.textContent)") == f"app url{url}"
