"""Text for a terminal: colours if they are enabled, and no control characters from foreign text."""

import os
from typing import TextIO

BOLD, RED, GREEN, YELLOW = "1", "31", "32", "33"


def wants_colour(stream: TextIO) -> bool:
    """Return whether to use colours: only on a terminal, and not if NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, tone: str, colour: bool) -> str:
    """Colour a text, if colours are enabled."""
    return f"\033[{tone}m{text}\033[0m" if colour and tone else text


def printable(text: str) -> str:
    """Return foreign text with unprintable characters, which could control a terminal, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
