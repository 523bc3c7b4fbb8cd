"""The clock of a stack: evidence is verified, and certificates are dated, at its time.

It follows the wall clock until it is set, advanced or frozen. Until then certificates are dated `ISSUED_AT`, so a seed
gives the same bytes on any day; after that they are dated by the clock. One thing does not follow it: OpenSSL checks
the dates of a TLS peer's certificate by the wall clock.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

ISSUED_AT: Final = 1_767_225_600
"""2026-01-01T00:00:00Z: the date of certificates of a stack whose clock was not touched."""

LATEST: Final = 253_402_300_799
"""9999-12-31T23:59:59Z: no certificate can be dated later."""


def wall_clock() -> int:
    """Return the time of the machine's own clock, in Unix seconds."""
    return int(time.time())


class ClockError(ValueError):
    """A time that the clock cannot show."""


@dataclass(frozen=True, slots=True)
class ClockState:
    """The state of a clock: the moment it is frozen at, or by how many seconds it is ahead of the wall clock.

    A stack begins with neither (`frozen_at` None, `ahead` 0), and not `touched`.
    """

    frozen_at: float | None = None
    ahead: float = 0.0
    touched: bool = False

    def __post_init__(self) -> None:
        if self.frozen_at is not None and not 0 <= self.frozen_at <= LATEST:
            raise ClockError(f"time: Unix seconds from 0 to {LATEST} expected, got {self.frozen_at:g}")
        if abs(self.ahead) > LATEST:
            raise ClockError(f"clock: at most {LATEST} seconds from the wall's expected, got {self.ahead:g}")


class StackClock:
    """The time of one stack. Call it for Unix seconds."""

    now: Callable[[], float]
    """Unix seconds with their fraction. (While the clock is not set, the wall's own function: it is called often.)"""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self.restore(ClockState())

    def __call__(self) -> int:
        return int(self.now())

    def capture(self) -> ClockState:
        """Return the state of the clock."""
        return self._state

    def restore(self, state: ClockState) -> None:
        """Put a captured state back."""
        self._state = state
        self.now = self._wall if state.frozen_at is None and not state.ahead else self._set_now

    def _set_now(self) -> float:
        state = self._state
        return self._wall() + state.ahead if state.frozen_at is None else state.frozen_at

    def issue(self) -> int:
        """Return the date of a certificate that is issued now, in Unix seconds."""
        return self() if self.is_touched else ISSUED_AT

    @property
    def is_frozen(self) -> bool:
        """Whether time stands still."""
        return self._state.frozen_at is not None

    @property
    def is_touched(self) -> bool:
        """Whether the clock has been set, advanced or frozen."""
        return self._state.touched

    def set(self, moment: float) -> None:
        """Set it to a moment (Unix seconds); it runs on from there, unless it is frozen."""
        self._put(moment, frozen=self.is_frozen)

    def advance(self, seconds: float) -> None:
        """Set it forward, or back by a negative number."""
        self._put(self.now() + seconds, frozen=self.is_frozen)

    def freeze(self, moment: float | None = None) -> None:
        """Stop it, at a moment or at its present time."""
        self._put(self.now() if moment is None else moment, frozen=True)

    def resume(self) -> None:
        """Let it run on from the time that it shows."""
        self._put(self.now(), frozen=False)

    def follow_the_wall(self) -> None:
        """Make it follow the wall clock again, as at the stack's start."""
        self.restore(ClockState())

    def _put(self, moment: float, *, frozen: bool) -> None:
        stands = ClockState(frozen_at=moment, touched=True)  # which also checks the moment
        self.restore(stands if frozen else ClockState(ahead=moment - self._wall(), touched=True))
