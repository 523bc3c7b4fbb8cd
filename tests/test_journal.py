"""The journal: the same seed and script give the same bytes, and what it says of a refusal."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dstack_emu.control.api import Control
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.clock import StackClock
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.record import record_of
from dstack_emu.observability.record_text import lines, texts
from dstack_emu.observability.spans import OUTSIDE, current, entered, forget_request, headers_of, read_header
from tests.own_stack import own_stack
from tests.repository import ROOT

FROZEN = 1_780_000_000

SCRIPT = f"""
import asyncio, sys
from pathlib import Path
from dstack_emu.control.schemas import ControlError
from tests.own_stack import own_stack

async def play(control):
    control.set_clock(freeze={FROZEN})
    await control.add_kms("third")
    await control.boot_guest("app")
    control.deny("src", "app")
    for tcb_status in ("OutOfDate", "UpToDate"):
        control.set_platform("host of app", tcb_status=tcb_status)
        try:
            await control.boot_guest("app")
        except ControlError:
            pass
    control.allow("src", "app")
    control.allow("src", "kms-third")
    control.allow("third", "kms-src")
    control.add_fault(service="pccs", kind="status", probability=0.4)
    for _ in range(4):
        try:
            await control.onboard_kms("third", "src")
        except ControlError:
            pass
    control.emit_event("app", "hello", "00")

async def main():
    async with own_stack(seed="journal", journal=Path(sys.argv[1])) as stack:
        position = stack.control.journal.position
        print(position)
        stack.control.snapshot()
        await play(stack.control)
        await stack.control.revert()
        await play(stack.control)

asyncio.run(main())
"""


def _played(path: Path) -> list[str]:
    """Run the script twice in one process, with a revert in between; return its records, those of either time."""
    command = [sys.executable, "-c", SCRIPT, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=True)
    lines_of_file = path.read_text().splitlines()[int(done.stdout) :]
    (middle,) = (i for i, line in enumerate(lines_of_file) if "rewound_to" in line)
    return ["\n".join(lines_of_file[:middle]), "\n".join(lines_of_file[middle + 1 :])]


def test_same_seed_and_script_give_the_same_journal_in_two_runs_and_two_processes(tmp_path: Path) -> None:
    first, again = _played(tmp_path / "one")
    assert first == again
    assert _played(tmp_path / "two") == [first, again]
    assert first.count("\n") > 5
    assert all(json.loads(line)["time"] == "2026-05-28T20:26:40.000Z" for line in first.splitlines())
    assert "127.0.0.1" not in first


async def test_denied_boot_says_the_rule_and_what_did_not_match() -> None:
    async with own_stack() as stack:
        control: Control = stack.control
        policy = control.policy("src")
        (app,) = policy["apps"].values()
        app["composeHashes"] = ["0xabcd"]
        control.set_policy("src", policy)
        before = control.journal.position
        with pytest.raises(ControlError, match="compose hash not allowed"):
            await control.boot_guest("app")
        (record,) = control.journal.records(since=before)
        assert (record["call"], record["outcome"]) == ("Boot", "refused")
        (asked,) = control.journal.find("/bootAuth/app", since=before)
        guest = control.guest("app")
        decision = asked["decision"]
        assert decision["rule"] == "app_compose_hash"
        assert decision["mismatch"] == {"field": "compose_hash", "got": guest["compose_hash"], "allowed": ["0xabcd"]}
        assert decision["asked"]["device_id"] == guest["device_id"]
        shown = "\n".join(lines(record))
        assert "denied: compose hash not allowed [app_compose_hash]; compose_hash" in shown
        assert "the policy has 0xabcd" in shown
        assert "\033[" not in shown
        # Two questions about the KMS, one about the app: the counts that a test of a policy wants to see.
        assert control.journal.calls("/bootAuth/kms", since=before) == 2
        assert control.journal.calls("/bootAuth/*", service="auth-src", outcome="denied", since=before) == 1
        assert control.journal.calls("KMS.GetAppKey", caller="app", since=before) == 1
        control.journal.clear()
        assert control.journal.calls() == 0


async def test_text_shows_the_date_where_it_changes_and_what_is_absent_in_words() -> None:
    async with own_stack() as stack:
        control: Control = stack.control
        before = control.journal.position
        for moment in ("2026-06-01T12:00:00Z", "2026-06-01T13:00:00Z", "2027-01-02T00:00:00Z", "2026-06-01T12:00:00Z"):
            control.set_clock(set=moment)
            await control.boot_guest("app")
        shown = list(texts(control.journal.records(since=before)))
        dates = [line for line in shown if line.startswith("──")]
        assert dates == ["── 2026-06-01", "── 2027-01-02", "── 2026-06-01"]
        assert shown[0] == dates[0]
        (record,) = control.journal.records(since=before)[-1:]
        denied = record | {"decision": {"allowed": False, "reason": None, "rule": None}, "inner": []}
        unanswered = record | {"status": None, "outcome": "unanswered", "ms": None, "error": "broken off", "inner": []}
        assert [line.partition("Boot  ")[2] for line in texts([denied, unanswered])][1:] == [
            f"denied: no reason given  {record['ms']} ms" if record["ms"] else "denied: no reason given",
            "broken off",
        ]


async def test_calls_at_the_same_time_are_each_a_trace_of_their_own() -> None:
    async with own_stack() as stack:
        control = stack.control
        for name in ("one", "two", "three"):
            await control.add_guest(name)
            control.allow("src", name)
        before = control.journal.position
        await asyncio.gather(*(control.boot_guest(name) for name in ("one", "two", "three")))
        records = control.journal.records(since=before)
        assert sorted(r["service"] for r in records) == ["one", "three", "two"]
        for record in records:
            (key,) = [inner for inner in record["inner"] if inner.get("call") == "GetAppKey"]
            assert key["caller"] == record["service"]
            assert key["released"]["to"]["app_id"] == control.guest(record["service"])["app_id"]


def test_memory_is_bounded_and_a_late_answer_changes_no_record() -> None:
    journal = Journal(StackClock(lambda: 0.0), kept=3)
    for _ in range(5):
        journal.end(journal.begin("s", "C", None, 0, OUTSIDE), 200)
    assert [record["id"] for record in journal.records()] == ["3", "4", "5"]
    outer = journal.begin("s", "Outer", None, 0, OUTSIDE)
    with entered(outer):
        parent, number, caller = read_header(headers_of("s")()["X-Dstack-Emu-Trace"])
    inner = journal.begin("t", "Inner", parent, number, caller)
    journal.end(outer, 400, "no answer")
    before = record_of(outer)
    journal.end(inner, 200)
    assert record_of(outer) == before
    assert before["inner"][0]["outcome"] == "unanswered"
    assert current() is None


@pytest.mark.parametrize("text", [None, "", "::", "y z:1:00", "app\n:1:00", ":1:app"])
def test_header_of_somebody_else_is_from_outside(text: str | None) -> None:
    assert read_header(text) == (None, 0, OUTSIDE)


def test_header_that_claims_a_call_which_is_over_begins_a_trace_of_its_own() -> None:
    journal = Journal(StackClock(lambda: 0.0), kept=3)
    over = journal.begin("s", "C", None, 0, OUTSIDE)
    with entered(over):
        header = headers_of("app")()["X-Dstack-Emu-Trace"]
    journal.end(over, 200)
    late = journal.begin("s", "D", *read_header(header))
    assert (record_of(late)["id"], record_of(late)["caller"]) == ("2", "app")
    assert record_of(over).get("inner") is None


def test_questions_that_never_arrive_are_forgotten_oldest_first() -> None:
    journal = Journal(StackClock(lambda: 0.0), kept=3)
    outer = journal.begin("s", "C", None, 0, OUTSIDE)
    with entered(outer):
        asked = [headers_of("app")()["X-Dstack-Emu-Trace"] for _ in range(5000)]
    assert read_header(asked[0]) == (None, 0, "app")
    assert read_header(asked[-100]) == (outer, 4901, "app")
    for header in asked:
        forget_request(header)


def test_request_that_was_sent_twice_is_recorded_once_and_forgotten_when_it_is_answered() -> None:
    journal = Journal(StackClock(lambda: 0.0), kept=3)
    outer = journal.begin("s", "C", None, 0, OUTSIDE)
    with entered(outer):
        header = headers_of("app")()["X-Dstack-Emu-Trace"]
    for status in (None, 200):
        journal.end(journal.begin("t", "/document", *read_header(header)), status)
    journal.end(outer, 200)
    (inner,) = record_of(outer)["inner"]
    assert (inner["id"], inner["status"]) == ("1.1", 200)
    forget_request(header)
    assert read_header(header) == (None, 0, "app")
