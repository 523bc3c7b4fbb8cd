"""How values of the scalar types are read from JSON and from a query string, and written as JSON text."""

import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.prpc.encoding import trim_prefix

_PIECE: Final = 4096
"""The number of hex digits that are looked at together, which is even."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """One type. `read` takes a parsed JSON value and `parse` a query value, each with the field's name for errors."""

    is_varint: bool
    """Whether protobuf writes it as a varint; it is a length and bytes otherwise."""
    read: Callable[[object, str], object]
    parse: Callable[[str, str], object]
    write: Callable[[Any], str]


def mistyped(value: object, expected: str, name: str = "") -> FormatError:
    """Return the error for a parsed JSON value of the wrong type; `name` is the field's."""
    # What a string says stays out: it may be a key under the wrong name.
    got = {
        type(None): "null",
        bool: "a boolean",
        int: f"integer `{value}`",
        float: "a floating point number",
        str: "a string",
        list: "a sequence",
        tuple: "a map",
    }[type(value)]
    return FormatError(f"invalid type: {got}, expected {expected}" + (f" for field `{name}`" if name else ""))


def _read_string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise mistyped(value, "a string", name)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"lone surrogate in field `{name}`") from error
    return value


def _parse_string(text: str, name: str) -> str:
    return text


def _read_bytes(value: object, name: str) -> bytes:
    if not isinstance(value, str):
        raise mistyped(value, "a string", name)
    return _parse_bytes(value, name)


def _parse_bytes(text: str, name: str) -> bytes:
    digits = trim_prefix(text, "0x")
    try:
        return binascii.unhexlify(digits)
    except ValueError as error:
        if len(digits) % 2:
            raise FormatError(f"Odd number of digits in field `{name}`: {len(digits)}") from error
        at = _wrong_digit(digits)
        raise FormatError(f"Invalid character {digits[at]!a} at position {at} of field `{name}`") from error


def _wrong_digit(digits: str) -> int:
    """Return the position of the first character that is no hex digit, in a text of an even number that has one."""
    for start in range(0, len(digits), _PIECE):
        piece = digits[start : start + _PIECE]
        try:
            binascii.unhexlify(piece)
        except ValueError:
            return start + next(i for i, digit in enumerate(piece) if digit not in "0123456789abcdefABCDEF")
    raise AssertionError("a character that is no hex digit expected")


def _write_bytes(value: bytes) -> str:
    return f'"{value.hex()}"'


def _read_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise mistyped(value, "a boolean", name)
    return value


def _parse_bool(text: str, name: str) -> bool:
    if text not in ("true", "false"):
        raise FormatError(f"field `{name}` is neither `true` nor `false`")
    return text == "true"


def _write_bool(value: bool) -> str:
    return "true" if value else "false"


def _unsigned(bits: int) -> Scalar:
    return _integer(f"u{bits}", 0, (1 << bits) - 1, r"\+?")


def _signed(bits: int) -> Scalar:
    return _integer(f"i{bits}", -(1 << bits - 1), (1 << bits - 1) - 1, r"[+-]?")


def _integer(kind: str, lowest: int, highest: int, signs: str) -> Scalar:
    digits = re.compile(signs + r"[0-9]{1,20}")  # they hold any u64; more would only cost time

    def read(value: object, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise mistyped(value, kind, name)
        if not lowest <= value <= highest:
            raise FormatError(f"invalid value: integer `{value}`, expected {kind} for field `{name}`")
        return value

    def parse(text: str, name: str) -> int:
        if not digits.fullmatch(text):  # a leading plus is what Rust's parser takes
            raise FormatError(f"invalid digit in field `{name}`, expected {kind}")
        return read(int(text), name)

    return Scalar(True, read, parse, str)


SCALARS: Final[Mapping[int, Scalar]] = {
    FieldDescriptor.TYPE_STRING: Scalar(False, _read_string, _parse_string, encode_basestring_ascii),
    FieldDescriptor.TYPE_BYTES: Scalar(False, _read_bytes, _parse_bytes, _write_bytes),
    FieldDescriptor.TYPE_BOOL: Scalar(True, _read_bool, _parse_bool, _write_bool),
    FieldDescriptor.TYPE_INT32: _signed(32),
    FieldDescriptor.TYPE_UINT32: _unsigned(32),
    FieldDescriptor.TYPE_UINT64: _unsigned(64),
    FieldDescriptor.TYPE_INT64: _signed(64),
}
"""The types that occur in the .proto files. Another one there is a KeyError."""
