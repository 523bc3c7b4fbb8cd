"""JSON as the parsers of dstack's programs take it, which is less than Python's own takes.

NaN and Infinity are refused, nesting is bounded, and a member that is named twice is an error, unless the reader has a
rule of its own for it. Sources: serde_json, which dstack reads with, and JavaScript's `JSON.parse`, which the webhooks
read with.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn

Members = Callable[[list[tuple[str, Any]]], Any]
"""Makes a value of an object's members, in the order of the text."""


class ConstantError(ValueError):
    """NaN, Infinity or -Infinity (`constant`), which are Python's and not JSON's."""

    def __init__(self, constant: str) -> None:
        super().__init__(f"{constant} is not JSON")
        self.constant = constant


class DuplicateMemberError(ValueError):
    """An object that names a member twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"duplicate field `{name}`")


class NestingError(ValueError):
    """Text that is nested more deeply than the parser goes."""


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's members by name; raise `DuplicateMemberError`."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise DuplicateMemberError(name)
        members[name] = value
    return members


def has_lone_surrogate(text: str) -> bool:
    """Return whether a string has half of a surrogate pair, which an escape can spell and no UTF-8 text has.

    serde_json refuses it in what it reads, JavaScript does not.
    """
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


class StrictJson:
    """A reader of JSON.

    `members` makes the value of an object (None: a dict, in which the last of two members of one name counts),
    `integer` the value of a number without point and exponent.
    """

    def __init__(self, *, members: Members | None = unique_members, integer: Callable[[str], Any] = int) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=members, parse_int=integer, parse_constant=_refuse_constant)

    def parse(self, text: str) -> Any:
        """Parse exactly one value.

        Raises `ValueError`: `json.JSONDecodeError` with the position, or one of this module's.
        """
        try:
            return self._decoder.decode(text)
        except RecursionError as error:
            raise NestingError("maximum recursion depth exceeded") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ConstantError(constant)
