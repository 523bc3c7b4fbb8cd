"""Where something stands in a JSON text: the line of the value at a path of keys."""

import re
from collections.abc import Sequence
from typing import Final

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_COLON: Final = re.compile(r"\s*:")


def line_of(text: str, path: Sequence[str]) -> int:
    """Return the line, from 1, on which the member at a path of keys begins, or the nearest member around it.

    Keys are compared without regard to case and to the 0x of hex. `text` must be JSON; the members of a list have no
    key, and the path ends before them.
    """
    wanted = [_plain(key) for key in path]
    best, line = 0, 1
    place: list[str | None] = []  # the key of each object or list that is open, None of one without
    key: str | None = None
    for match in _TOKEN.finditer(text):
        word, at = match[0], match.start()
        if word in "{[":
            place.append(key)
            key = None
        elif word in "}]":
            place.pop()
            key = None
        elif word == ",":
            key = None
        elif key is None and word.startswith('"') and _COLON.match(text, match.end()):
            key = _plain(word[1:-1])
            here = [*place[1:], key]
            if here == wanted[: len(here)] and len(here) > best:
                best, line = len(here), text.count("\n", 0, at) + 1
    return line


def _plain(key: str) -> str:
    return key.lower().removeprefix("0x")
