"""The console's page of evidence in a real Chromium: pasted, dropped and linked, of the stack and of anyone.

It runs if DSTACK_EMU_BROWSER is set (`make browser`).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from dstack_emu.attest import issuing
from dstack_emu.simulator.seed import Seed
from tests.browser import Tab
from tests.console import control_call, open_page
from tests.evidence_samples import world
from tests.running import RunningStack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]

HOSTILE = '<img src=x onerror="alert(1)"><b>bold</b>'
MARKUP = "main img, main b, main script, main a[href^=javascript]"


@pytest.fixture
def stack(full_stack: RunningStack) -> RunningStack:
    """A stack with all parts, as it became ready."""
    return full_stack


@pytest.fixture
def tab(console_tab: Tab) -> Tab:
    """An empty page, which must ask nobody but the stack, and complain of nothing."""
    return console_tab


def evidence_of(stack: RunningStack, guest: str) -> str:
    status, text = stack.curl(f"{stack.services['control']}/guests/{guest}/evidence")
    assert status == 200
    return text


def paste(tab: Tab, text: str) -> None:
    """Replace the text of the page's field, and send it by the keyboard."""
    tab.run("document.getElementById('evidence-text').select()")
    tab.write(text)
    tab.tab_to("Decode, verify and decide")
    tab.press("Enter")


def drop(tab: Tab, path: Path) -> None:
    """Drop a file on the page, as from a folder."""
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        tab.send("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)


def open_all(tab: Tab) -> None:
    """Open every group, and those within."""
    tab.wait(
        "![...document.querySelectorAll('main details')].map((each) => "
        "each.open ? each.querySelector(':scope > .inner:empty') : (each.open = true)).some(Boolean)"
    )


# ---- pasted


def test_evidence_that_is_pasted_is_decoded_verified_and_decided_about(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "evidence")
    tab.tab_to("Evidence: a quote")
    tab.write(evidence_of(stack, "app"))
    tab.tab_to("Decode, verify and decide")
    tab.press("Enter")
    tab.see("Attest answer: versioned attestation V0", "h2")
    assert tab.focused().startswith("Attest answer")
    tab.see("All 11 checks that could be made hold.")
    tab.see("Under an emulated root that proves nothing")
    assert tab.run("[...document.querySelectorAll('.card h3')].map((each) => each.innerText)") == [
        "kms-src: allowed",
        "kms-dst: allowed",
    ]
    open_all(tab)
    tab.see(stack.description["app"]["compose_hash"], "main")
    tab.see("EFI_HANDOFF_TABLES2", "main")
    assert tab.unnamed() == []
    assert "PRIVATE KEY" not in tab.text()


def test_policy_that_denies_is_changed_by_what_the_page_shows(stack: RunningStack, tab: Tab) -> None:
    control_call(stack, "POST", "/policies/src/deny", '{"guest": "app"}')
    before = stack.policies["src"].read_text()
    open_page(tab, stack, "evidence/guest/app")
    tab.see("kms-src: denied")
    tab.see("kms-dst: allowed")
    tab.see("The rule app registered: appId")
    tab.see("Line ", ".card")
    for width, dark in ((640, False), (390, True)):
        tab.resize(width, 800, dark=dark)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth"), width
        assert tab.run("document.querySelector('.aligned th').clientHeight") < 50  # one line
    tab.resize(1280, 900)
    tab.tab_to("Allow this")
    tab.press("Enter")
    tab.see(f'+    "0x{stack.description["app"]["app_id"]}"', ".diff")
    assert stack.policies["src"].read_text() == before
    tab.tab_to("Change the policy of kms-src")
    tab.press("Enter")
    tab.see("The policy allows it now")
    tab.tab_to("Decode, verify and decide", 300)
    tab.press("Enter")
    tab.see("kms-src: allowed")


def test_evidence_of_another_root_fails_and_the_page_says_why(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "evidence")
    paste(tab, world().evidence.encode().hex())
    tab.see("leads to another root")
    tab.see("The quote is not proven: what holds beside it proves nothing.")
    tab.see("kms-src: refused")
    assert tab.run("document.querySelectorAll('.card .ok').length") == 0
    paste(tab, "hello")
    tab.see("unknown input: ", "[role=alert]:not(:empty)")
    assert tab.run("document.querySelectorAll('main h2').length") == 0  # nothing of what was there before


def test_pccs_that_fails_is_said(stack: RunningStack, tab: Tab) -> None:
    control_call(stack, "POST", "/faults", '{"service": "pccs", "kind": "status", "status": 503}')
    open_page(tab, stack, "evidence/guest/app")
    tab.see("HTTP 503")
    tab.see("The quote is not proven")
    tab.see("kms-src: refused")


# ---- files


def test_file_that_is_dropped_or_chosen_is_read_by_its_bytes(stack: RunningStack, tab: Tab, tmp_path: Path) -> None:
    compose = tmp_path / "app-compose.json"
    compose.write_bytes(b'{\r\n"manifest_version": 2, "name": "x", "runner": "docker-compose"\r\n}')
    quote = tmp_path / "quote.bin"
    quote.write_bytes(world().evidence.quote)
    open_page(tab, stack, "evidence")
    drop(tab, quote)
    tab.see("TDX quote, version 4")
    tab.see(f"The file quote.bin, {quote.stat().st_size} bytes")
    tab.see("kms-src: no decision")
    tab.see("a quote without its event log")
    tab.run(f"document.getElementById('evidence-app').value = '{stack.description['app']['app_id']}'")
    node = tab.send(
        "DOM.querySelector", nodeId=tab.send("DOM.getDocument")["root"]["nodeId"], selector="#evidence-file"
    )
    tab.send("DOM.setFileInputFiles", files=[str(compose)], nodeId=node["nodeId"])
    tab.see("app-compose", "h2")
    tab.see("The app is registered, but its app-compose (composeHash) is not the one that the policy lists.")
    tab.see("A claim, in which nothing was verified")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10 * 1024 * 1024 + 1)
    drop(tab, tmp_path / "large")
    tab.see("input of at most 10485760 bytes expected, got 10485761", "[role=alert]:not(:empty)")


# ---- links


def test_links_of_parts_and_calls_open_their_evidence(stack: RunningStack, tab: Tab) -> None:
    open_page(tab, stack, "stack")
    tab.tab_to("kms-src, runtime phase")
    tab.press("Enter")
    tab.tab_to("Its evidence, decoded and verified")
    tab.press("Enter")
    tab.see("The evidence of kms-src, as it is now")
    tab.see("This KMS is admitted by ", ".card")
    open_page(tab, stack, "stack")
    tab.tab_to("kms-src, runtime phase")
    tab.press("Enter")
    tab.see("root-ca.crt", "section")
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    links = tab.run("[...document.querySelectorAll('details a')].map((each) => each.getAttribute('href'))")
    assert "#/evidence/kms/src/rpc.crt" in links
    tab.run("document.querySelector('a[href=\"#/evidence/kms/src/rpc.crt\"]').click()")
    tab.see("RA-TLS certificate")
    tab.see("All ")
    assert "PRIVATE KEY" not in tab.run("document.getElementById('evidence-text').value")
    control_call(stack, "POST", "/guests/app/boot")
    open_page(tab, stack, "calls")
    tab.tab_to("Calls, the newest last")
    tab.press("ArrowUp", "Enter")
    tab.see("Evidence as it is now: app, gateway, kms-src (the journal keeps no quotes, ", "section")
    tab.tab_to("kms-src")
    tab.press("Enter")
    tab.see("The evidence of kms-src, as it is now")
    open_page(tab, stack, "evidence/certificate/root-ca.pem")
    tab.see("EMULATED", "main")
    tab.see("no evidence in it")
    open_page(tab, stack, "evidence/guest/%3Cb%3Enobody")
    tab.see("there is no trust domain '<b>nobody'", "[role=alert]:not(:empty)")


# ---- hostile


def certificate_called(name: str) -> str:
    key = Seed.of("hostile").p256("key")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(issuing.NOT_BEFORE).not_valid_after(issuing.NOT_BEFORE)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def hostile() -> dict[str, tuple[str, str]]:
    """Texts to paste, and what must be seen of each as text."""
    compose: dict[str, Any] = {"manifest_version": 2, "name": HOSTILE, "runner": "docker-compose", HOSTILE: HOSTILE}
    compose["app_url"] = "javascript:alert(1)"
    log = {"imr": 3, "event_type": 134217729, "digest": "", "event": HOSTILE, "event_payload": ""}
    boot_info = {"mrAggregated": HOSTILE, "osImageHash": "", HOSTILE: [HOSTILE]}
    return {
        "certificate": (certificate_called(HOSTILE), r"\<b\>bold\</b\>"),
        "app-compose": (json.dumps(compose), HOSTILE),
        "event log": (json.dumps([log]), HOSTILE),
        "boot info": (json.dumps(boot_info), HOSTILE),
        "collateral": (json.dumps({"tcbInfo": {HOSTILE: HOSTILE, "__proto__": HOSTILE}, "signature": ""}), HOSTILE),
        "error": (json.dumps({"quote": HOSTILE}), HOSTILE[:10]),
    }


@pytest.mark.parametrize("kind", list(hostile()))
def test_markup_in_what_is_pasted_stays_text(stack: RunningStack, tab: Tab, kind: str) -> None:
    text, seen = hostile()[kind]
    open_page(tab, stack, "evidence")
    paste(tab, text)
    tab.wait("document.querySelectorAll('main h2').length || document.querySelector('[role=alert]:not(:empty)')")
    open_all(tab)
    tab.see(seen, "main > div")
    assert tab.run(f"document.querySelectorAll({json.dumps(MARKUP)}).length") == 0
    assert tab.run("document.querySelectorAll('main a').length") == 0


def test_many_events_and_long_texts_are_shown_on_request(stack: RunningStack, tab: Tab) -> None:
    event = {"imr": 3, "event_type": 134217729, "digest": "", "event": "one", "event_payload": "00" * 2_000}
    text = json.dumps([event | {"event": f"event {number}"} for number in range(1_000)])
    open_page(tab, stack, "evidence")
    tab.run(f"document.getElementById('evidence-text').value = {json.dumps(text)}")
    tab.run("document.getElementById('evidence-text').form.requestSubmit()")
    tab.see("event log", "h2")
    tab.see("event log: no evidence in it")
    open_all(tab)
    tab.see("event 199", ".compact")
    assert "event 200" not in tab.text(".compact")
    tab.run("[...document.querySelectorAll('button')].find((each) => each.innerText === 'Show all 1000 rows').click()")
    tab.see("event 999", ".compact")
