"""Parses JSON documents as serde parses them into a struct: exact types, no repeated member, defaults for absent ones.

A struct is a table from member to reader. A reader takes a parsed value and returns that of the struct, or raises
`ValueError`; `read_members` adds the name of the member. If serde's error would name a position, the text is ours.

Two rules are stricter than serde's: an array is not accepted as a struct, and no member, known or not, may be repeated
(see `attest.strict_json`).
"""

import base64
import binascii
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from dstack_emu.attest.strict_json import MAX_VALUES, ConstantError, StrictJson

Reader = Callable[[Any], Any]


_JSON: Final = StrictJson()


def parse_json(text: str, most: int = MAX_VALUES) -> Any:
    """Parse strict JSON of at most so many values; raise `ValueError`."""
    try:
        return _JSON.parse(text, most)
    except ConstantError as error:
        raise ValueError(f"expected value, got {error.constant}") from error


def read_members(
    value: Any, members: Mapping[str, Reader], *, required: Collection[str] = (), refuse_unknown: bool = False
) -> dict[str, Any]:
    """Read the known members of a JSON object; raise `ValueError`, which names the wrong one."""
    document = read_object(value)
    if refuse_unknown and (unknown := next((name for name in document if name not in members), None)) is not None:
        raise ValueError(f"unknown field `{unknown}`, expected one of {', '.join(f'`{name}`' for name in members)}")
    if (absent := next((name for name in required if name not in document), None)) is not None:
        raise ValueError(f"missing field `{absent}`")
    return {name: read_member(name, reader, document[name]) for name, reader in members.items() if name in document}


def read_member(name: str, reader: Reader, value: Any) -> Any:
    """Read one value; raise `ValueError`, which names the member."""
    try:
        return reader(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_object(value: Any) -> dict[str, Any]:
    """Accept a JSON object; raise `ValueError` for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"object expected, got {shown(value)}")
    return value


def read_boolean(value: Any) -> bool:
    """Accept true or false; raise `ValueError` for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"true or false expected, got {shown(value)}")
    return value


def read_text(value: Any) -> str:
    """Accept text that UTF-8 can encode; raise `ValueError` for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"text expected, got {shown(value)}")
    value.encode()  # fails for a lone surrogate
    return value


def read_hex(value: Any) -> bytes:
    """Decode hex of either case, without 0x and without blanks, which `bytes.fromhex` would accept."""
    return binascii.unhexlify(read_text(value))


def read_base64(value: Any) -> bytes:
    """Decode standard base64 with complete, partial or no padding; unused bits of the last letter must be zero."""
    text = read_text(value)
    body = text.rstrip("=")
    decoded = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    if not base64.b64encode(decoded).decode().startswith(text):
        raise ValueError("not canonical base64")
    return decoded


def unsigned(bits: int) -> Reader:
    """Make a reader of integers from 0 to below 2^bits."""

    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << bits:
            raise ValueError(f"integer of {bits} bits, not negative, expected, got {shown(value)}")
        return value

    return read


def one_of(*names: str) -> Reader:
    """Make a reader of these texts."""

    def read(value: Any) -> str:
        if value not in names:
            raise ValueError(f"{' or '.join(map(repr, names))} expected, got {shown(value)}")
        return str(value)

    return read


def optional(reader: Reader) -> Reader:
    """Make a reader that accepts null, too, and returns None for it."""
    return lambda value: None if value is None else reader(value)


def list_of(reader: Reader) -> Reader:
    """Make a reader of a JSON array, which returns a tuple."""

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"array expected, got {shown(value)}")
        return tuple(read_member(f"[{index}]", reader, item) for index, item in enumerate(value))

    return read


def shown(value: Any) -> str:
    """Return the beginning of a value's JSON, for an error."""
    return f"{json.dumps(value):.40}"
