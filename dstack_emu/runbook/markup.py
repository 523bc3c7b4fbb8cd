"""Makes elements of HTML. Every text is escaped; only what these functions made is markup."""

from collections.abc import Iterable
from html import escape
from typing import Final

from dstack_emu.observability.svg import escaped

_VOID: Final = frozenset(("meta", "br"))
_BLOCKS: Final = frozenset(
    (
        "html",
        "head",
        "body",
        "header",
        "main",
        "footer",
        "nav",
        "section",
        "article",
        "dl",
        "ul",
        "ol",
        "table",
        "tbody",
    )
)
"""Elements whose children begin on lines of their own, so that a page can be read as text."""


class Markup(str):
    """A text that is markup already."""

    __slots__ = ()


Child = str | Iterable["Child"] | None
"""A child of an element: a text, markup, several of them, or nothing."""


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Markup:
    """Make an element. An attribute `class_` is `class`, `aria_label` is `aria-label`; None and False are left out."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    content = list(_texts(children))
    if name in _BLOCKS:
        return Markup(f"<{name}{given}>\n" + "\n".join(content) + f"\n</{name}>")
    return Markup(f"<{name}{given}>{''.join(content)}</{name}>")


def _texts(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str):
            yield escaped(child)
        elif child is not None:
            yield from _texts(child)
