"""The ids and times by which the journal's calls are spans of OpenTelemetry.

The ids are derived, so that the same journal has the same ids. A trace id is that of the request's traceparent, or else
the first 16 bytes of the SHA-256 of the seed and of number, time, service, call and caller of the record; a span id is
the first 8 bytes of the SHA-256 of trace id and record id, such as 3.1.2. Times are those of the system clock, because
the clock of a stack may stand still or jump.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Final

from dstack_emu.observability.spans import CallSpan, Span
from dstack_emu.observability.w3c_trace import SAMPLED, Trace

_PATH: Final = "/v1/traces"
"""The path to which a collector takes spans by OTLP over HTTP."""


def traces_url(collector: str) -> str:
    """Return the URL to which spans are sent, of a collector's URL with or without the path for spans."""
    base = collector.rstrip("/")
    return base if base.endswith(_PATH) else base + _PATH


class SpanTrace(Trace):
    """The trace of a call that is exported; `parent_id` is empty if the call begins the trace.

    `record_id` is its id in the journal. `began` and `ended` are nanoseconds of the system clock, `ended` 0 meanwhile.
    `method` and `path` are those of its HTTP request, `url` that of its server, if they are known.
    """

    __slots__ = ("began", "ended", "method", "parent_id", "path", "record_id", "url")

    def __init__(self, above: Trace, parent_id: str, record_id: str) -> None:
        span_id = hashlib.sha256(f"{above.trace_id}:{record_id}".encode()).hexdigest()[:16]
        super().__init__(above.trace_id, span_id, above.flags, above.state)
        self.parent_id, self.record_id = parent_id, record_id
        self.method = self.path = self.url = ""
        self.began, self.ended = time.time_ns(), 0


class Tracer:
    """Gives each call of a journal its ids, and hands calls from outside over to `export` when they have ended.

    `seed` tells stacks of different seeds apart. A call whose caller does not record its trace is not exported.
    """

    def __init__(self, seed: bytes, export: Callable[[CallSpan], None]) -> None:
        self._seed, self._export = seed, export

    def root(self, call: CallSpan, remote: Trace | None) -> SpanTrace:
        """Return the trace of a call from outside, whose request had the trace `remote`."""
        if remote is not None:
            return SpanTrace(remote, remote.span_id, str(call.number))
        text = "\n".join((str(call.number), repr(call.time), call.service, call.call, call.caller))
        trace_id = hashlib.sha256(self._seed + text.encode(errors="surrogateescape")).hexdigest()[:32]
        return SpanTrace(Trace(trace_id, "", SAMPLED), "", str(call.number))

    def inner(self, above: Trace, number: int) -> Trace:
        """Return the trace of request `number` of a span."""
        if not isinstance(above, SpanTrace):
            return above  # it began before calls were traced
        return SpanTrace(above, above.span_id, f"{above.record_id}.{number}")

    def ended(self, span: Span) -> None:
        """Note the end of a span, and export a call that came from outside."""
        trace = span.trace
        if isinstance(trace, SpanTrace):
            trace.ended = time.time_ns()
            if isinstance(span, CallSpan) and not span.is_inner and trace.is_sampled:
                self._export(span)
