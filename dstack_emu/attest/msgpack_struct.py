"""Structures in msgpack, read as upstream reads them (serde over rmp): evidence of version 1, and app info.

A member that is named twice is an error, an unknown one is ignored. Byte strings come in three forms, and a field
takes two or three of them: an array of integers, bin, and for some fields the bytes of a str.

Not here: structures as arrays of their fields (`app_info` has the only one), and what a structure means.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgpack

from dstack_emu.attest.errors import FormatError

V = TypeVar("V")
_MISSING: Final[Any] = object()


def unpack(data: bytes) -> tuple[Any, int]:
    """Decode the first value; return it, and how many bytes follow it. Raises `FormatError`."""
    # A str that is not UTF-8 is read, since its bytes may be what is wanted of it; `text` refuses it.
    unpacker = msgpack.Unpacker(
        max_buffer_size=len(data), unicode_errors="surrogateescape", object_pairs_hook=_without_duplicates
    )
    unpacker.feed(data)
    try:
        return unpacker.unpack(), len(data) - unpacker.tell()
    except FormatError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise FormatError(str(error) or type(error).__name__) from error


def _without_duplicates(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"duplicate field `{twice}`")
    return found


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
