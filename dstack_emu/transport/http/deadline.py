"""The deadlines of a server's waits for a client, with one timer for each connection."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

Awaited = Literal["nothing", "request", "head", "body", "reading", "end"]
"""What a connection waits for; `Deadlines` explains each."""

NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The timeouts of a server's waits for a client, in seconds."""

    request: float = 75.0
    """For the next request on an idle connection; then the connection is closed."""
    head: float = 30.0
    """For the whole head of a request, from its first byte; then the answer is 408."""
    body: float = 60.0
    """For the next bytes of a body; then the body fails."""
    reading: float = 60.0
    """For the client to read its answer; then the connection is reset."""
    end: float = 0.5
    """For further bytes after the last answer, which are dropped; closing earlier could lose the answer."""

    def of(self, awaited: Awaited) -> float:
        """Return the timeout of one wait."""
        return NEVER if awaited == "nothing" else float(getattr(self, awaited))


class Deadline:
    """The deadline of one connection; if it passes, `expired` is called with the kind of the wait.

    Ending or renewing a wait does not change the timer: it checks the deadline when it fires, and is set again.
    """

    __slots__ = ("_at", "_deadlines", "_expired", "_loop", "_timer", "awaited")

    def __init__(self, deadlines: Deadlines, expired: Callable[[Awaited], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadlines, self._expired = deadlines, expired
        self._at = NEVER
        self._timer: asyncio.TimerHandle | None = None
        self.awaited: Awaited = "nothing"

    def begin(self, awaited: Awaited) -> None:
        """Begin a wait, which replaces the present one."""
        self.awaited = awaited
        self._at = self._loop.time() + self._deadlines.of(awaited)
        if self._at != NEVER and (self._timer is None or self._timer.when() > self._at):
            self._set_timer()

    def close(self) -> None:
        """End the present wait, and cancel the timer."""
        self.awaited, self._at = "nothing", NEVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._at, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._loop.time() >= self._at:
            awaited = self.awaited
            self.awaited, self._at = "nothing", NEVER
            self._expired(awaited)
        elif self._at != NEVER:
            self._set_timer()
