"""Draws how something grows as SVG: a panel for each quantity, both axes logarithmic, a dot for each size.

The same data gives the same bytes. The picture loads nothing, is light or dark as its reader, and has a title and a
description in words; the page that shows it has the numbers as a table.
"""

import math
from collections.abc import Iterator
from html import escape
from typing import Final

from bench.scale.growth import Quantity, Series, Subject, slope

_STYLE: Final = """
svg { font: 13px system-ui, sans-serif; background: #fff; } text { fill: #1b1f24; } .dim { fill: #56606b; }
.small { font-size: 11px; } .grid { stroke: #dfe3e8; } .line { fill: none; stroke: #0b5cad; stroke-width: 2; }
.dot { fill: #0b5cad; } .even { fill: none; stroke: #8a6100; stroke-width: 1.5; stroke-dasharray: 5 4; }
.title { font-weight: 600; }
@media (prefers-color-scheme: dark) {
svg { background: #14181d; } text { fill: #e4e8ec; } .dim { fill: #a2adb8; } .grid { stroke: #333c45; }
.line { stroke: #7cb8f5; } .dot { fill: #7cb8f5; } .even { stroke: #f0c170; } }
"""
_COLUMNS: Final = 2
_WIDTH: Final = 420
_HEIGHT: Final = 270
"""The height of a panel in pixels; its width is above."""
_LEFT: Final = 62
"""The margins of a panel around its plot, here and below."""
_RIGHT: Final = 18
_TOP: Final = 44
_BOTTOM: Final = 52
_HEAD: Final = 56


def draw(subject: Subject, series: Series) -> str:
    """Return the picture of a subject, with a line for each quantity and one that grows as its work does."""
    rows = math.ceil(len(subject.quantities) / _COLUMNS)
    width, height = _COLUMNS * _WIDTH, _HEAD + rows * _HEIGHT
    described = " ".join(_in_words(quantity, series) for quantity in subject.quantities)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-labelledby="title description">',
        f'<title id="title">{escape(subject.title)}</title>',
        f'<desc id="description">{escape(described)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="16" y="24" font-size="16">{escape(subject.title)}</text>',
        '<text class="dim small" x="16" y="43">Both axes are logarithmic. '
        "Dashed: growth in proportion to the size; for calls, no change.</text>",
    ]
    for number, quantity in enumerate(subject.quantities):
        x, y = number % _COLUMNS * _WIDTH, _HEAD + number // _COLUMNS * _HEIGHT
        lines += [f'<g transform="translate({x} {y})">', *_panel(subject, quantity, series), "</g>"]
    return "\n".join([*lines, "</svg>\n"])


def _in_words(quantity: Quantity, series: Series) -> str:
    sizes = [size for size in series if size]
    first, last = sizes[0], sizes[-1]
    steepness = slope(series, quantity)
    text = f"{quantity.title}, {quantity.unit}: {number(series[first][quantity.key])} at {first}"
    text += f", {number(series[last][quantity.key])} at {last}"
    return f"{text}." if steepness is None else f"{text}; slope {steepness:.2f}."


def number(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class _Scale:
    """Places positive values on a logarithmic axis from `start` to `end` pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._span = math.log10(low), math.log10(high / low)
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        return self._start + (math.log10(value) - self._low) / self._span * self._length


def _panel(subject: Subject, quantity: Quantity, series: Series) -> Iterator[str]:
    points = [(size, values[quantity.key]) for size, values in series.items() if size]
    marks = _marks(min(value for _, value in points), max(value for _, value in points))
    left, bottom, right = _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    across = _Scale(points[0][0], max(points[-1][0], points[0][0] * 2), left + 8, right - 8)
    up = _Scale(marks[0], marks[-1], bottom, _TOP)
    yield f'<text class="title" x="16" y="20">{escape(quantity.title)}</text>'
    yield f'<text class="dim small" x="16" y="36">{escape(quantity.unit)}</text>'
    for mark in marks:
        y = up(mark)
        yield f'<path class="grid" d="M{left} {y:.1f}H{right}"/>'
        yield f'<text class="dim small" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_mark(mark)}</text>'
    for size, _ in points[:: 1 if len(points) < 7 else 2]:
        yield f'<text class="dim small" x="{across(size):.1f}" y="{bottom + 17}" text-anchor="middle">{size:,}</text>'
    axis = f'x="{(left + right) / 2:.0f}" y="{bottom + 35}" text-anchor="middle"'
    yield f'<text class="dim small" {axis}>{escape(subject.axis)}</text>'
    yield from _even(quantity, points, across, up, marks)
    places = [f"{across(size):.1f} {up(value):.1f}" for size, value in points]
    yield f'<path class="line" d="M{"L".join(places)}"/>'
    for size, value in points:
        shown = f"{size:,}: {number(value)} {quantity.unit}"
        yield (
            f'<circle class="dot" cx="{across(size):.1f}" cy="{up(value):.1f}" r="3.5">'
            f"<title>{escape(shown)}</title></circle>"
        )


def _even(
    quantity: Quantity, points: list[tuple[int, float]], across: _Scale, up: _Scale, marks: list[float]
) -> Iterator[str]:
    """Draw the line through the last point that a quantity of slope 1, or a rate of slope 0, has, within the marks."""
    last_size, last = points[-1]
    if quantity.kind == "each":
        first_size, first = float(points[0][0]), last
    else:
        first = max(marks[0], last * points[0][0] / last_size)
        first_size = last_size * first / last
    if first_size < last_size:
        start = f"{across(first_size):.1f} {up(first):.1f}"
        yield f'<path class="even" d="M{start}L{across(last_size):.1f} {up(last):.1f}"/>'


def _marks(low: float, high: float) -> list[float]:
    """Return round values around all points: 1, 2 or 5 times a power of ten, at most eight of them."""
    round_values = [factor * 10.0**power for power in range(-6, 10) for factor in (1, 2, 5)]
    start = max(i for i, value in enumerate(round_values) if value <= low)
    end = min(i for i, value in enumerate(round_values) if value >= high)
    if end == start:
        end += 1
    marks = round_values[start : end + 1]
    step = math.ceil((len(marks) - 1) / 7)
    return marks[::step] if marks[::step][-1] == marks[-1] else [*marks[::step], marks[-1]]


def _mark(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
