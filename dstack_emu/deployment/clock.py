"""The clock of a stack: the time at which evidence is verified and certificates are issued.

It follows the wall clock until it is set, advanced or frozen. Until then certificates have the date `ISSUED_AT`, so
that a seed gives the same bytes on any day; after that they have the clock's date. OpenSSL does not use this clock: it
checks the dates of a TLS peer's certificate by the wall clock.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

ISSUED_AT: Final = 1_767_225_600
"""2026-01-01T00:00:00Z: the date of certificates of a stack whose clock was never changed."""

LATEST: Final = 253_402_300_799
"""9999-12-31T23:59:59Z: no certificate can be dated later."""


def wall_clock() -> int:
    """Return the time of the machine's own clock, in Unix seconds."""
    return int(time.time())


class ClockError(ValueError):
    """The clock cannot be set to this time."""


@dataclass(frozen=True, slots=True)
class ClockState:
    """The state of a clock: the time at which it is frozen, or the seconds by which it is ahead of the wall clock.

    In the beginning it is neither (`frozen_at` None, `ahead` 0), and not `touched`.
    """

    frozen_at: float | None = None
    ahead: float = 0.0
    touched: bool = False

    def __post_init__(self) -> None:
        if self.frozen_at is not None and not 0 <= self.frozen_at <= LATEST:
            raise ClockError(f"time: Unix seconds from 0 to {LATEST} expected, got {self.frozen_at:g}")
        if abs(self.ahead) > LATEST:
            raise ClockError(f"clock: at most {LATEST} seconds from the wall clock expected, got {self.ahead:g}")


class StackClock:
    """The clock of one stack. Call it to get the time in Unix seconds."""

    now: Callable[[], float]
    """Returns Unix seconds with a fraction. While the clock is not set, it is the wall clock's function, for speed."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._waiting: set[asyncio.Future[None]] = set()
        self.restore(ClockState())

    def __call__(self) -> int:
        return int(self.now())

    def capture(self) -> ClockState:
        """Return the state of the clock."""
        return self._state

    def restore(self, state: ClockState) -> None:
        """Restore a captured state."""
        self._state = state
        self.now = self._wall if state.frozen_at is None and not state.ahead else self._set_now
        while self._waiting:
            self._waiting.pop().set_result(None)

    async def reached(self, moment: float) -> None:
        """Wait until the clock shows a time in Unix seconds; while it is frozen that may be forever."""
        while (left := moment - self.now()) > 0:
            changed = asyncio.get_running_loop().create_future()
            self._waiting.add(changed)
            try:
                await asyncio.wait([changed], timeout=None if self.is_frozen else left)
            finally:
                self._waiting.discard(changed)

    def _set_now(self) -> float:
        state = self._state
        return self._wall() + state.ahead if state.frozen_at is None else state.frozen_at

    def issue(self) -> int:
        """Return the date of a certificate that is issued now, in Unix seconds."""
        return self() if self.is_touched else ISSUED_AT

    @property
    def is_frozen(self) -> bool:
        """Whether the clock is frozen."""
        return self._state.frozen_at is not None

    @property
    def is_touched(self) -> bool:
        """Whether the clock has been set, advanced or frozen."""
        return self._state.touched

    def set(self, moment: float) -> None:
        """Set the clock to a time in Unix seconds; it continues from there, unless it is frozen."""
        self._put(moment, frozen=self.is_frozen)

    def advance(self, seconds: float) -> None:
        """Advance the clock; a negative number sets it back."""
        self._put(self.now() + seconds, frozen=self.is_frozen)

    def freeze(self, moment: float | None = None) -> None:
        """Freeze the clock, at a time or at its present time."""
        self._put(self.now() if moment is None else moment, frozen=True)

    def resume(self) -> None:
        """Let a frozen clock continue from its present time."""
        self._put(self.now(), frozen=False)

    def follow_the_wall(self) -> None:
        """Let the clock follow the wall clock again, as when the stack started."""
        self.restore(ClockState())

    def _put(self, moment: float, *, frozen: bool) -> None:
        frozen_state = ClockState(frozen_at=moment, touched=True)  # this also validates the time
        self.restore(frozen_state if frozen else ClockState(ahead=moment - self._wall(), touched=True))
