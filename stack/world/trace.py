"""Which call made which: spans, and the header by which they cross the sockets of one stack.

A request that a client sends is handled in another task, so a context variable alone does not reach it. Each client of
a stack therefore adds a header that names the span it asks for, its place among the questions of that span, and who
asks. Only the stack's own services are sent it, never a webhook that somebody else runs. A place is taken when a
question is asked, not when it arrives, so concurrent questions have the same order in every run.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final, Union

HEADER: Final = "X-Dstack-Emu-Trace"
OUTSIDE: Final = "outside"
"""Who calls when it is no part of the stack."""

Child = Union["Call", "Attestation"]

_NOTHING: Final[dict[Any, Any]] = {}


class _Span:
    """A part of a trace. `notes` is what was found out on the way, `inner` what was asked for it, by place.

    There are many of them, and they are kept: no span refers to the one around it, and both dictionaries are made when
    something goes in.
    """

    __slots__ = ("id", "inner", "notes", "places")

    def __init__(self, span: str) -> None:
        self.id = span
        self.notes: dict[str, Any] = _NOTHING
        self.inner: dict[int, Child] = _NOTHING
        self.places = 0

    def note(self, key: str, value: Any) -> None:
        """Note something, which is not changed afterwards."""
        if self.notes is _NOTHING:
            self.notes = {}
        self.notes[key] = value

    def put(self, place: int, inner: Child) -> None:
        """Put what was asked for it in its place."""
        if self.inner is _NOTHING:
            self.inner = {}
        self.inner[place] = inner


class Call(_Span):
    """One call that a service answered, or refused."""

    __slots__ = ("call", "caller", "ended", "error", "service", "status", "time")

    def __init__(self, span: str, service: str, call: str, caller: str, time: float) -> None:
        super().__init__(span)
        self.service, self.call, self.caller, self.time = service, call, caller, time
        self.status: int | None = None
        self.error = ""
        self.ended: float | None = None


class Attestation(_Span):
    """Evidence that was judged: a span, for the collateral that was asked for it."""

    __slots__ = ()


_current: ContextVar[Child | None] = ContextVar("span", default=None)


def current() -> Child | None:
    """The span that this code runs for."""
    return _current.get()


class entered:
    """Run the block for a span. (Written by hand: a generator's context manager costs twice as much, at every call.)"""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Child) -> None:
        self._span = span

    def __enter__(self) -> None:
        self._token = _current.set(self._span)

    def __exit__(self, *raised: object) -> None:
        _current.reset(self._token)


def take_place(span: Child) -> int:
    """The place of the next question asked for a span, from 1."""
    span.places += 1
    return span.places


def headers_of(caller: str) -> Callable[[], Mapping[str, str]]:
    """Make the function that gives the headers of what `caller` asks now."""
    alone = {HEADER: f"::{caller}"}

    def headers() -> Mapping[str, str]:
        span = _current.get()
        return alone if span is None else {HEADER: f"{span.id}:{take_place(span)}:{caller}"}

    return headers


def read_header(text: str | None) -> tuple[str, int, str]:
    """Read span, place and caller; a header that is missing or none of ours is from outside."""
    span, _, rest = (text or "").partition(":")
    place, _, caller = rest.partition(":")
    if not caller or not caller.replace("-", "").replace("_", "").isalnum():
        return "", 0, OUTSIDE
    return (span, int(place), caller) if place.isdecimal() and len(place) < 9 else ("", 0, caller)
