"""The journal: a record of every call in a stack, its caller, the calls that it caused, and why it was refused.

There is one record for each call from outside the stack; the calls that it caused are inside it. A record contains no
secrets: of an answer it has the status, the text of a refusal and a webhook's decision; of keys only their names and
who received them. The last records are kept in memory; if a file is named, all are appended to it as JSON lines.
"""

import contextlib
import datetime
import fnmatch
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from dstack_emu.observability.backlog import Backlog
from dstack_emu.observability.spans import COMPLETED, GIVEN_UP, CallSpan, Span, VerificationSpan
from dstack_emu.observability.w3c_trace import Trace

RELEASED: Final = {
    "GetAppKey": ("disk_crypt_key", "env_crypt_key", "k256_key"),
    "GetKmsKey": ("temp_ca_key", "ca_key", "k256_key"),
    "GetTempCaCert": ("temp_ca_key",),
    "SignCert": ("certificate_chain",),
}
"""The secret fields in a KMS's answers, by RPC."""

_RECEIVER: Final = ("app_id", "instance_id", "mr_aggregated")
"""The fields of a request that say who receives a release."""

_WAITING: Final = 1000
"""Records that wait for one follower. A follower that falls behind loses the oldest."""

Record = dict[str, Any]
Published = CallSpan | Record
"""What a listener gets: a call from outside that has ended, or the record of a revert."""


class JournalClock(Protocol):
    """The clock of the journal's times; `now` returns Unix seconds with a fraction."""

    now: Callable[[], float]


class Tracer(Protocol):
    """Makes traces of other programs continue in the journal's calls."""

    def root(self, call: CallSpan, remote: Trace | None) -> Trace:
        """Return the trace of a call from outside, whose request had the trace `remote`."""
        ...

    def inner(self, above: Trace, number: int) -> Trace:
        """Return the trace of request `number` of a span whose trace is `above`."""
        ...

    def ended(self, span: Span) -> None:
        """Note the end of a span."""
        ...


class JournalError(Exception):
    """The journal's file cannot be written; the text says why."""


class Journal:
    """The records of one stack, in the order in which their calls ended.

    Nothing is recorded while `enabled` is False. `scrub` removes from an error's text what differs from run to run:
    ports and folders. Without a `tracer` a call passes the trace on that it came with. `count` is given each call from
    outside when it has ended.

    `ended` is the number of these since the stack began, `forgotten` how many of them are no longer in memory because
    newer ones took their place, and `missed` how many records its followers have lost.
    """

    def __init__(self, clock: JournalClock, *, kept: int, file: Path | None = None) -> None:
        self.enabled = True
        self.tracer: Tracer | None = None
        self.count: Callable[[CallSpan], None] | None = None
        self.ended = self.forgotten = self.missed = 0
        self.scrub: Callable[[str], str] = str
        self._clock = clock
        self._ended: deque[CallSpan] = deque(maxlen=kept)
        self._begun = 0
        self._listeners: set[Backlog[Published]] = set()
        self._file: TextIO | None = None
        if file is not None:
            try:
                self._file = file.open("a", encoding="utf-8")
            except OSError as error:
                raise JournalError(f"the journal {file} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # ---- recording

    def begin(
        self, service: str, call: str, parent: Span | None, number: int, caller: str, remote: Trace | None = None
    ) -> CallSpan:
        """Record the beginning of a call, as request `number` of `parent`.

        Without a parent, or if the parent has ended already, it is a call from outside, whose request had the trace
        `remote`.
        """
        if parent is None or parent.outcome is not None:
            self._begun += 1
            span = CallSpan(False, self._begun, service, call, caller, self._clock.now())
            span.trace = remote if self.tracer is None else self.tracer.root(span, remote)
            return span
        span = CallSpan(True, number, service, call, caller, self._clock.now())
        if parent.trace is not None:
            span.trace = parent.trace if self.tracer is None else self.tracer.inner(parent.trace, number)
        if parent.inner:
            parent.inner.append(span)
        else:
            parent.inner = [span]
        return span

    def end(self, call: CallSpan, status: int | None, error: str = "") -> None:
        """Record the end of a call: its status, or None if it got no answer, and the text of a refusal."""
        if call.outcome is not None:
            return  # its caller gave up, which is recorded
        call.outcome = (status, error, self._clock.now())
        for inner in call.inner:
            if inner.outcome is None or inner.inner:
                inner.give_up()
        if self.tracer is not None:
            self.tracer.ended(call)
        if call.is_inner:
            return
        self.ended += 1
        self.forgotten += len(self._ended) == self._ended.maxlen
        self._ended.append(call)
        if self.count is not None:
            self.count(call)
        if self._file is not None or self._listeners:
            self._publish(call)

    def begin_verification(self, parent: Span) -> VerificationSpan:
        """Record the beginning of a verification for a span; `end_verification` must follow."""
        span = VerificationSpan(parent.next_number())
        if parent.outcome is None:
            parent.put(span)
            if parent.trace is not None:
                span.trace = parent.trace if self.tracer is None else self.tracer.inner(parent.trace, span.number)
        return span

    def end_verification(self, span: VerificationSpan, verdict: dict[str, Any]) -> None:
        """Record the verdict of a verification."""
        if span.outcome is None:
            span.annotations, span.outcome = verdict, COMPLETED
            if self.tracer is not None:
                self.tracer.ended(span)

    def _publish(self, published: Published) -> None:
        if self._file is not None:
            self._file.write(json_of(published) + "\n")
            self._file.flush()
        for listener in self._listeners:
            self.missed += listener.put(published)

    # ---- position

    @property
    def position(self) -> int:
        """The number of calls from outside so far, which is the number of the last record."""
        return self._begun

    @property
    def kept(self) -> int:
        """The number of records in memory."""
        return len(self._ended)

    def capture(self) -> int:
        """Return the position."""
        return self._begun

    def restore(self, position: int) -> None:
        """Forget the records after a position, and number the next one from there."""
        if position == self._begun:
            return
        while self._ended and self._ended[-1].number > position:
            self._ended.pop()
        self._begun = position
        self._publish({"rewound_to": position})

    def clear(self) -> None:
        """Forget every record. Numbering continues."""
        self._ended.clear()

    # ---- reading

    def records(self, *, since: int = 0, before: int | None = None, limit: int | None = None) -> list[Record]:
        """Return the records after a position, and before a number, oldest first; with `limit`, only the last ones."""
        found = [call for call in self._ended if call.number > since and (before is None or call.number < before)]
        return [record_of(call) for call in (found if limit is None else found[max(0, len(found) - limit) :])]

    def find(
        self,
        call: str = "*",
        *,
        service: str = "*",
        caller: str = "*",
        outcome: str = "*",
        since: int = 0,
        before: int | None = None,
    ) -> list[Record]:
        """Return every call that matches, inner ones too.

        A call is matched by its name (`GetAppKey`, `/bootAuth/kms`), service, caller and outcome; each pattern may have
        wildcards. Outcomes are `ok`, `denied`, `refused` and `unanswered`.
        """
        patterns = {"call": recorded_name(call), "service": service, "caller": caller, "outcome": outcome}
        given = {key: pattern for key, pattern in patterns.items() if pattern != "*"}
        return [
            found
            for record in self.records(since=since, before=before)
            for found in flattened(record)
            if "call" in found and all(fnmatch.fnmatchcase(found[key], pattern) for key, pattern in given.items())
        ]

    def values(self, field: str) -> set[str]:
        """Return what the records have in a field of each call: `service`, `call`, `caller` or `outcome`."""
        return {found[field] for record in self.records() for found in flattened(record) if field in found}

    def calls(
        self, call: str = "*", *, service: str = "*", caller: str = "*", outcome: str = "*", since: int = 0
    ) -> int:
        """Count the calls that `find` returns."""
        return len(self.find(call, service=service, caller=caller, outcome=outcome, since=since))

    async def follow(self) -> AsyncIterator[Record]:
        """Yield each record from now on, when its call ends."""
        async with contextlib.aclosing(self.follow_in_batches()) as batches:
            async for batch in batches:
                for record in batch:
                    yield record

    async def follow_in_batches(self) -> AsyncGenerator[list[Record]]:
        """Yield the records from now on: whenever a call has ended, all that have ended since the last batch.

        A batch begins with `{"lost": N}` if so many records before it were lost, because more waited than may wait.
        """
        backlog: Backlog[Published] = Backlog(_WAITING)
        self.listen(backlog)
        try:
            while True:
                await backlog.wait()
                lost, published = backlog.take()
                told: list[Record] = [{"lost": lost}] if lost else []
                yield told + [each if isinstance(each, dict) else record_of(each) for each in published]
        finally:
            self.unlisten(backlog)

    def listen(self, backlog: Backlog[Published]) -> None:
        """Put into a backlog what ends from now on, once even if it listens already; `json_of` makes it a record."""
        self._listeners.add(backlog)

    def unlisten(self, backlog: Backlog[Published]) -> None:
        """Put nothing more into a backlog."""
        self._listeners.discard(backlog)


def recorded_name(call: str) -> str:
    """Return the name under which a call is recorded: of an RPC its method, without its service."""
    return call if call.startswith("/") else call.rpartition(".")[2]


def flattened(record: Record) -> Iterator[Record]:
    """Yield a record and everything inside it."""
    yield record
    for inner in record.get("inner", ()):
        yield from flattened(inner)


def record_of(span: Span) -> Record:
    """Return a span as a record, a copy; its id is its number after the parent's id, such as 3.1.2."""
    record: Record = _copied(_shared_record(span, ""))
    return record


def json_of(published: Published) -> str:
    """Return a call, or a record, as JSON on one line."""
    record = published if isinstance(published, dict) else _shared_record(published, "")
    return json.dumps(record, separators=(",", ":"))


def _shared_record(span: Span, parent_id: str) -> Record:
    """Return a span as a record that shares its values with the span: it must not be changed."""
    span_id = f"{parent_id}.{span.number}" if parent_id else str(span.number)
    record = fields_of(span, span_id)
    if span.inner:
        record["inner"] = [_shared_record(inner, span_id) for inner in inner_of(span)]
    return record


def _copied(value: Any) -> Any:
    """Copy a value of JSON. `copy.deepcopy` also looks for circles, and takes several times as long."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def inner_of(span: Span) -> list[Span]:
    """Return the spans of a span's requests in their order; of a request that was sent twice, only the last."""
    by_number = {inner.number: inner for inner in span.inner}
    return [by_number[number] for number in sorted(by_number)]


def fields_of(span: Span, span_id: str) -> Record:
    """Return a span as a record without the records inside it; it shares its values with the span."""
    if isinstance(span, VerificationSpan):
        record: Record = {"id": span_id, **span.annotations}
    else:
        status, error, ended = span.outcome or GIVEN_UP
        record = {
            "id": span_id,
            "time": _moment(span.time),
            "service": span.service,
            "call": span.call,
            "caller": span.caller,
            "status": status,
            "outcome": outcome_of(status, span.annotations),
            "ms": None if ended is None else round(1000 * (ended - span.time)),
        }
        if error:
            record["error"] = error
        record |= span.annotations
        if status == 200 and span.call in RELEASED and span.service.startswith("kms"):
            record["released"] = {"fields": list(RELEASED[span.call]), "to": _receiver(span)}
    return record


def outcome_of(status: int | None, annotations: dict[str, Any]) -> str:
    """Return the outcome of a call: `ok`, `denied`, `refused` or `unanswered`."""
    if status is None:
        return "unanswered"
    if status >= 400:
        return "refused"
    decision, verdict = annotations.get("decision"), annotations.get("verdict")
    denied = decision is not None and decision["allowed"] is not True
    return "denied" if denied or (verdict is not None and not verdict["is_valid"]) else "ok"


def _receiver(call: CallSpan) -> dict[str, str] | None:
    """Return the app or KMS that the last decision before a release was about; None if no decision names one."""
    if call.call == "GetTempCaCert":
        return None  # every caller gets it: the decision was about the KMS itself
    annotations = [span.annotations for span in call.inner if isinstance(span, CallSpan)]
    decisions = [found["decision"] for found in annotations if "decision" in found]
    request = decisions[-1].get("asked") if decisions else None
    return None if request is None else {key: request.get(key, "") for key in _RECEIVER}


def _moment(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
