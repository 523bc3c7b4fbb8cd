"""The pages of a KMS: what is in them, and that the buttons of the set-up page do what they say.

Its script runs here in node, where there is one, over as much of a document as it uses; what it fetches is answered by
a real KMS.
"""

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from dstack_emu.kms_emu.pages import setup_page, setup_policy
from tests.commands import serving
from tests.kms_process import Kms, World, running, variables
from tests.repository import ROOT

SITE = '</script><b>site</b> & "more"'


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One agent with its PCCS."""
    with serving("agent") as description:
        yield World.of(description)


@pytest.fixture
def kms(world: World, tmp_path: Path) -> Iterator[Kms]:
    """A fresh KMS whose site's name is an attack."""
    with running(tmp_path, world, **variables({"core.site_name": SITE})) as fresh:
        yield fresh


class Page(HTMLParser):
    """What a browser finds in a page: elements, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag = self._inside[-1] if self._inside else ""
        self.text[tag] = self.text.get(tag, "") + data


def test_page_says_that_it_is_emulated_and_loads_nothing_from_elsewhere(kms: Kms) -> None:
    status, text = kms.curl("/", "-D", "-")
    headers, _, body = text.replace("\r", "").partition("\n\n")
    assert status == 200
    assert "Content-Type: text/html; charset=utf-8" in headers
    page = Page(body)
    assert "EMULATED" in page.text["strong"]
    assert "(EMULATED)" in page.text["title"]
    assert not [attributes for _, attributes in page.elements if {"src", "href", "action"} & set(attributes)]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not re.search(r"//\w+\.\w|@import|url\(", page.text["script"] + page.text["style"])
    # The browser runs this script and no other, and lets it talk to this KMS alone.
    digest = base64.b64encode(hashlib.sha256(page.text["script"].encode()).digest()).decode()
    assert f"Content-Security-Policy: {setup_policy()}" in headers
    assert f"default-src 'none'; script-src 'sha256-{digest}';" in setup_policy()
    assert "connect-src 'self'" in setup_policy()


def test_page_escapes_the_sites_name(kms: Kms) -> None:
    page = Page(kms.curl("/")[1])
    assert page.text["h1"] == f"A fresh dstack KMS at {SITE}"
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "b" not in [tag for tag, _ in page.elements]
    assert Page(setup_page("")).text["h1"] == "A fresh dstack KMS"


def test_every_call_of_the_page_is_one_that_the_kms_answers(kms: Kms) -> None:
    script = Page(setup_page("")).text["script"]
    called = set(re.findall(r'\bcall\("(\w+)"', script))
    assert called == {"GetAttestationInfo", "Bootstrap", "Onboard"}
    assert set(re.findall(r"\bfetch\(([^,)]+)", script)) == {"`prpc/Onboard.${method}?json`", '"finish"'}
    for method in called:
        _, answer = kms.rpc(f"Onboard.{method}", {})
        assert "Service not found" not in str(answer)
    assert kms.curl("/finish")[0] == 200


def test_curl_lines_of_the_page_name_what_the_kms_answers() -> None:
    text = Page(setup_page("")).text["pre"]
    named = set(re.findall(r"prpc/Onboard\.(\w+)\?json", text))
    assert named == {"GetAttestationInfo", "Bootstrap", "Onboard"}


class Browser:
    """The page's script in node, told what to do line by line."""

    def __init__(self, url: str, script: Path) -> None:
        command = ["node", str(ROOT / "tests" / "page_driver.js"), url, str(script)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def do(self, action: str, **arguments: Any) -> Any:
        """Do one thing, and return what the page shows once it is done."""
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        self.process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)


@pytest.fixture
def browser(kms: Kms, tmp_path: Path) -> Iterator[Browser]:
    """The page of that KMS, loaded."""
    if shutil.which("node") is None:
        pytest.skip("the page's script needs node to run outside a browser")
    page = tmp_path / "page.html"
    page.write_text(kms.curl("/")[1])
    started = Browser(kms.url, page)
    yield started
    started.process.kill()
    started.process.communicate(timeout=100)


def test_page_measures_bootstraps_and_finishes(kms: Kms, browser: Browser) -> None:
    shown = browser.do("loaded")["measured"]
    info = kms.rpc("Onboard.GetAttestationInfo")[1]
    values = dict(shown["values"])
    assert {name: values[name] for name in ("mr_aggregated", "os_image_hash", "device_id")} == {
        name: f"0x{info[name]}" for name in ("mr_aggregated", "os_image_hash", "device_id")
    }
    assert values["site_name"] == SITE
    assert json.loads(shown["policy"])["kms"]["mrAggregated"] == [f"0x{info['mr_aggregated']}"]
    assert shown["error"] == ""
    # Its domain is by default the name by which the browser reached it.
    assert {browser.do("loaded")[form]["domain"] for form in ("bootstrap", "onboard")} == {"127.0.0.1"}
    # A button for each value puts just that value on the clipboard.
    for name in ("mr_aggregated", "device_id"):
        assert browser.do("copy", section="measured", name=name)["clipboard"] == values[name]
    assert browser.do("copy-policy")["clipboard"] == shown["policy"]

    refused = browser.do("submit", section="bootstrap", fields={"domain": "<b>.test"})["bootstrap"]
    assert (refused["error"], refused["values"]) == ("domain contains an invalid DNS label", [])
    made = browser.do("submit", section="bootstrap", fields={"domain": "127.0.0.1"})["bootstrap"]
    stored = json.loads((kms.certs / "bootstrap-info.json").read_text())
    assert made["error"] == ""
    assert dict(made["values"]) == {name: f"0x{stored[name]}" for name in ("ca_pubkey", "k256_pubkey", "attestation")}
    again = browser.do("submit", section="bootstrap", fields={"domain": "127.0.0.1"})["bootstrap"]
    assert again["error"] == "KMS has already been bootstrapped"

    finished = browser.do("finish")
    assert (finished["asked"], finished["finish"]["error"]) == (0, "")
    assert f"{kms.runtime_url}/prpc" in finished["finished"]
    check_page_of_a_kms_with_keys(kms)
    assert kms.rpc("KMS.GetMeta")[1]["k256_pubkey"] == stored["k256_pubkey"]


def check_page_of_a_kms_with_keys(kms: Kms) -> None:
    """Check the page at `/`, which browsers get, and that other programs get upstream's 404."""
    assert kms.curl("/", url=kms.runtime_url)[0] == 404
    status, text = kms.curl("/", "-D", "-", "-H", "Accept: text/html,*/*;q=0.8", url=kms.runtime_url)
    headers, _, body = text.replace("\r", "").partition("\n\n")
    page = Page(body)
    assert (status, page.text["h1"]) == (200, f"A dstack KMS at {SITE}")
    assert "EMULATED" in page.text["strong"]
    assert {"script", "b"}.isdisjoint(tag for tag, _ in page.elements)
    assert "Content-Security-Policy: default-src 'none';" in headers
    command = shlex.split(page.text["pre"].replace("kms-ca.pem", str(kms.certs / "root-ca.crt")))
    assert "k256_pubkey" in json.loads(subprocess.run(command, capture_output=True, check=True, timeout=20).stdout)


def test_page_onboards_and_shows_refusals_of_the_kms(kms: Kms, browser: Browser, world: World, tmp_path: Path) -> None:
    fields = {"source_url": "https://127.0.0.1:1/prpc", "domain": "127.0.0.1"}
    refused = browser.do("submit", section="onboard", fields=fields)["onboard"]
    assert refused["error"].startswith("Failed to onboard: Failed to send request: ")
    (tmp_path / "source").mkdir()
    with running(tmp_path / "source", world) as source:
        public = source.bootstrapped()["k256_pubkey"]
        fields["source_url"] = source.runtime_url
        made = browser.do("submit", section="onboard", fields=fields)["onboard"]
    assert (made["error"], made["values"]) == ("", [["k256_pubkey", f"0x{public}"]])


def test_page_asks_before_it_finishes_without_keys(kms: Kms, browser: Browser) -> None:
    shown = browser.do("finish", confirm=False)
    assert (shown["asked"], shown["finished"]) == (1, "")
    assert kms.curl("/health")[0] == 200
    shown = browser.do("finish", confirm=True)
    assert shown["asked"] == 2
    assert kms.process.wait(20) == 1


TOKEN = "operator's &+%41 token"


def loaded(url: str, text: str, folder: Path) -> Browser:
    if shutil.which("node") is None:
        pytest.skip("the page's script needs node to run outside a browser")
    page = folder / "page.html"
    page.write_text(text)
    return Browser(url, page)


def test_page_that_was_opened_with_a_token_sends_it_along(world: World, tmp_path: Path) -> None:
    """A KMS that demands a token gets the keys from another KMS's admin listener, all on its page."""
    source_folder, folder = tmp_path / "source", tmp_path / "fresh"
    source_folder.mkdir()
    folder.mkdir()
    keys = {
        "core.onboard.auto_bootstrap_domain": "127.0.0.1",
        "core.onboard.public_key_handover": "false",
        "core.admin.enabled": "true",
        "core.admin.port": "0",
        "core.admin.auth_token": "admin",
        "core.admin.tls.key": str(source_folder / "certs" / "rpc.key"),
        "core.admin.tls.certs": str(source_folder / "certs" / "rpc.crt"),
    }
    release = ("--release", "0.6")
    with (
        running(source_folder, world, *release, **variables(keys)) as source,
        running(folder, world, *release, DSTACK_KMS_ONBOARD_TOKEN=TOKEN) as kms,
    ):
        address = f"/?{urlencode({'token': TOKEN})}"
        status, text = kms.curl(address)
        assert status == 200
        browser = loaded(kms.url + address, text, tmp_path)
        try:
            assert browser.do("loaded")["measured"]["error"] == ""
            fields = {"source_url": source.description["admin_url"], "domain": "127.0.0.1", "source_token": ""}
            shown = browser.do("submit", section="onboard", fields=fields)["onboard"]
            assert "Request failed with status=401 Unauthorized" in shown["error"]
            shown = browser.do("submit", section="onboard", fields={**fields, "source_token": "admin"})["onboard"]
            assert (shown["error"], [name for name, _ in shown["values"]]) == ("", ["k256_pubkey"])
            assert browser.do("finish")["finish"]["error"] == ""
        finally:
            browser.process.kill()
            browser.process.communicate(timeout=100)
        assert kms.rpc("KMS.GetMeta")[1]["k256_pubkey"] == source.rpc("KMS.GetMeta")[1]["k256_pubkey"]


def test_page_without_the_token_is_told_so(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world, "--release", "0.6", DSTACK_KMS_ONBOARD_TOKEN=TOKEN) as kms:
        assert kms.curl("/")[0] == 401
        browser = loaded(kms.url, setup_page(""), tmp_path)
        try:
            assert browser.do("loaded")["measured"]["error"].startswith("status 401")
        finally:
            browser.process.kill()
            browser.process.communicate(timeout=100)
