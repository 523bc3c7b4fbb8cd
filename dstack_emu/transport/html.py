"""The frame of the HTML pages of all services: one style, a header that says that nothing is protected, and a policy.

The style is `static/style.css` after `static/colours.css`. The console serves it as a file; every other page has it
inside, because the route tables of the real services have no place for it. A page loads nothing, and runs no script but
its own.
"""

import base64
import functools
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Final

STYLE_FILE: Final = "style.css"


class Markup(str):
    """A text that is markup already; every other text is escaped."""

    __slots__ = ()


@functools.cache
def colours() -> str:
    """Return the colours of all pages (CSS)."""
    return resources.files(__package__).joinpath("static", "colours.css").read_text()


@functools.cache
def style_sheet() -> str:
    """Return the style of all pages (CSS), with their colours."""
    return colours() + resources.files(__package__).joinpath("static", STYLE_FILE).read_text()


def style_element() -> str:
    """Return the style as an element of a page's head."""
    return f"<style>{style_sheet()}</style>"


def content_security_policy(script: str = "") -> str:
    """Return the header that lets a page have the style, and if it has a script, run that and call its own server."""
    scripts = f"script-src {_hash_of(script)}; connect-src 'self'; " if script else ""
    return (
        f"default-src 'none'; {scripts}style-src {_hash_of(style_sheet())}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(title: str, part: str, *body: str) -> str:
    """Return a page (HTML) of a part of dstack: `body` is markup, title and part are text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n{style_element()}\n</head>\n<body>\n{header(part)}\n"
        f"<main>\n<h1>{escape(title)}</h1>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def header(part: str) -> str:
    """Return the header of the pages of a part."""
    return f'<header><p class="name">{escape(part)} <strong>EMULATED: protects nothing</strong></p></header>'


def table(label: str, names: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> str:
    """Return a table (markup) that scrolls for itself; `empty` is said if it has no row."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = "".join(f"<tr>{''.join(f'<td>{_markup(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    nothing = f'<tr><td colspan="{len(names)}">{escape(empty)}</td></tr>\n'
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}"><table class="listing">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n"
        f"{lines or nothing}</tbody>\n</table></div>\n"
    )


def facts(members: Iterable[tuple[str, str]]) -> str:
    """Return names and values as a list (markup)."""
    terms = "".join(f'<dt>{escape(name)}</dt><dd class="mono">{_markup(value)}</dd>\n' for name, value in members)
    return f'<dl class="facts">\n{terms}</dl>\n'


def _markup(text: str) -> str:
    return text if isinstance(text, Markup) else escape(text)
