"""Encoding of calls and decoding of answers, for the types that dstack's contracts use.

`address`, `bool`, `bytesN`, `uintN`, `bytes`, `string`, lists and tuples of these. Values are bytes for addresses and
bytes, numbers, texts, and sequences.

Source: Solidity's contract ABI specification.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.keccak import keccak

WORD: Final = 32
_FIXED: Final = re.compile(r"bytes([1-9]|[12][0-9]|3[0-2])")


def selector(signature: str) -> bytes:
    """Return the four bytes that name a function or an error, such as `owner()`."""
    return keccak(signature.encode())[:4]


def topic(signature: str) -> bytes:
    """Return the first topic of an event, such as `Upgraded(address)`."""
    return keccak(signature.encode())


def call(signature: str, *values: Any) -> bytes:
    """Encode a call: the signature has the types of the values."""
    inside = signature.partition("(")[2]
    return selector(signature) + encode(f"({inside}", values)


def encode(kind: str, value: Any) -> bytes:
    """Encode a value of a type; raise `FormatError` for a value that the type does not have."""
    if kind.endswith("[]"):
        return _number(len(value)) + _tuple([kind[:-2]] * len(value), value)
    if kind.startswith("("):
        return _tuple(members(kind), value)
    if kind in ("bytes", "string"):
        content = value.encode() if kind == "string" else bytes(value)
        return _number(len(content)) + content.ljust(-(-len(content) // WORD) * WORD, b"\0")
    return _word(kind, value)


def decode(kind: str, data: bytes) -> Any:
    """Decode the answer of a function with that tuple of results; raise `FormatError`."""
    return _decode_tuple(members(kind), data)


def members(kind: str) -> list[str]:
    """Return the types in a tuple."""
    found, depth, start = list[str](), 0, 1
    for place, letter in enumerate(kind[:-1]):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 1:
            found.append(kind[start:place])
            start = place + 1
    return [*found, kind[start:-1]] if kind != "()" else []


def _is_dynamic(kind: str) -> bool:
    if kind.startswith("(") and kind.endswith(")"):
        return any(map(_is_dynamic, members(kind)))
    return kind in ("bytes", "string") or kind.endswith("[]")


def _tuple(kinds: Sequence[str], values: Sequence[Any]) -> bytes:
    if len(kinds) != len(values):
        raise FormatError(f"ABI: {len(kinds)} values expected, got {len(values)}")
    encoded = [encode(kind, value) for kind, value in zip(kinds, values, strict=True)]
    at = sum(WORD if _is_dynamic(kind) else len(each) for kind, each in zip(kinds, encoded, strict=True))
    head, tail = b"", b""
    for kind, each in zip(kinds, encoded, strict=True):
        if _is_dynamic(kind):
            head += _number(at + len(tail))
            tail += each
        else:
            head += each
    return head + tail


def _word(kind: str, value: Any) -> bytes:
    if kind == "address" and isinstance(value, bytes) and len(value) == 20:
        return value.rjust(WORD, b"\0")
    if kind == "bool" and isinstance(value, bool):
        return _number(int(value))
    if kind.startswith("uint") and isinstance(value, int) and 0 <= value < 1 << int(kind[4:]):
        return _number(value)
    fixed = _FIXED.fullmatch(kind)
    if fixed and isinstance(value, bytes) and len(value) == int(fixed[1]):
        return value.ljust(WORD, b"\0")
    raise FormatError(f"ABI: a value of the type {kind} expected, got {value!r:.80}")


def _number(value: int) -> bytes:
    return value.to_bytes(WORD, "big")


def _decode_tuple(kinds: Sequence[str], data: bytes) -> list[Any]:
    values, at = list[Any](), 0
    for kind in kinds:
        if _is_dynamic(kind):
            values.append(_decode_dynamic(kind, _rest(data, _read(data, at))))
            at += WORD
        else:
            values.append(_decode_word(kind, data, at))
            at += WORD
    return values


def _decode_dynamic(kind: str, data: bytes) -> Any:
    if kind.startswith("(") and kind.endswith(")"):
        return _decode_tuple(members(kind), data)
    size = _read(data, 0)
    if kind.endswith("[]"):
        if size > len(data) // WORD:
            raise FormatError(f"ABI: a list of {size} does not fit into {len(data)} bytes")
        return _decode_tuple([kind[:-2]] * size, data[WORD:])
    if WORD + size > len(data):
        raise FormatError(f"ABI: {size} bytes expected, got {len(data) - WORD}")
    content = data[WORD : WORD + size]
    return content.decode(errors="replace") if kind == "string" else content


def _decode_word(kind: str, data: bytes, at: int) -> Any:
    value = _read(data, at)
    if kind == "address":
        return data[at + 12 : at + WORD]
    if kind == "bool":
        if value > 1:
            raise FormatError(f"ABI: a boolean of 0 or 1 expected, got {value}")
        return value == 1
    fixed = _FIXED.fullmatch(kind)
    return data[at : at + int(fixed[1])] if fixed else value


def _read(data: bytes, at: int) -> int:
    if at + WORD > len(data):
        raise FormatError(f"ABI: 32 bytes at {at} expected, got {len(data)} in all")
    return int.from_bytes(data[at : at + WORD], "big")


def _rest(data: bytes, at: int) -> bytes:
    if at > len(data):
        raise FormatError(f"ABI: a value at {at} expected, got {len(data)} bytes in all")
    return data[at:]
