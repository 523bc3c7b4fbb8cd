"""Lays out a record of the journal as a sequence diagram: a lane for each part, an arrow for each call and each answer.

A diagram is a list of shapes, which are elements of SVG. `observability.svg` writes them as a document; the console
makes the same elements in its page. Classes say what came of a call: `ok`, `denied`, `refused`, `unanswered`; the text
of each answer begins with that word, so that nothing depends on colours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from dstack_emu.observability.record import Record
from dstack_emu.observability.record_text import compared_lines, outcome_text, verification_text

_LANE: Final = 150
"""Pixels from one lane to the next."""
_ROW: Final = 24
_LINE: Final = 16
"""Pixels from one line below an answer to the next."""
_MARGIN: Final = 70
_TOP: Final = 60
_CHARACTER: Final = 6.6
"""The width of a character in pixels at most, on average."""
_WIDE_CHARACTER: Final = 7.4
"""The width of a character of a comparison, all of which have the same width."""
_SHOWN_TEXT: Final = 70
"""Characters of a label; the whole text is the title of its arrow."""

Attributes = dict[str, str | float]


@dataclass(frozen=True, slots=True)
class Shape:
    """An element of SVG: `line`, `path`, `rect` or `text`. `title` is what a pointer on it shows."""

    tag: str
    attributes: Attributes
    text: str = ""
    title: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"tag": self.tag, "attributes": self.attributes, "text": self.text, "title": self.title}


@dataclass(slots=True)
class Diagram:
    """A picture of one call; `label` says in words what it is, `description` what every arrow says, a line for each."""

    label: str
    description: str = ""
    width: float = 0
    height: float = 0
    shapes: list[Shape] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        shapes = [shape.to_json() for shape in self.shapes]
        return {
            "label": self.label,
            "description": self.description,
            "width": self.width,
            "height": self.height,
            "shapes": shapes,
        }


def sequence_diagram(*records: Record) -> Diagram:
    """Draw a record of a call, with the calls that it caused in their order; several records below one another."""
    names = list(dict.fromkeys(name for record in records for name in _parts(record)))
    drawing = _Drawing({name: _MARGIN + index * _LANE for index, name in enumerate(names)})
    for record in records:
        drawing.call(record)
    (*_, last) = records
    label = f"{last['caller']} → {last['service']} {last['call']}: {outcome_text(last)}"
    return drawing.finished(label, "\n".join(line for record in records for line in _described(record)))


def shown_inner(record: Record) -> list[Record]:
    """Return the calls inside that are drawn; requests for collateral only if they did not succeed."""
    inner: list[Record] = record.get("inner", [])
    return inner if "call" in record else [each for each in inner if each.get("outcome") != "ok" or "fault" in each]


def _parts(record: Record) -> Iterator[str]:
    """Yield the parts of a record in the order of their first call."""
    if "call" in record:
        yield record["caller"]
        yield record["service"]
    for inner in shown_inner(record):
        yield from _parts(inner)


def _described(record: Record) -> Iterator[str]:
    if "call" in record:
        compared = "".join(f"; {line}" for line in compared_lines(record))
        yield f"{record['caller']} → {record['service']} {record['call']}: {outcome_text(record)}{compared}"
    else:
        yield verification_text(record)
    for inner in shown_inner(record):
        yield from _described(inner)


class _Drawing:
    """A diagram in the making; `y` is where the last row is."""

    def __init__(self, lanes: dict[str, float]) -> None:
        self._lanes, self._y = lanes, float(_TOP)
        self._right = max(lanes.values()) + _MARGIN
        self._shapes: list[Shape] = []

    def call(self, record: Record) -> None:
        """Draw a call, what it caused, and its answer."""
        caller, service = self._lanes[record["caller"]], self._lanes[record["service"]]
        self._arrow(caller, service, "call", _short(record["call"]), record["call"])
        for inner in shown_inner(record):
            if "call" in inner:
                self.call(inner)
            else:
                self._verification(service, inner)
        duration = f" · {record['ms']} ms" if record["ms"] else ""
        text = outcome_text(record)
        self._arrow(service, caller, f"back {record['outcome']}", f"{_short(text)}{duration}", text)
        for line in compared_lines(record):
            self._y += _LINE
            self._label(min(caller, service) + 14, "compared", line, "", character=_WIDE_CHARACTER)

    def _verification(self, lane: float, record: Record) -> None:
        text = verification_text(record)
        self._y += _ROW
        kind = "ok" if record.get("attestation") == "holds" else "refused"
        self._shapes.append(Shape("rect", {"class": "box", "x": lane - 4, "y": self._y - 12, "width": 8, "height": 16}))
        self._label(lane + 10, kind, _short(text), text)
        count = len(record.get("inner", ()))
        if count:
            self._y += _LINE
            self._label(lane + 10, "dim", f"collateral: {count} requests", "")
        for inner in shown_inner(record):
            self.call(inner)

    def _arrow(self, start: float, end: float, kind: str, text: str, title: str) -> None:
        self._y += _ROW
        y, forward = self._y, 1 if end >= start else -1
        way = f"M{start} {y}H{end}" if start != end else f"M{start} {y - 8}h22v8H{start + 2}"
        self._shapes.append(Shape("path", {"class": f"arrow {kind}", "d": way}, title=title))
        tip, pointed = (end, forward) if start != end else (end, -1)
        head = f"M{tip} {y}l{-9 * pointed} -4v8z"
        self._shapes.append(Shape("path", {"class": f"head {kind}", "d": head}))
        self._label(min(start, end) + 14, kind, text, title, y - 6)

    def _label(
        self, x: float, kind: str, text: str, title: str, y: float | None = None, character: float = _CHARACTER
    ) -> None:
        at = self._y if y is None else y
        self._shapes.append(Shape("text", {"class": f"label {kind}", "x": x, "y": at}, text, title))
        self._right = max(self._right, x + len(text) * character + 10)

    def finished(self, label: str, description: str) -> Diagram:
        """Return the diagram, with a lane for each part behind everything."""
        bottom = self._y + _ROW
        lanes = [
            shape
            for name, x in self._lanes.items()
            for shape in (
                Shape("line", {"class": "lane", "x1": x, "x2": x, "y1": _TOP - 20, "y2": bottom}),
                Shape(
                    "text", {"class": "title", "x": x, "y": _TOP - 28, "text-anchor": "middle"}, _short(name, 20), name
                ),
            )
        ]
        return Diagram(label, description, self._right, bottom + 10, [*lanes, *self._shapes])


def _short(text: str, most: int = _SHOWN_TEXT) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
