"""Text for a terminal: colours where they are wanted, and nothing of others that could play tricks on it."""

import os
from typing import TextIO

BOLD, RED, GREEN, YELLOW = "1", "31", "32", "33"


def wants_colour(stream: TextIO) -> bool:
    """Colours only for a terminal, and not where NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, tone: str, colour: bool) -> str:
    """Put text in a colour."""
    return f"\033[{tone}m{text}\033[0m" if colour and tone else text


def printable(text: str) -> str:
    """Text of others, with whatever could play tricks on a terminal spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
