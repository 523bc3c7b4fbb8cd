"""The journal: a record of every call in a stack, its caller, the calls that it caused, and why it was refused.

There is one record (`observability.record`) for each call from outside the stack; the calls that it caused are inside
it, and no secrets. The last records are kept in memory; if a file is named, all are appended to it as JSON lines.
"""

import contextlib
import fnmatch
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from dstack_emu.observability.backlog import Backlog
from dstack_emu.observability.record import Published, Record, flattened, json_of, record_of, recorded_name
from dstack_emu.observability.spans import COMPLETED, CallSpan, Span, VerificationSpan
from dstack_emu.observability.w3c_trace import Trace

_WAITING: Final = 1000
"""Records that wait for one follower. A follower that falls behind loses the oldest."""


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
