"""What is measured while something grows, and how fast it grows: the slope of a line through its logarithms."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FIT_FROM = 8
"""The smallest size whose value counts for a slope: below it the machine's disturbances are larger than the growth."""

LEAST = 0.1
"""What was added counts for a slope if it is this part of what there was before: less is lost in disturbances."""

Kind = Literal["total", "each"]
Values = dict[str, float]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A quantity that is measured at each size.

    A `total` may grow in proportion to the size (slope 1), less what there is at size 0. A rate `each` must stay as it
    is (slope 0): it is of one call, whatever the size.
    """

    key: str
    title: str
    unit: str
    kind: Kind = "total"
    is_counted: bool = False
    """It is a number that does not depend on the machine, so that a run can be judged by it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that grows: its name in the data, its words, and its quantities.

    `measure` yields the values at size 0 and at each size up to a maximum, while one deployment grows. A size may lack
    the value of a quantity, as size 0 does of what is called.
    """

    name: str
    title: str
    axis: str
    largest: int
    largest_quick: int
    quantities: tuple[Quantity, ...]
    measure: Callable[["Effort"], Iterator[tuple[int, Values]]] = field(compare=False)
    rounds: int = 3
    """How often it is measured unless the caller says: all subjects together take a quarter of an hour at most."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How far something grows, and for how many seconds its calls are counted at each size."""

    largest: int
    seconds: float

    def sizes(self) -> list[int]:
        """Return 1, 2, 4 … and the largest size."""
        return [2**power for power in range(self.largest.bit_length()) if 2**power < self.largest] + [self.largest]


Series = dict[int, Values]
"""The values by size; size 0 is what there is before anything was added."""


def medians(rounds: Sequence[Series]) -> Series:
    """Return the median of each value over the rounds that reached its size."""
    sizes = sorted({size for each in rounds for size in each})
    return {
        size: {key: statistics.median(each[size][key] for each in rounds if size in each) for key in rounds[0][size]}
        for size in sizes
    }


def slope(series: Mapping[int, Values], quantity: Quantity) -> float | None:
    """Return the slope of a quantity over the size, both as logarithms, or None if fewer than three sizes count.

    Of a total only what was added since size 0 counts; of a rate its inverse, the time of one call.
    """
    before = series[0][quantity.key] if quantity.kind == "total" and 0 in series else 0.0
    points = [(size, values[quantity.key] - before) for size, values in series.items() if size >= FIT_FROM]
    points = [(size, value) for size, value in points if value > LEAST * before]
    if len(points) < 3:
        return None
    xs, ys = [math.log(size) for size, _ in points], [math.log(value) for _, value in points]
    found = statistics.linear_regression(xs, ys).slope
    return -found if quantity.kind == "each" else found


def to_json(series: Series) -> list[dict[str, Any]]:
    """Return a series for the file of the data, with six significant digits."""
    return [{"size": size, **{key: float(f"{value:.6g}") for key, value in series[size].items()}} for size in series]


def from_json(points: Sequence[Mapping[str, Any]]) -> Series:
    """Return the series that `to_json` wrote."""
    return {int(point["size"]): {key: value for key, value in point.items() if key != "size"} for point in points}
