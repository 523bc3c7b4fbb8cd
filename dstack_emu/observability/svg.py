"""Writes a sequence diagram as SVG: a document that loads nothing, has no script, and is light or dark as its reader.

The same diagram gives the same bytes. The title and the description say in words what the picture shows.
"""

from html import escape
from typing import Final

from dstack_emu.observability.sequence_diagram import Diagram, Shape

STYLE: Final = """
svg { font: 13px system-ui, sans-serif; background: #fff; } svg text { fill: #1b1f24; } svg .dim { fill: #56606b; }
svg .lane { stroke: #c3cad2; } svg .title { font-weight: 600; } svg .label { font-size: 12px; }
svg .label { paint-order: stroke; stroke: #fff; stroke-width: 3px; } svg .box { fill: #f3f5f7; stroke: #56606b; }
svg .compared { font-family: ui-monospace, monospace; white-space: pre; }
svg .arrow { fill: none; stroke: #56606b; stroke-width: 1.5; } svg .head { fill: #56606b; }
svg .arrow.back { stroke-dasharray: 5 3; }
svg .arrow.ok { stroke: #176b2c; } svg .head.ok, svg text.ok { fill: #176b2c; }
svg .arrow.denied, svg .arrow.refused { stroke: #b3101e; stroke-width: 2.5; }
svg .head.denied, svg .head.refused, svg text.denied, svg text.refused { fill: #b3101e; }
svg .arrow.unanswered { stroke: #7a4d00; stroke-width: 2.5; }
svg .head.unanswered, svg text.unanswered { fill: #7a4d00; }
@media screen and (prefers-color-scheme: dark) {
svg { background: #14181d; } svg text { fill: #e4e8ec; } svg .dim { fill: #a2adb8; } svg .lane { stroke: #46505b; }
svg .label { stroke: #14181d; } svg .box { fill: #1f252c; stroke: #a2adb8; }
svg .arrow { stroke: #a2adb8; } svg .head { fill: #a2adb8; }
svg .arrow.ok { stroke: #7fd494; } svg .head.ok, svg text.ok { fill: #7fd494; }
svg .arrow.denied, svg .arrow.refused { stroke: #ff9a9f; }
svg .head.denied, svg .head.refused, svg text.denied, svg text.refused { fill: #ff9a9f; }
svg .arrow.unanswered { stroke: #f0c170; } svg .head.unanswered, svg text.unanswered { fill: #f0c170; }
}
"""
"""The style of a diagram, for a document of its own and for one in a page. A printed one is light."""


def svg(diagram: Diagram) -> str:
    """Write a diagram as an SVG document with a style of its own."""
    namespace = ' xmlns="http://www.w3.org/2000/svg"'
    return (
        f"<svg{namespace}{_attributes(diagram)}>\n{_words(diagram)}<style>{STYLE}</style>\n{_shapes(diagram)}</svg>\n"
    )


def inline_svg(diagram: Diagram) -> str:
    """Write a diagram as an element of a page that has `STYLE`."""
    return f"<svg{_attributes(diagram)}>\n{_words(diagram)}{_shapes(diagram)}</svg>"


def _attributes(diagram: Diagram) -> str:
    size = f"{diagram.width:g} {diagram.height:g}"
    return f' role="img" width="{diagram.width:g}" height="{diagram.height:g}" viewBox="0 0 {size}"'


def _words(diagram: Diagram) -> str:
    return f"<title>{escaped(diagram.label)}</title>\n<desc>{escaped(diagram.description)}</desc>\n"


def _shapes(diagram: Diagram) -> str:
    return "".join(f"{_element(shape)}\n" for shape in diagram.shapes)


def _element(shape: Shape) -> str:
    attributes = "".join(f' {name}="{escaped(_value(value))}"' for name, value in shape.attributes.items())
    title = f"<title>{escaped(shape.title)}</title>" if shape.title else ""
    return f"<{shape.tag}{attributes}>{title}{escaped(shape.text)}</{shape.tag}>"


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def escaped(text: str) -> str:
    """Escape a text, and replace what XML cannot have."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return escape(text)
