"""The clock of a stack: what everything in it is judged by, and dated by.

It follows the wall until a person sets, advances or freezes it. Certificates are dated from `ISSUED_AT` for as long as
nobody touched it, so a seed gives the same bytes on any day, and from the clock once somebody did. One thing does not
follow it: OpenSSL checks the dates of a TLS peer's certificate by the wall.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

ISSUED_AT: Final = 1_767_225_600
"""2026-01-01T00:00:00Z: certificates of a stack whose clock nobody touched are dated from here."""

LATEST: Final = 253_402_300_799
"""9999-12-31T23:59:59Z: no certificate can be dated later."""


def wall_clock() -> int:
    """Unix seconds, now."""
    return int(time.time())


class ClockError(ValueError):
    """A time that the clock cannot show."""


@dataclass(frozen=True, slots=True)
class ClockState:
    """All there is to a clock: the moment it stands at, or by how many seconds it is ahead of the wall.

    Neither (`frozen_at` None, `ahead` 0) and not `touched` is the clock as a stack begins with it.
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
    """Unix seconds with their fraction. (The wall's own function until somebody sets the clock: it is asked often.)"""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self.state = ClockState()

    def __call__(self) -> int:
        return int(self.now())

    @property
    def state(self) -> ClockState:
        """All there is to it, to be kept and put back."""
        return self._state

    @state.setter
    def state(self, state: ClockState) -> None:
        self._state = state
        self.now = self._wall if state.frozen_at is None and not state.ahead else self._set_now

    def _set_now(self) -> float:
        state = self._state
        return self._wall() + state.ahead if state.frozen_at is None else state.frozen_at

    def issue(self) -> int:
        """What a certificate made now is dated by."""
        return self() if self.state.touched else ISSUED_AT

    @property
    def is_frozen(self) -> bool:
        """Whether time stands still."""
        return self.state.frozen_at is not None

    def set(self, moment: float) -> None:
        """Put it to a moment (Unix seconds); it runs on from there, unless it is frozen."""
        self._put(moment, frozen=self.is_frozen)

    def advance(self, seconds: float) -> None:
        """Put it forward, or back by a negative number."""
        self._put(self.now() + seconds, frozen=self.is_frozen)

    def freeze(self, moment: float | None = None) -> None:
        """Stop it, at a moment or where it is."""
        self._put(self.now() if moment is None else moment, frozen=True)

    def resume(self) -> None:
        """Let it run on from where it stands."""
        self._put(self.now(), frozen=False)

    def follow_the_wall(self) -> None:
        """Make it the clock that a stack begins with."""
        self.state = ClockState()

    def _put(self, moment: float, *, frozen: bool) -> None:
        stands = ClockState(frozen_at=moment, touched=True)  # which also checks the moment
        self.state = stands if frozen else ClockState(ahead=moment - self._wall(), touched=True)
