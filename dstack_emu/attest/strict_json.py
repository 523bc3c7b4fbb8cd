"""JSON as the parsers of dstack's programs take it, which is less than Python's own takes.

NaN and Infinity are refused, nesting and the number of values are bounded, and a member that is named twice is an
error, unless the reader has a rule of its own for it. Sources: serde_json, which dstack reads with, and JavaScript's
`JSON.parse`, which the webhooks read with.
"""

import json
from collections.abc import Callable
from typing import Any, Final, NoReturn

MAX_VALUES: Final = 100_000
"""The maximum number of values in a text, those of members and elements among them.

An empty array or object counts as two. A value takes up to a hundred bytes of memory for two of the text. Real programs
send the most values in an event log: about a thousand.
"""

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
        super().__init__(f"duplicate field `{name:.200}`")


class NestingError(ValueError):
    """Text that is nested more deeply than the parser goes."""


class TooManyValuesError(ValueError):
    """Text that has more values than the reader takes."""

    def __init__(self, most: int) -> None:
        super().__init__(f"at most {most} JSON values expected, got more")


def require_few_values(text: str, most: int = MAX_VALUES) -> None:
    """Count the values of a text before it is parsed; raise `TooManyValuesError` if there are more than `most`."""
    if len(text) <= most or _count_values(text) <= most:  # no value is shorter than a character
        return
    # The content of strings does not count. Each string is a value or the name of one.
    pieces = text.replace("\\\\", "").replace('\\"', "").split('"', 4 * most)
    if len(pieces) > 4 * most or sum(map(_count_values, pieces[::2])) - len(pieces[::2]) >= most:
        raise TooManyValuesError(most)


def _count_values(text: str) -> int:
    """Count the values of a text, as if it had no strings: the first, and one after each comma and bracket."""
    return 1 + text.count(",") + text.count("[") + text.count("{")


def read_json(text: str | bytes, most: int = MAX_VALUES) -> Any:
    """Parse JSON as Python does, which is more lenient, after its values were counted; raise `ValueError`."""
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    require_few_values(text, most)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise NestingError("maximum recursion depth exceeded") from error


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
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


class StrictJson:
    """A reader of JSON.

    `members` makes the value of an object (None: a dict, in which the last of two members of one name counts),
    `integer` the value of a number without point and exponent.
    """

    def __init__(self, *, members: Members | None = unique_members, integer: Callable[[str], Any] = int) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=members, parse_int=integer, parse_constant=_refuse_constant)

    def parse(self, text: str, most: int | None = MAX_VALUES) -> Any:
        """Parse exactly one value; the text has at most `most` values, or any number of them with None.

        Raises `ValueError`: `json.JSONDecodeError` with the position, or one of this module's.
        """
        if most is not None:
            require_few_values(text, most)
        try:
            return self._decoder.decode(text)
        except RecursionError as error:
            raise NestingError("maximum recursion depth exceeded") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ConstantError(constant)
