"""Structures in msgpack, read as upstream reads them (serde over rmp): evidence of version 1, and app info.

A member that is named twice is an error, an unknown one is ignored. The numbers of values and of members are bounded.
Byte strings come in three forms, and a field takes two or three of them: an array of integers, bin, and for some fields
the bytes of a str.

Not here: structures as arrays of their fields (`app_info` has the only one), and what a structure means.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgpack

from dstack_emu.attest.errors import FormatError

V = TypeVar("V")
MAX_VALUES: Final = 1 << 18
"""The maximum number of values in a document, the keys of maps among them.

A value takes up to a hundred bytes of memory for one of the document. Evidence of version 1 has a value for each byte
of its quote: five to ten thousand.
"""
MAX_CONTAINERS: Final = 1 << 14
"""The maximum number of arrays and maps in a document. Evidence has one for each event, and a dozen.

Python's garbage collector looks at each of them, again and again while they become more.
"""
MAX_MEMBERS: Final = 64
"""The maximum number of members of a map; the structures that are read have at most seven."""

_MISSING: Final[Any] = object()


def unpack(data: bytes) -> tuple[Any, int]:
    """Decode the first value; return it, and how many bytes follow it. Raises `FormatError`."""
    if _may_have_many_values(data):
        _require_few_values(data)
    # A str that is not UTF-8 is read, since its bytes may be what is wanted of it; `text` refuses it.
    unpacker = msgpack.Unpacker(
        max_buffer_size=len(data),
        max_array_len=MAX_VALUES,
        max_map_len=MAX_MEMBERS,
        unicode_errors="surrogateescape",
        object_pairs_hook=_without_duplicates,
    )
    unpacker.feed(data)
    try:
        return unpacker.unpack(), len(data) - unpacker.tell()
    except FormatError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise FormatError(str(error) or type(error).__name__) from error


def _without_duplicates(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise FormatError(f"duplicate field `{name!s:.200}`")
        found[name] = value
    return found


def _may_have_many_values(data: bytes) -> bool:
    """Return whether values must be counted: none is shorter than a byte, and arrays and maps begin with few bytes."""
    if len(data) <= MAX_CONTAINERS:
        return False
    return len(data) > MAX_VALUES or len(data.translate(None, _OTHER_BYTES)) > MAX_CONTAINERS


def _require_few_values(data: bytes) -> None:
    """Count the values of the first document without making any; raise `FormatError` if there are too many.

    Bytes that are no document are left to the parser.
    """
    at, expected, count, containers = 0, 1, 0, 0
    while expected and at < len(data):
        count += 1
        containers += data[at] in _CONTAINERS
        if count > MAX_VALUES:
            raise FormatError(f"at most {MAX_VALUES} msgpack values expected, got more")
        if containers > MAX_CONTAINERS:
            raise FormatError(f"at most {MAX_CONTAINERS} msgpack arrays and maps expected, got more")
        size, parts = _extent(data, at)
        at += size
        expected += parts - 1


_CONTAINERS: Final = frozenset((*range(0x80, 0xA0), *range(0xDC, 0xE0)))
_OTHER_BYTES: Final = bytes(first for first in range(256) if first not in _CONTAINERS)


def _extent(data: bytes, at: int) -> tuple[int, int]:
    """Return how many bytes the value takes that begins at `at`, and how many values follow as its parts."""
    first = data[at]
    if first < 0x80 or first >= 0xE0:
        return 1, 0
    if first < 0xA0:
        return 1, (first & 0xF) * (2 if first < 0x90 else 1)
    if first < 0xC0:
        return 1 + (first & 0x1F), 0
    width, fixed, parts = _FORMATS[first - 0xC0]
    number = int.from_bytes(data[at + 1 : at + 1 + width], "big")
    return 1 + width + fixed + (0 if parts else number), parts * number


_FORMATS: Final[tuple[tuple[int, int, int], ...]] = (
    *((0, 0, 0),) * 4,  # nil, one that is never used, false, true
    *((1, 0, 0), (2, 0, 0), (4, 0, 0)),  # bin
    *((1, 1, 0), (2, 1, 0), (4, 1, 0)),  # ext, which has a type
    *((0, 4, 0), (0, 8, 0)),  # float
    *((0, 1, 0), (0, 2, 0), (0, 4, 0), (0, 8, 0)) * 2,  # unsigned, signed
    *((0, 2, 0), (0, 3, 0), (0, 5, 0), (0, 9, 0), (0, 17, 0)),  # ext of a fixed size
    *((1, 0, 0), (2, 0, 0), (4, 0, 0)),  # str
    *((2, 0, 1), (4, 0, 1)),  # array
    *((2, 0, 2), (4, 0, 2)),  # map
)
"""The formats from 0xc0 to 0xdf: bytes of the length, further bytes of fixed number, and parts for each of the length.

Source: the specification of msgpack.
"""


def member(container: Any, name: str, read: Callable[[Any], V], default: V = _MISSING) -> V:
    """Read a member of a map; raise `FormatError` with its name if it is missing without a default, or not readable."""
    if not isinstance(container, dict):
        raise FormatError(f"map with `{name}` expected, got {type(container).__name__}")
    if name not in container:
        if default is _MISSING:
            raise FormatError(f"missing field `{name}`")
        return default
    value = container[name]
    try:
        return read(value)
    except FormatError:
        raise
    except (TypeError, ValueError) as error:
        expected = getattr(read, "__name__", "value").replace("_", " ")
        raise FormatError(f"{name}: {expected} expected, got {type(value).__name__}") from error


def unsigned(bits: int) -> Callable[[Any], int]:
    """Return the reader of an unsigned integer of that many bits."""

    def integer(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << bits:
            raise TypeError
        return value

    return integer


def text(value: Any) -> str:
    """Read text."""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # which the bytes of a str that is not UTF-8 cannot be
    return value


def optional_text(value: Any) -> str | None:
    """Read text or nil."""
    return None if value is None else text(value)


def mapping(value: Any) -> dict[str, Any]:
    """Read a map."""
    if not isinstance(value, dict):
        raise TypeError
    return value


def sequence(value: Any) -> list[Any]:
    """Read an array."""
    if not isinstance(value, list):
        raise TypeError
    return value


def octets(value: Any) -> bytes:
    """Read an array of integers, or bin: real programs write both."""
    if not isinstance(value, list | bytes) or (isinstance(value, list) and not set(map(type, value)) <= {int}):
        raise TypeError  # also for booleans, which `bytes` takes for 0 and 1
    return bytes(value)


def octets_or_text(value: Any) -> bytes:
    """Read an array of integers, bin, or str, whose bytes count."""
    return value.encode(errors="surrogateescape") if isinstance(value, str) else octets(value)
