"""The JSON encoding, as serde_json reads and writes dstack's types."""

import json
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.prpc.ignored import Ignored, ignore
from dstack_emu.attest.prpc.messages import Field, MessageTable, table_of
from dstack_emu.attest.prpc.scalars import mistyped
from dstack_emu.attest.strict_json import ConstantError, NestingError, StrictJson, TooManyValuesError

M = TypeVar("M", bound=Message)


# ---- Writing


def encode_json(message: Message, *, old_spellings: bool = False) -> bytes:
    """Encode an answer (or a request) as compact ASCII JSON with every field present; Empty is `null`.

    With `old_spellings`, a field that was renamed stands under its old name, too, behind the new one.
    """
    if isinstance(message, Empty):
        return b"null"
    return _write_message(table_of(message), message, old_spellings).encode("ascii")


def _write_message(table: MessageTable, message: Message, old_spellings: bool) -> str:
    # Joined by hand: a JSON encoder would look at every digit of the hex for something to escape.
    parts = []
    for field in table.fields:
        value: Any = getattr(message, field.name)
        is_absent = field.presence and not message.HasField(field.name)
        if field.omitted_when_empty and (is_absent if field.presence else not value):
            continue
        text = "null" if is_absent else _write_field(field, value, old_spellings)
        parts.append(field.key + text)
        if old_spellings:
            parts += [key + text for key in field.old_keys]
    return "{" + ",".join(parts) + "}"


def _write_field(field: Field, value: Any, old_spellings: bool) -> str:
    if field.is_map:
        return "{" + ",".join([f'"{key}":{value[key]}' for key in sorted(value)]) + "}"
    if field.repeated:
        return "[" + ",".join([_write_value(field, item, old_spellings) for item in value]) + "]"
    return _write_value(field, value, old_spellings)


def _write_value(field: Field, value: Any, old_spellings: bool) -> str:
    if field.message is not None:
        return _write_message(field.message, value, old_spellings)
    assert field.scalar is not None  # noqa: S101 - it is one or the other
    return field.scalar.write(value)


# ---- Reading


def _integer(text: str) -> int | float:
    # serde_json takes what 64 bits do not hold for a float, and "-0" too. int() alone raises at 4301 digits.
    return int(text) if len(text) <= 20 and text != "-0" else float(text)


_JSON: Final = StrictJson(members=tuple, integer=_integer)
"""Arrays become lists and objects tuples of pairs, so that a repeated name is still seen."""


def decode_json(message_type: type[M], body: bytes, ignored: Ignored | None = None) -> M:
    """Decode a JSON request, or an answer. An empty body is the default message; for Empty it is ignored.

    An object gives fields by name, an array by position. Missing fields keep their default, unknown ones are
    ignored, and named in `ignored`. Raises `FormatError` on anything else than exactly one valid JSON value of the
    right shape.
    """
    if message_type is Empty or not body:
        return message_type()
    return message_type(**_read_fields(table_of(message_type), _parse(body), ignored))


def _parse(body: bytes) -> object:
    try:
        return _JSON.parse(body.decode())
    except UnicodeDecodeError as error:
        raise FormatError(f"invalid unicode code point at byte {error.start}") from error
    except json.JSONDecodeError as error:
        what = "trailing characters" if error.msg == "Extra data" else f"invalid JSON: {error.msg}"
        raise FormatError(f"{what} at line {error.lineno} column {error.colno}") from error
    except ConstantError as error:
        raise FormatError(f"invalid JSON: {error.constant} is not a value") from error
    except TooManyValuesError as error:
        raise FormatError(str(error)) from error
    except NestingError as error:
        raise FormatError("recursion limit exceeded: the JSON is nested too deeply") from error


def _read_fields(table: MessageTable, value: object, ignored: Ignored | None) -> dict[str, object]:
    """Read a parsed JSON object or array as the constructor arguments of a message."""
    if isinstance(value, tuple):
        return _read_by_name(table, value, ignored)
    if isinstance(value, list):
        if len(value) > len(table.fields):
            raise FormatError(
                f"trailing characters: {len(value)} elements, but {table.name} has {len(table.fields)} fields"
            )
        pairs = zip(table.fields, value, strict=False)
        return {field.name: _read_field(field, item, ignored) for field, item in pairs}
    raise mistyped(value, f"message {table.name}")


def _read_by_name(
    table: MessageTable, pairs: Iterable[tuple[str, object]], ignored: Ignored | None
) -> dict[str, object]:
    arguments: dict[str, object] = {}
    seen = set()
    for name, value in pairs:
        field = table.by_name.get(name)
        if field is None:
            ignore(name, table, ignored)
            continue
        if name in seen:
            raise FormatError(f"duplicate field `{name}`")
        seen.add(name)
        if name == field.name or field.name not in arguments:
            arguments[field.name] = _read_field(field, value, ignored)
    return arguments


def _read_field(field: Field, value: object, ignored: Ignored | None) -> object:
    if field.repeated:
        if not isinstance(value, list):
            raise mistyped(value, "a sequence", field.name)
        return [_read_value(field, item, ignored) for item in value]
    if value is None and field.presence:
        return None
    return _read_value(field, value, ignored)


def _read_value(field: Field, value: object, ignored: Ignored | None) -> object:
    if field.message is not None:
        return field.message.new(**_read_fields(field.message, value, ignored))
    assert field.scalar is not None  # noqa: S101 - it is one or the other
    return field.scalar.read(value, field.name)
