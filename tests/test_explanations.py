"""What the control API says of a single call: the record, its picture, and why a webhook denied a boot in it."""

import asyncio
import html
import json
import re
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from dstack_emu.control.api import Control
from dstack_emu.control.schemas import ControlError
from dstack_emu.inspection.json_lines import line_of
from dstack_emu.observability.mermaid import mermaid
from dstack_emu.observability.sequence_diagram import sequence_diagram
from dstack_emu.observability.svg import svg
from dstack_emu.stack import Stack
from tests.commands import run_command
from tests.own_stack import own_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Stack]:
    """One ready stack for the file."""
    async with own_stack() as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="module")
async def control(running: Stack) -> AsyncIterator[Control]:
    """Its control; afterwards the stack is as it became ready."""
    yield running.control
    await running.control.reset()


async def denied_boot(control: Control) -> str:
    """Let the app be denied, and return the number of the call."""
    control.deny("src", "app")
    with pytest.raises(ControlError, match="app not registered"):
        await control.boot_guest("app")
    return str(control.journal.records(limit=1)[0]["id"])


async def test_denial_is_explained_by_rule_line_and_the_change_that_allows_it(control: Control) -> None:
    (denial,) = control.why(await denied_boot(control))["denials"]
    app = control.guest("app")
    assert (denial["kms"], denial["problem"], denial["decision"]["rule"]) == ("src", None, "app_registered")
    (refusal,) = denial["refusals"]
    assert (refusal["rule"], refusal["got"], refusal["wanted"]) == ("app_registered", [app["app_id"]], [])
    lines = control._policy_path("src").read_text().splitlines()
    assert lines[refusal["line"] - 1].strip() == refusal["line_text"] == '"apps": {}'
    assert f'+    "0x{app["app_id"]}"' in denial["change"]["diff"]
    assert denial["change"]["before"] == control.policy("src")
    control.set_policy("src", denial["change"]["after"])
    await control.boot_guest("app")
    (denial,) = control.why(denial["id"].partition(".")[0])["denials"]
    assert (denial["refusals"], denial["change"]) == ([], None)  # the present policy allows it


async def test_denial_that_no_policy_can_undo_says_so(control: Control) -> None:
    control.set_platform("host of app", module_status="Revoked", tcb_status="Revoked")
    with pytest.raises(ControlError):
        await control.boot_guest("app")
    assert control.why(str(control.journal.position)) == {"denials": []}  # the KMS refused it: no webhook was asked


async def test_denial_of_a_policy_that_cannot_be_read_names_the_problem(control: Control) -> None:
    number = await denied_boot(control)
    control._policy_path("src").write_text("{")
    (denial,) = control.why(number)["denials"]
    assert "auth-src.json" in denial["problem"]


async def test_record_that_is_not_kept_is_refused(control: Control) -> None:
    for wanted in ("0", "999999", "x", "1.99", "9" * 40):
        with pytest.raises(ControlError, match="there is no record") as refused:
            control.record(wanted)
        assert refused.value.status == 404


def shown(document: ElementTree.Element) -> set[str]:
    """Return the texts of a picture, without the titles inside them."""
    elements = document.iter("{http://www.w3.org/2000/svg}text")
    return {(element[0].tail if len(element) else element.text) or "" for element in elements}


async def test_picture_has_each_call_and_its_texts_stay_texts(control: Control) -> None:
    record = control.record(await denied_boot(control))
    document = ElementTree.fromstring(svg(sequence_diagram(record)))
    assert {"stack", "app", "kms-src", "auth-src", "GetTempCaCert", "GetAppKey", "/bootAuth/app"} <= shown(document)
    values = [value for element in document.iter() for value in element.attrib.values()]
    assert not [value for value in values if "url(" in value or "//" in value]  # it loads nothing
    hostile: dict[str, Any] = {**record, "call": "</text><script>\x00&", "error": '"><img src=x>'}
    document = ElementTree.fromstring(svg(sequence_diagram(hostile)))
    assert "</text><script>\ufffd&" in shown(document)
    forbidden = "".join(map(chr, (*range(32), *range(127, 160), 0xD800, 0xDFFF, 0xFFFE, 0xFFFF, 0x1FFFE)))
    for member in ("service", "caller", "call", "error", "outcome"):
        written = svg(sequence_diagram({**record, member: forbidden}))
        assert ElementTree.fromstring(written.encode()).get("role") == "img", member
    assert {element.tag.partition("}")[2] for element in document.iter()} == {
        "svg", "title", "desc", "style", "line", "text", "path", "rect",
    }  # fmt: skip
    assert control.svg(record["id"]) == svg(sequence_diagram(record))
    assert control.diagram(record["id"])["shapes"]
    with pytest.raises(ControlError, match="is a verification"):
        control.diagram(next(each["id"] for each in record["inner"] if "attestation" in each))


async def test_trace_shows_one_call_as_text_and_as_a_picture(running: Stack, control: Control) -> None:

    number = await denied_boot(control)
    ctl = ("ctl", "--url", running.services["control"], "trace", number)
    text = (await asyncio.to_thread(run_command, *ctl)).stdout.decode()
    assert "kms-src → auth-src /bootAuth/app  denied: app not registered" in text
    picture = (await asyncio.to_thread(run_command, *ctl, "--svg")).stdout
    assert ElementTree.fromstring(picture).get("role") == "img"
    lines = (await asyncio.to_thread(run_command, *ctl, "--mermaid")).stdout.decode().splitlines()
    assert lines[0] == "sequenceDiagram"
    assert [line.split()[-1] for line in lines if "participant" in line][:4] == ["stack", "app", "kms-src", "auth-src"]
    assert "  p2->>p3: /bootAuth/app" in lines
    assert "  p3--xp2: denied#58; app not registered" in [line.partition(" (")[0] for line in lines]
    for form, said in (("svg", picture), ("mermaid", "\n".join(lines).encode())):  # the console requests the same
        url = f"{running.services['control']}/journal/{number}/{form}"
        with await asyncio.to_thread(urllib.request.urlopen, url) as answer:
            assert answer.read().strip() == said.strip()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    explained = (await asyncio.to_thread(run_command, *ctl[:3], "why")).stdout.decode()
    assert "auth-src denied /bootAuth/app: app not registered\n  The smallest change that admits it:\n" in explained
    done = await asyncio.to_thread(run_command, *ctl[:-1], "999999")
    assert (done.returncode, b"there is no record" in done.stderr) == (1, True)


# ---- pictures


def denied_record(call: str = "/bootAuth/kms", caller: str = "kms-src") -> dict[str, Any]:
    """A call that a webhook denied, as the journal has it."""
    return {
        "id": "1",
        "time": "2026-06-01T00:00:00.000Z",
        "service": "auth-src",
        "call": call,
        "caller": caller,
        "status": 200,
        "outcome": "denied",
        "ms": 2.5,
        "decision": {
            "about": "kms",
            "allowed": False,
            "reason": "aggregated MR not allowed",
            "rule": "kms_mr_aggregated",
            "mismatch": {"field": "mr_aggregated", "got": "ab" * 32, "allowed": ["0x" + "cd" * 32] * 5},
        },
    }


async def test_denial_in_a_picture_has_outcome_duration_rule_and_values_as_text() -> None:
    document = ElementTree.fromstring(svg(sequence_diagram(denied_record())))
    texts = shown(document)
    assert "denied: aggregated MR not allowed · 2.5 ms" in texts
    compared = ["rule   kms_mr_aggregated", "field  mr_aggregated", f"got    {'ab' * 32}", f"wanted {'cd' * 32}"]
    assert {*compared, "wanted … and 2 more"} <= texts
    title, description = (document.find(f"{{http://www.w3.org/2000/svg}}{name}") for name in ("title", "desc"))
    assert title is not None
    assert title.text == "kms-src → auth-src /bootAuth/kms: denied: aggregated MR not allowed"
    assert description is not None
    assert all(line in str(description.text) for line in compared)


@pytest.mark.parametrize(
    ("outcome", "status", "error", "word"),
    [
        ("ok", 200, "", "ok: 200"),
        ("refused", 400, "no such thing", "refused: 400 no such thing"),
        ("unanswered", None, "", "unanswered: no answer"),
    ],
)
async def test_outcome_is_a_word_in_both_pictures(outcome: str, status: int | None, error: str, word: str) -> None:
    record = denied_record() | {"outcome": outcome, "status": status, "error": error, "ms": None}
    del record["decision"]
    assert word in shown(ElementTree.fromstring(svg(sequence_diagram(record))))
    assert list(mermaid(record))[-1].endswith(": " + word.replace(":", "#58;"))


_MERMAID_LINE = re.compile(
    r"(accTitle|participant p\d+ as|Note (over|right of) p\d+|p\d+(->>|-->>|--x)p\d+):? [^#;\n]+", re.ASCII
)
"""A line that Mermaid's grammar takes once codes of characters are replaced: a # begins a comment, a ; ends a line."""


@pytest.mark.parametrize(
    "hostile",
    [
        "end",
        "a; p0->>p1: forged",
        "# comment",
        "%%{init: {}}%%",
        "wrap: x",
        "style a:b<c;",
        "x\n  p0->>p1: forged",
        "<img src=x onerror=alert(1)>",
        "$$x$$",
        "\u202e\N{CJK UNIFIED IDEOGRAPH-4E00}",
        " ",
    ],
)
async def test_hostile_name_stays_one_text_in_mermaid(hostile: str) -> None:
    record = denied_record(hostile, hostile)
    first, *lines = mermaid(record)
    assert first == "sequenceDiagram"
    for line in lines:
        assert _MERMAID_LINE.fullmatch(re.sub(r"#\d+;", "\N{DEGREE SIGN}", line.strip())), line
        assert not re.search(r"[<>%$]|style.*:\S*#|: *(?:no)?wrap:", line.replace("->>", "").replace("<br/>", "")), line
    shown = "".join(html.unescape(re.sub(r"#(\d+);", r"&#\1;", lines[-3].partition(": ")[2])))
    assert shown == (" ".join(hostile.split()) or "(empty)")


async def test_mermaid_has_no_more_characters_than_mermaid_draws() -> None:
    long = denied_record("<" * 40_000)
    assert "&#60;" * 199 + "…" in re.sub(r"#(\d+);", r"&#\1;", "\n".join(mermaid(long))).replace("&#8230;", "…")
    text = "\n".join(mermaid({**long, "inner": [long] * 100}))
    assert 49_000 < len(text) < 50_000
    assert re.search(r"\n  Note over p0: \d+ further lines are left out$", text)


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ('{\n"a": 1,\n"b": {\n"c": []}}', ("b", "c"), 4),
        ('{\n"a": {"c": 0},\n"b": {"x": ["c", {"c": 1}],\n "c": []}}', ("b", "c"), 4),
        ('{\n"apps": {\n"0xAB": {\n"composeHashes": []}}}', ("apps", "ab", "composeHashes"), 4),
        ('{\n"apps": {\n"0xAB": {}}}', ("apps", "ab", "devices"), 3),
        ('{"a\\"b": "c: {",\n"b": 1}', ("b",), 2),
        ("{}", ("b",), 1),
    ],
)
async def test_line_of_a_member_is_found(text: str, path: tuple[str, ...], line: int) -> None:
    json.loads(text)
    assert line_of(text, path) == line


@pytest.mark.parametrize(
    ("text", "problem", "line", "warning"),
    [
        ('{\n"apps": }', "not JSON: Expecting value (column 9)", 2, ""),
        ('{"apps": []}', "apps", None, ""),
        ("[1]", "object", None, ""),
        ('{"osImage": []}', None, None, "osImage: nothing reads this key, did you mean osImages?"),
    ],
)
async def test_policy_is_checked_before_it_is_written(
    control: Control, text: str, problem: str | None, line: int | None, warning: str
) -> None:
    before = control.policy("src")
    found = control.check_policy("src", text)
    assert (problem is None, (problem or "") in (found["problem"] or "")) == (found["problem"] is None, True)
    assert (found["line"], found["warnings"]) == (line, [warning] if warning else [])
    assert control.policy("src") == before


async def test_difference_of_a_policy_is_shown_and_none_without_one(control: Control) -> None:
    policy = control.policy("src")
    assert control.check_policy("src", json.dumps(policy)) == {
        "problem": None,
        "line": None,
        "warnings": [],
        "diff": "",
    }
    changed = control.check_policy("src", json.dumps(policy | {"gatewayAppId": "<b>none</b>"}))
    assert '+  "gatewayAppId": "<b>none</b>"' in changed["diff"]


# ---- what differs between two states


async def test_differences_of_a_snapshot_are_shown_place_by_place(running: Stack, control: Control) -> None:
    control.snapshot("before")
    assert control.differences("before") == []
    control.set_platform("host of app", tcb_status="OutOfDate")
    control.deny("src", "app")
    control.emit_event("app", "mine", "c0ffee")
    await control.add_guest("added")
    found = {each["path"]: (each["before"], each["after"]) for each in control.differences("before")}
    assert found["/platforms/host of app/tcb_status"] == ('"UpToDate"', '"OutOfDate"')
    assert found["/guests/added"] == ("absent", "not shown")
    (app,) = (path for path in found if path.startswith("/policies/src/apps/"))
    assert found[app][1] == "absent"
    assert found["/guests/app/rtmr3"][0] != found["/guests/app/rtmr3"][1]
    assert all(len(text) <= 300 for pair in found.values() for text in pair)
    await control.revert("before")
    assert control.differences("before") == control.differences("before", "before") == []
    with pytest.raises(ControlError, match="there is no snapshot 'nothing'"):
        control.differences("before", "nothing")


async def test_comparison_shows_part_by_part_what_differs(running: Stack, control: Control) -> None:
    control.snapshot("before")
    assert control.comparison("before") == {"parts": [], "unseen": []}
    control.set_clock(freeze="2026-06-01T00:00:00Z")
    control.set_platform("host of app", tcb_status="OutOfDate")
    control.set_vendor(collateral_until="2027-01-01")
    control.deny("src", "app")
    control.add_fault(service="pccs", kind="status", status=503)
    control.emit_event("app", "mine", "c0ffee")
    parts = {each["part"]: each for each in control.comparison("before")["parts"]}
    app = control.guest("app")["app_id"]
    assert f'-    "0x{app}": {{' in parts["policy of kms-src"]["diff"].splitlines()
    changes = {
        (name, each["what"]): (each["before"], each["after"]) for name in parts for each in parts[name]["changes"]
    }
    assert changes["clock", "time"] == ("that of the system clock", "frozen at 2026-06-01T00:00:00Z")
    assert changes["platform host of app", "tcb_status"] == ("UpToDate", "OutOfDate")
    assert "next_update 2027-01-01T00:00:00Z" in changes["vendor", "pck_crl_dating"][1]
    (fault,) = (change for (name, _), change in changes.items() if name == "faults")
    assert fault == ("absent", "service pccs, kind status, status 503; met 0 of 0 calls")
    assert ("absent", "mine: c0ffee") in changes.values()
    control.snapshot("after")
    await control.revert("before")
    assert control.comparison("before")["parts"] == []
    assert {each["part"] for each in control.comparison("before", "after")["parts"]} == set(parts)


async def test_differences_show_no_key_and_no_token(running: Stack, control: Control) -> None:
    control.snapshot("before")
    token = "a-token-that-nobody-sees"
    await control.add_kms("third", settings={"onboard": {"auth_token": token}})
    control.allow("src", "kms-third")
    await control.add_guest("booted")
    control.allow("src", "booted")
    await control.boot_guest("booted")
    text = json.dumps(control.differences("before")) + json.dumps(control.comparison("before"))
    assert "/kms/third" in text
    assert "KMS third" in text
    state = json.dumps(control.save())
    assert token in state
    assert token not in text
    keys = control.save()["guests"]["booted"]["keys"]["keys"]
    assert not [value for value in keys.values() if isinstance(value, str) and len(value) > 16 and value in text]


@pytest.mark.parametrize("effect", [{"kind": "decision", "allow": False}, {"script": ["deny"]}], ids=["kind", "script"])
async def test_denial_by_a_fault_names_the_fault(control: Control, effect: dict[str, Any]) -> None:
    fault = control.add_fault(service="auth-src", call="/bootAuth/app", **effect)
    with pytest.raises(ControlError, match="Boot denied"):
        await control.boot_guest("app")
    (denial,) = control.why(str(control.journal.position))["denials"]
    assert denial["problem"] == f"The fault {fault.id} decided this, and no policy: lift the fault."
