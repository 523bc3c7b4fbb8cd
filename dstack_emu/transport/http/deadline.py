"""How long a server waits for a client, and the one timer that each connection has for it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

Awaited = Literal["nothing", "request", "head", "body", "reading", "end"]
"""What a connection waits for: see `Deadlines`."""

NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a server waits for a client, in seconds."""

    request: float = 75.0
    """For the next request on a kept connection; then the connection is closed."""
    head: float = 30.0
    """For the whole head of a request, from its first byte; then the answer is 408."""
    body: float = 60.0
    """For the next bytes of a body; then it counts as broken."""
    reading: float = 60.0
    """For the client to read what it is answered; then the connection is reset."""
    end: float = 0.5
    """For more of what nobody reads, after the last answer; closing earlier could take the answer along."""

    def of(self, awaited: Awaited) -> float:
        """Return the seconds for one wait."""
        return NEVER if awaited == "nothing" else float(getattr(self, awaited))


class Deadline:
    """The deadline of one connection; `expired` is called with what was waited for in vain.

    A wait that is ended or renewed costs no new timer: the one that runs looks when it fires, and is set anew.
    """

    __slots__ = ("_at", "_deadlines", "_expired", "_loop", "_timer", "awaited")

    def __init__(self, deadlines: Deadlines, expired: Callable[[Awaited], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadlines, self._expired = deadlines, expired
        self._at = NEVER
        self._timer: asyncio.TimerHandle | None = None
        self.awaited: Awaited = "nothing"

    def begin(self, awaited: Awaited) -> None:
        """Wait for this from now on, and no longer for anything else."""
        self.awaited = awaited
        self._at = self._loop.time() + self._deadlines.of(awaited)
        if self._at != NEVER and (self._timer is None or self._timer.when() > self._at):
            self._set_timer()

    def close(self) -> None:
        """Wait for nothing any more."""
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
