"""The results of benchmarks: figures with their bars, and the comparison of rates."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dstack_emu.attest.release import DEFAULT, Release

Measure = Callable[["Effort"], Iterable["Figure"]]


@dataclass(frozen=True, slots=True)
class Effort:
    """The duration of a benchmark: `rounds` rounds of `seconds` for each side; a process is started `starts` times.

    A value that grows with the number of calls is measured after `calls` calls. Guests and KMS are of `release`.
    """

    rounds: int = 5
    seconds: float = 0.8
    starts: int = 5
    calls: int = 10_000
    release: Release = DEFAULT


FULL, QUICK = Effort(), Effort(rounds=3, seconds=0.25, starts=3, calls=1000)


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit for a value: a minimum or a maximum."""

    value: float
    at_most: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a value is within the limit."""
        return value <= self.value if self.at_most else value >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {show(self.value)}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a run. A figure without a bar serves to interpret the others."""

    name: str
    value: float
    unit: str
    bar: Bar | None = None

    @property
    def ok(self) -> bool:
        """Return whether the figure meets its bar, or has none."""
        return self.bar is None or self.bar.holds(self.value)

    def to_json(self) -> dict[str, Any]:
        """Return the entry for latest.json."""
        bar = None if self.bar is None else str(self.bar)
        return {"value": float(show(self.value)), "unit": self.unit, "bar": bar, "ok": self.ok}

    def __str__(self) -> str:
        verdict = "" if self.bar is None else f"  bar {self.bar}: {'ok' if self.ok else 'MISSED'}"
        return f"{self.name:<34} {show(self.value):>8} {self.unit:<28}{verdict}".rstrip()


def show(value: float) -> str:
    """Format a number with its significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rate_of(work: Callable[[], object]) -> Callable[[float], float]:
    """Make a measurement that calls a function for some seconds and returns the calls per second."""

    def measure(seconds: float) -> float:
        calls, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            for _ in range(8):  # reading the clock costs time, too
                work()
            calls += 8
        return calls / elapsed

    return measure


def alternate(effort: Effort, *sides: Callable[[float], float]) -> list[list[float]]:
    """Measure the sides alternately, A B A B …, after a warm-up; return the rates of each side, round by round."""
    for side in sides:
        side(effort.seconds / 2)
    rounds = [[side(effort.seconds) for side in sides] for _ in range(effort.rounds)]
    return [list(rates) for rates in zip(*rounds, strict=True)]


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratio(rates: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median of the ratios within rounds: a disturbance of both sides of a round cancels out."""
    return statistics.median(a / b for a, b in zip(rates, reference, strict=True))
