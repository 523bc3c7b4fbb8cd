"""Which call made which: spans, and the header by which they cross the sockets of one stack.

A request that a client sends is handled in another task, so a context variable alone does not reach it. Each client of
a stack therefore adds a header that names who asks and numbers the question; by it the one who is asked finds the span
that it is asked for, and its place among the questions of that span. Only the stack's own services are sent it, never a
webhook that somebody else runs. A place is taken when a question is asked, not when it arrives, so concurrent questions
have the same order in every run.
"""

import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Union

HEADER: Final = "X-Dstack-Emu-Trace"
OUTSIDE: Final = "outside"
"""Who calls when it is no part of the stack."""

Span = Union["CallSpan", "VerificationSpan"]

Outcome = tuple[int | None, str, float | None]
"""How a span ended: status, the text of a refusal, Unix seconds. For a span that was given up, nothing of all that."""

GIVEN_UP: Final[Outcome] = (None, "", None)
JUDGED: Final[Outcome] = (200, "", None)

_NO_NOTES: Final[dict[str, Any]] = {}
_NONE_INNER: Final[list[Any]] = []


class _SpanBase:
    """A part of a trace. `notes` is what was found out on the way, `inner` what was asked for it as it came.

    There are many of them, and they are kept: none refers to the one around it, and what would be empty is not made.
    `place` is which question it answers of the span around it, `places` how many it has asked itself. While `outcome`
    is None it goes on.
    """

    __slots__ = ("inner", "notes", "outcome", "place", "places")

    def __init__(self, place: int) -> None:
        self.place, self.places = place, 0
        self.notes: dict[str, Any] = _NO_NOTES
        self.inner: list[Span] = _NONE_INNER
        self.outcome: Outcome | None = None

    def next_place(self) -> int:
        """The place of the next question asked for it, from 1."""
        self.places += 1
        return self.places

    def note(self, key: str, value: Any) -> None:
        """Note something, which is not changed afterwards."""
        if self.notes is _NO_NOTES:
            self.notes = {key: value}
        else:
            self.notes[key] = value

    def put(self, inner: "Span") -> None:
        """Put in what was asked for it."""
        if self.inner:
            self.inner.append(inner)
        else:
            self.inner = [inner]

    def give_up(self) -> None:
        """Stop waiting: what arrives late, for it or for a request inside it, is not recorded."""
        if self.outcome is None:
            self.outcome = GIVEN_UP
        for inner in self.inner:
            inner.give_up()


class CallSpan(_SpanBase):
    """One call that a service answered, or refused; of one from outside (not `within`) the place is its number."""

    __slots__ = ("call", "caller", "service", "time", "within")

    def __init__(self, within: bool, place: int, service: str, call: str, caller: str, time: float) -> None:
        self.place = place  # and so on as `_Span` has it, without the price of a call
        self.places = 0
        self.notes = _NO_NOTES
        self.inner = _NONE_INNER
        self.outcome = None
        self.within = within
        self.service = service
        self.call = call
        self.caller = caller
        self.time = time


class VerificationSpan(_SpanBase):
    """A verification of evidence; the requests for its collateral are inside."""

    __slots__ = ()


_current: ContextVar[Span | None] = ContextVar("span", default=None)


def current() -> Span | None:
    """The span that this code runs for."""
    return _current.get()


enter = _current.set
"""Run what follows for a span, until `leave` is given what this returns."""
leave = _current.reset


@contextmanager
def entered(span: Span) -> Iterator[None]:
    """Run the block for a span. (At every call `enter` and `leave` are cheaper.)"""
    before = enter(span)
    try:
        yield
    finally:
        leave(before)


Origin = tuple[Span | None, int, str]
"""The span that asks, if it is known here; the place of its question; who asks."""

_asked: Final[dict[str, Origin]] = {}
"""The questions under way between services of this process, by their headers."""
_UNDER_WAY: Final = 4096
"""More than are asked at a time: beyond it lie questions that never arrived."""

_numbers: Final = itertools.count(1)
_PROCESS: Final = secrets.token_hex(8)
"""Two stacks on one machine must not take each other's questions for their own."""


def headers_of(caller: str) -> Callable[[], Mapping[str, str]]:
    """Make the function that gives the headers of what `caller` asks now."""
    alone = {HEADER: caller}

    def headers() -> Mapping[str, str]:
        span = _current.get()
        if span is None:
            return alone
        span.places = place = span.places + 1
        text = f"{caller}:{next(_numbers)}:{_PROCESS}"
        if len(_asked) >= _UNDER_WAY:
            del _asked[next(iter(_asked))]  # the oldest
        _asked[text] = span, place, caller
        return {HEADER: text}

    return headers


def read_header(text: str | None) -> Origin:
    """Find who asks what for; a header that is missing or none of ours is from outside."""
    if text is None:
        return _FROM_OUTSIDE
    asked = _asked.get(text)
    if asked is not None:
        return asked
    caller = text.partition(":")[0]
    return (None, 0, caller) if _is_name(caller) else _FROM_OUTSIDE


def answered(text: str | None) -> None:
    """Forget a question: its answer is there, so it is not sent again."""
    if text is not None:
        _asked.pop(text, None)


_FROM_OUTSIDE: Final[Origin] = (None, 0, OUTSIDE)


def _is_name(caller: str) -> bool:
    return caller.replace("-", "").replace("_", "").isalnum()
