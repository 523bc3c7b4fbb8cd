"""Which calls each step of a run led to: as the journal of the stack has them, or else as the runbook saw them.

A stack that the command starts has a journal, with everything that a call caused. Of a stack that runs elsewhere, the
runbook knows its own calls alone. What differs from run to run, times and durations, is left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from dstack_emu.observability.journal import Journal
from dstack_emu.observability.record import Record, recorded_name
from dstack_emu.observability.spans import OUTSIDE
from dstack_emu.runbook.kms_client import KmsAnswer

RUNBOOK: Final = "runbook"
"""The caller of what the runbook calls."""
_WEBHOOK: Final = "auth-"
_KMS: Final = "kms-"


def seen_call(request: str, answer: KmsAnswer) -> Record:
    """Return a call of the runbook as a record in the journal's form, with what the runbook saw of it.

    `request` is as the transcript has it: `kms-src KMS.GetMeta(…)`, or `GET auth-src/ …`.
    """
    first, second = request.split(" ")[:2]
    if first in ("GET", "POST"):
        service, _, path = second.rstrip(",").partition("/")
        call = f"/{path}"
    else:
        service, call = first, recorded_name(second.partition("(")[0])
    outcome = "unanswered" if answer.status == 0 else "ok" if answer.ok else "refused"
    verdict = answer.body.get("is_valid") if answer.ok and isinstance(answer.body, dict) else None
    record: Record = {
        "id": "0",
        "service": service,
        "call": call,
        "caller": RUNBOOK,
        "status": answer.status or None,
        "outcome": "denied" if verdict is False else outcome,
        "ms": None,
    }
    if answer.code is not None:
        record["grpc"] = answer.code
    return record | ({"error": answer.error} if answer.error else {})


class StepCalls:
    """The calls of the steps by name; `journal` is that of the stack, if there is one."""

    def __init__(self) -> None:
        self.journal: Journal | None = None
        self._ranges: dict[str, tuple[int, int]] = {}
        self._position = 0

    def note(self, step: str) -> None:
        """Note that a step has ended: what began since the last one belongs to it."""
        if self.journal is not None:
            self._ranges[step] = (self._position, self.journal.position)
            self._position = self.journal.position

    def document(self, seen: Mapping[str, Record]) -> dict[str, list[Record]]:
        """Return the calls of each step; `seen` has those that the runbook saw, by step."""
        found = {step: list(self._calls_of(step, seen.get(step))) for step in {**self._ranges, **seen}}
        return {step: calls for step, calls in found.items() if calls}

    def _calls_of(self, step: str, seen: Record | None) -> Iterator[Record]:
        recorded = self._recorded(step)
        if seen is None:
            yield from (each for each in recorded if each["service"] != "pccs" or each["outcome"] != "ok")
            return
        own = [each for each in recorded if (each["service"], each["call"]) == (seen["service"], seen["call"])]
        caused = [each for each in recorded if each not in own]
        yield from (each for each in caused if not each["service"].startswith((_WEBHOOK, _KMS, "pccs", "vmm")))
        if own:
            yield own[-1]  # before that one, it may have been called to learn whether it answers
            return
        # A KMS in a machine, or of another program, is not in the journal, but what it asked its webhook is.
        asked = [each | {"caller": _KMS + each["service"].removeprefix(_WEBHOOK)} for each in caused]
        inner = [each for each in asked if each["service"].startswith(_WEBHOOK)]
        yield seen | ({"inner": inner} if inner else {})

    def _recorded(self, step: str) -> list[Record]:
        """Return the calls from outside that began in a step, without a call that was repeated by another one."""
        if self.journal is None or step not in self._ranges:
            return []
        first, last = self._ranges[step]
        records = self.journal.records(since=first, before=last + 1)
        return [_undated(each) | {"caller": RUNBOOK} for each in records if each["caller"] == OUTSIDE]


def _undated(record: Record) -> Record:
    """Return a record without what differs from run to run."""
    kept: dict[str, Any] = {name: value for name, value in record.items() if name not in ("time", "ms", "inner")}
    if "call" in record:
        kept["ms"] = None
    if "inner" in record:
        kept["inner"] = [_undated(each) for each in record["inner"]]
    return kept
