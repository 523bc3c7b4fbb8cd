"""Spans: which call caused which, and the header that carries this from service to service.

A server handles a request in another task than the client that sent it, so a context variable alone does not connect
the two. Each client in a stack therefore sends a header with its name and the number of the request; the server finds
the parent span by it. The header is sent only to the stack's own services, never to a webhook that somebody else runs.
If the call belongs to a trace of other programs (`w3c_trace`), its requests have the headers of that, too.
A request gets its number when it is sent, not when it arrives, so concurrent requests have the same order in every run.
"""

import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Union

from dstack_emu.observability.w3c_trace import Trace

HEADER: Final = "X-Dstack-Emu-Trace"
OUTSIDE: Final = "outside"
"""The caller's name if it is not a part of the stack."""

Span = Union["CallSpan", "VerificationSpan"]

Outcome = tuple[int | None, str, float | None]
"""How a span ended: its status, the text of a refusal, and the time in Unix seconds."""

GIVEN_UP: Final[Outcome] = (None, "", None)
"""The outcome of a span whose caller stopped waiting."""
COMPLETED: Final[Outcome] = (200, "", None)
"""The outcome of a verification, whatever its verdict is."""

_NO_ANNOTATIONS: Final[dict[str, Any]] = {}
_NO_INNER: Final[list[Any]] = []


class _SpanBase:
    """A span: `number` is its number among its parent's requests, `requests` how many it has sent itself.

    `annotations` are facts about it, `inner` the spans of its requests in the order of their arrival. `outcome` is None
    until it ends. `trace` is the trace of other programs that it belongs to, None if there is none. The journal keeps
    many spans: to save memory, a span does not refer to its parent, and empty containers are shared.
    """

    __slots__ = ("annotations", "inner", "number", "outcome", "requests", "trace")

    def __init__(self, number: int) -> None:
        self.number, self.requests = number, 0
        self.annotations: dict[str, Any] = _NO_ANNOTATIONS
        self.inner: list[Span] = _NO_INNER
        self.outcome: Outcome | None = None
        self.trace: Trace | None = None

    def next_number(self) -> int:
        """Count a request, and return its number, from 1."""
        self.requests += 1
        return self.requests

    def annotate(self, key: str, value: Any) -> None:
        """Set an annotation; the value must not change afterwards.

        Another thread may read the annotations meanwhile, so they are replaced.
        """
        self.annotations = {**self.annotations, key: value}

    def put(self, inner: "Span") -> None:
        """Add the span of one of its requests."""
        if self.inner:
            self.inner.append(inner)
        else:
            self.inner = [inner]

    def give_up(self) -> None:
        """End the span because its caller stopped waiting; nothing is recorded for it or inside it from now on."""
        if self.outcome is None:
            self.outcome = GIVEN_UP
        for inner in self.inner:
            inner.give_up()


class CallSpan(_SpanBase):
    """A call to a service. The calls from outside (`is_inner` false) are numbered through the whole journal."""

    __slots__ = ("call", "caller", "is_inner", "service", "time")

    def __init__(self, is_inner: bool, number: int, service: str, call: str, caller: str, time: float) -> None:
        self.number = number  # the fields of `_SpanBase` are set here, which saves a call
        self.requests = 0
        self.annotations = _NO_ANNOTATIONS
        self.inner = _NO_INNER
        self.outcome = None
        self.trace = None
        self.is_inner = is_inner
        self.service = service
        self.call = call
        self.caller = caller
        self.time = time


class VerificationSpan(_SpanBase):
    """A verification of evidence; the requests for its collateral are inside it."""

    __slots__ = ()


_current: ContextVar[Span | None] = ContextVar("span", default=None)


def current() -> Span | None:
    """Return the span that the current task works for, None if there is none."""
    return _current.get()


enter = _current.set
"""Make a span the current one; return a token for `leave`."""
leave = _current.reset
"""Make the previous span the current one again; takes the token of `enter`."""


@contextmanager
def entered(span: Span) -> Iterator[None]:
    """Make a span the current one within a block. On hot paths, `enter` and `leave` cost less."""
    before = enter(span)
    try:
        yield
    finally:
        leave(before)


TraceContext = tuple[Span | None, int, str]
"""What a request's header refers to: the parent span if it is of this process, the request's number, the caller."""

_under_way: Final[dict[str, TraceContext]] = {}
"""The requests under way between services of this process, by their headers."""
_MAX_UNDER_WAY: Final = 4096
"""More requests than are ever under way: older ones never arrived, and are forgotten."""

_numbers: Final = itertools.count(1)
_PROCESS: Final = secrets.token_hex(8)
"""Part of the header, so that two stacks on one machine do not confuse their requests."""


def headers_of(caller: str) -> Callable[[], Mapping[str, str]]:
    """Make the function that returns the headers of the next request of `caller`."""
    without_span = {HEADER: caller}

    def headers() -> Mapping[str, str]:
        span = _current.get()
        if span is None:
            remote = remote_trace()
            return without_span if remote is None else {**without_span, **remote.headers}
        span.requests = number = span.requests + 1
        text = f"{caller}:{next(_numbers)}:{_PROCESS}"
        if len(_under_way) >= _MAX_UNDER_WAY:
            del _under_way[next(iter(_under_way))]  # the oldest
        _under_way[text] = span, number, caller
        return {HEADER: text} if span.trace is None else {HEADER: text, **span.trace.headers}

    return headers


def trace_headers() -> Mapping[str, str]:
    """Return the headers of the next request to a service outside the stack: none but those of its trace."""
    span = _current.get()
    trace = remote_trace() if span is None else span.trace
    return {} if trace is None else trace.headers


_remote: ContextVar[list[Trace] | None] = ContextVar("remote", default=None)


def remote_trace() -> Trace | None:
    """Return the trace of the request to the control API that the current task works for, None if there is none."""
    traces = _remote.get()
    return traces[0] if traces else None


@contextmanager
def working_for(trace: Trace | None) -> Iterator[None]:
    """Let what is called within a block belong to a trace; a task that it leaves behind no longer does."""
    if trace is None:
        yield
        return
    traces = [trace]
    before = _remote.set(traces)
    try:
        yield
    finally:
        traces.clear()
        _remote.reset(before)


def read_header(text: str | None) -> TraceContext:
    """Return the trace context of a header; a header that is missing or not ours is of a call from outside."""
    if text is None:
        return _FROM_OUTSIDE
    trace = _under_way.get(text)
    if trace is not None:
        return trace
    caller = text.partition(":")[0]
    return (None, 0, caller) if _is_name(caller) else _FROM_OUTSIDE


def forget_request(text: str | None) -> None:
    """Forget the request of a header: it is answered, so it will not be sent again."""
    if text is not None:
        _under_way.pop(text, None)


_FROM_OUTSIDE: Final[TraceContext] = (None, 0, OUTSIDE)


def _is_name(caller: str) -> bool:
    return caller.replace("-", "").replace("_", "").isalnum()
