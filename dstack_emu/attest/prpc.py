"""The pRPC codec: how a message becomes the body of an HTTP request or answer, and back.

Three encodings carry the same messages: JSON, the query string of a GET, and raw protobuf. The JSON is not
protobuf's own JSON mapping but what serde makes of the fields: snake_case names, hex for bytes, plain numbers
for 64 bits, every field present. Decoding is as strict as the parsers it stands for (serde_json, serde_qs,
prost): what they refuse is refused here, though in our words where theirs only name a position.

Not here: HTTP itself (dstack_emu/transport/prpc_server.py), the services, and any meaning of a field.

Source of truth: Dstack-TEE/dstack, branch next at 312dc605, dstack/ra-rpc/src/{lib,rocket_helper}.rs,
dstack/guest-agent/rpc/build.rs and crate prpc 0.6; recorded answers of the real programs.
"""

import binascii
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import unquote_plus, unquote_to_bytes

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.proto.prpc_pb2 import PrpcError

M = TypeVar("M", bound=Message)

REMEMBERED_BODY: Final = 4096
"""Bytes of a body that is remembered at most."""

JSON_TYPE: Final = "application/json"
BINARY_TYPE: Final = "application/octet-stream"

OLD_SPELLINGS: Final[Mapping[str, str]] = {"kms.AttestationInfoResponse.tee_variant": "attestation_mode"}
"""Fields that were renamed, and the name they had. JSON carries both; of both, the new one is read."""

OMITTED_WHEN_EMPTY: Final = frozenset({"dstack_guest.GetQuoteResponse.attestation"})
"""Fields that JSON leaves out where they are empty: the only exception to "every field is always present"."""


# ---- Which encoding a call uses ----------------------------------------------------------------------------


def wants_json(method: str, query: str, content_type: str | None = None) -> bool:
    """Whether a call is answered in JSON; `method` is the HTTP verb, `query` the undecoded query string.

    Pass the request's Content-Type for the call itself. Leave it out for an error raised before the call is
    dispatched (a bad client certificate, an oversized body): there upstream looks at verb and query only.
    """
    if method == "GET" or _json_flag(query):
        return True
    return content_type is not None and content_type.partition(";")[0].strip().lower() == JSON_TYPE


def _json_flag(query: str) -> bool:
    """Whether `json` stands in the query bare, empty, as `true` or as `1`. The first occurrence decides."""
    if query == "json":
        return True
    for piece in query.split("&") if query else ():
        name, _, value = piece.partition("=")
        if unquote_plus(name) == "json":
            return unquote_plus(value) in ("", "true", "1")
    return False


def trim_prefix(name: str, prefix: str) -> str:
    """Take `prefix` off the front of `name` as often as it stands there."""
    while prefix and name.startswith(prefix):
        name = name[len(prefix) :]
    return name


def error_body(text: str, as_json: bool) -> bytes:
    """Encode the body of an HTTP 400. JSON is indented, unlike an answer, and ASCII like one."""
    # A name out of a URL may hold a lone surrogate, which no UTF-8 can carry.
    text = text.encode("utf-8", "replace").decode()
    if as_json:
        return json.dumps({"error": text}, indent=2).encode()
    return PrpcError(message=text).SerializeToString()


# ---- What is known of a message type -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """How values of one type are taken from JSON and from a query, and written as JSON text."""

    wire: int
    read: Callable[[object, str], object]
    """From a parsed JSON value; the second argument names the field in errors."""
    parse: Callable[[str, str], object]
    """From a query value, likewise."""
    write: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    spellings: tuple[str, ...]
    keys: tuple[str, ...]
    """The spellings as a JSON object has them, quotes and colon included."""
    kind: _Kind
    is_string: bool
    message: "_Table | None"
    repeated: bool
    presence: bool
    omitted_when_empty: bool


@dataclass(frozen=True, slots=True)
class _Table:
    """Everything the codec needs to know of one message type, looked up once."""

    name: str
    new: Callable[..., Message]
    fields: tuple[_Field, ...]
    by_name: Mapping[str, _Field]
    by_number: Mapping[int, _Field]


@functools.cache
def _describe(descriptor: Descriptor) -> _Table:
    fields = tuple(_describe_field(field) for field in descriptor.fields)
    return _Table(
        name=descriptor.name,
        new=GetMessageClass(descriptor),
        fields=fields,
        by_name={spelling: field for field in fields for spelling in field.spellings},
        by_number={raw.number: field for raw, field in zip(descriptor.fields, fields, strict=True)},
    )


def _describe_field(field: FieldDescriptor) -> _Field:
    old = OLD_SPELLINGS.get(field.full_name)
    message = _describe(field.message_type) if field.message_type is not None else None
    spellings = (field.name,) if old is None else (field.name, old)
    return _Field(
        name=field.name,
        spellings=spellings,
        keys=tuple(f'"{spelling}":' for spelling in spellings),
        kind=_KINDS[field.type] if message is None else _message_kind(message),
        is_string=field.type == FieldDescriptor.TYPE_STRING,
        message=message,
        repeated=field.is_repeated,
        presence=field.has_presence,
        omitted_when_empty=field.full_name in OMITTED_WHEN_EMPTY,
    )


# ---- JSON --------------------------------------------------------------------------------------------------


def encode_json(message: Message) -> bytes:
    """Encode an answer (or a request) as compact ASCII JSON with every field present; Empty is `null`."""
    return b"null" if isinstance(message, Empty) else _write_message(message).encode("ascii")


def _write_message(message: Message) -> str:
    # Joined by hand: a JSON encoder would look at every digit of the hex for something to escape.
    parts = []
    for field in _describe(message.DESCRIPTOR).fields:
        value: Any = getattr(message, field.name)
        if field.omitted_when_empty and not value:
            continue
        if field.presence and not message.HasField(field.name):
            text = "null"
        elif field.repeated:
            text = "[" + ",".join(map(field.kind.write, value)) + "]"
        else:
            text = field.kind.write(value)
        for key in field.keys:
            parts.append(key + text)
    return "{" + ",".join(parts) + "}"


def decode_json(message_type: type[M], body: bytes, *, remember: bool = False) -> M:
    """Decode a JSON request, or an answer. An empty body is the default message; Empty never looks at it.

    An object gives fields by name, an array by position. Missing fields keep their default, unknown ones are
    ignored. FormatError on anything else than exactly one valid JSON value of the right shape. With `remember` what was
    read is kept, for the same short body to be read again: of questions, not of answers, which may be secret.
    """
    if message_type is Empty or not body:
        return message_type()
    read = _read_body if remember and len(body) <= REMEMBERED_BODY else _read_body.__wrapped__
    return message_type(**read(message_type.DESCRIPTOR, body))


@functools.lru_cache(maxsize=64)
def _read_body(descriptor: Descriptor, body: bytes) -> dict[str, Any]:
    """The constructor arguments that a body spells; who asks the same again sends the same bytes."""
    return _read_fields(_describe(descriptor), _parse_json(body))


def _parse_json(body: bytes) -> object:
    """Parse JSON, arrays as lists and objects as tuples of pairs, so that a repeated name is still seen."""
    try:
        return _DECODER.decode(body.decode())
    except UnicodeDecodeError as error:
        raise FormatError(f"invalid unicode code point at byte {error.start}") from error
    except json.JSONDecodeError as error:
        what = "trailing characters" if error.msg == "Extra data" else f"invalid JSON: {error.msg}"
        raise FormatError(f"{what} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise FormatError("recursion limit exceeded: the JSON is nested too deeply") from error


def _json_integer(text: str) -> int | float:
    # serde_json takes what 64 bits do not hold for a float, and "-0" too. int() alone raises at 4301 digits.
    return int(text) if len(text) <= 20 and text != "-0" else float(text)


def _refuse_constant(name: str) -> NoReturn:
    raise FormatError(f"invalid JSON: {name} is not a value")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=tuple, parse_int=_json_integer, parse_constant=_refuse_constant)


def _read_fields(table: _Table, value: object) -> dict[str, object]:
    """Read a parsed JSON object or array as the constructor arguments of a message."""
    if isinstance(value, tuple):
        return _read_by_name(table, value)
    if isinstance(value, list):
        if len(value) > len(table.fields):
            raise FormatError(
                f"trailing characters: {len(value)} elements, but {table.name} has {len(table.fields)} fields"
            )
        pairs = zip(table.fields, value, strict=False)
        return {field.name: _read(field, item) for field, item in pairs}
    raise _mistyped(value, f"message {table.name}")


def _read_by_name(table: _Table, pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    arguments: dict[str, object] = {}
    seen = set()
    for name, value in pairs:
        field = table.by_name.get(name)
        if field is None:
            continue
        if name in seen:
            raise FormatError(f"duplicate field `{name}`")
        seen.add(name)
        if name == field.name or field.name not in arguments:
            arguments[field.name] = _read(field, value)
    return arguments


def _read(field: _Field, value: object) -> object:
    if field.repeated:
        if not isinstance(value, list):
            raise _mistyped(value, "a sequence", field.name)
        return [field.kind.read(item, field.name) for item in value]
    if value is None and field.presence:
        return None
    return field.kind.read(value, field.name)


def _mistyped(value: object, expected: str, name: str = "") -> FormatError:
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


# ---- Query string ------------------------------------------------------------------------------------------

_QUERY_KEY: Final = re.compile(r"([^\[]*)(?:\[([0-9]*)\])?", re.ASCII)


def decode_query(message_type: type[M], query: str) -> M:
    """Decode the query string of a GET, given undecoded: `a=1&list[0]=x&list[1]=y`, also `list[]=x`.

    Unknown keys, the bare `json` among them, are ignored; Empty never looks at the query. FormatError where a
    key stands twice or a value is not of its field's type. Only scalars and lists of them can be written so.
    """
    if message_type is Empty:
        return message_type()
    table = _describe(message_type.DESCRIPTOR)
    single: dict[str, str] = {}
    listed: dict[str, dict[int, str]] = {}
    for piece in filter(None, query.split("&")):
        raw_key, _, raw_value = piece.partition("=")
        shape = _QUERY_KEY.fullmatch(raw_key)
        key = _unquote(shape[1] if shape else raw_key.partition("[")[0])
        value = _unquote(raw_value)
        if shape is None or (shape[2] is not None and len(shape[2]) > 6):
            if key in table.by_name:
                raise FormatError(f"unexpected index in the query for field `{key}`")
        elif shape[2] is not None:
            items = listed.setdefault(key, {})
            index = int(shape[2]) if shape[2] else len(items)
            if index in items:
                raise FormatError(f'Multiple values for one key: "{key}[{index}]"')
            items[index] = value
        elif key in single:
            raise FormatError(f'Multiple values for one key: "{key}"')
        else:
            single[key] = value
    arguments: dict[str, object] = {}
    for key, items in listed.items():
        if (field := table.by_name.get(key)) is None:
            continue
        if not field.repeated or key in single:
            raise FormatError(f"invalid type: a sequence for field `{key}`")
        arguments[field.name] = [field.kind.parse(items[index], key) for index in sorted(items)]
    for key, value in single.items():
        if (field := table.by_name.get(key)) is None:
            continue
        if field.repeated:
            raise FormatError(f"invalid type: a string, expected a sequence for field `{key}`")
        if not (value == "" and field.presence):
            arguments[field.name] = field.kind.parse(value, key)
    return message_type(**arguments)


def _unquote(text: str) -> str:
    try:
        return unquote_to_bytes(text.replace("+", " ")).decode()
    except UnicodeError as error:
        raise FormatError("the query is not valid UTF-8") from error


# ---- Protobuf ----------------------------------------------------------------------------------------------

_VARINT, _FIXED64, _LENGTH, _GROUP_START, _GROUP_END, _FIXED32 = range(6)
_WIRE_NAMES: Final = ("Varint", "SixtyFourBit", "LengthDelimited", "StartGroup", "EndGroup", "ThirtyTwoBit")
_MAX_GROUPS: Final = 100


def encode_binary(message: Message) -> bytes:
    """Encode an answer (or a request) as protobuf; Empty is no bytes."""
    return message.SerializeToString()


def decode_binary(message_type: type[M], body: bytes) -> M:
    """Decode a protobuf message; Empty never looks at the body.

    FormatError `failed to decode Protobuf message: …`, also where protobuf's own parser is lenient: it
    keeps a known field of another wire type as an unknown one, prost refuses it.
    """
    if message_type is Empty:
        return message_type()
    _check_wire(_describe(message_type.DESCRIPTOR), body, 0, len(body))
    try:
        return message_type.FromString(body)
    except DecodeError as error:
        raise _wire_error("malformed") from error


def _check_wire(table: _Table, body: bytes, at: int, end: int) -> None:
    while at < end:
        number, wire, at = _wire_key(body, at, end)
        field = table.by_number.get(number)
        if field is None:
            at = _skip(body, at, end, number, wire)
            continue
        where = f"{table.name}.{field.name}: "
        if wire != field.kind.wire:
            raise _wire_error(
                f"{where}invalid wire type: {_WIRE_NAMES[wire]} (expected {_WIRE_NAMES[field.kind.wire]})"
            )
        value, at = _varint(body, at, end, where)
        if wire == _VARINT:
            continue
        if value > end - at:
            raise _wire_error(f"{where}buffer underflow")
        if field.message is not None:
            _check_wire(field.message, body, at, at + value)
        elif field.is_string:
            try:
                body[at : at + value].decode()
            except UnicodeDecodeError as error:
                raise _wire_error(f"{where}invalid string value: data is not UTF-8 encoded") from error
        at += value


def _wire_key(body: bytes, at: int, end: int) -> tuple[int, int, int]:
    key, at = _varint(body, at, end)
    number, wire = key >> 3, key & 7
    if key > 0xFFFFFFFF:
        raise _wire_error(f"invalid key value: {key}")
    if wire > _FIXED32:
        raise _wire_error(f"invalid wire type value: {wire}")
    if number == 0:
        raise _wire_error("invalid tag value: 0")
    return number, wire, at


def _skip(body: bytes, at: int, end: int, number: int, wire: int) -> int:
    """Step over one unknown field, groups with all they hold, and return where the next one begins."""
    groups: list[int] = []
    while True:
        if wire == _GROUP_START:
            groups.append(number)
            if len(groups) > _MAX_GROUPS:
                raise _wire_error("recursion limit reached")
        elif wire == _GROUP_END:
            if not groups or groups.pop() != number:
                raise _wire_error("unexpected end group tag")
        elif wire == _VARINT:
            _, at = _varint(body, at, end)
        else:
            length = 8 if wire == _FIXED64 else 4
            if wire == _LENGTH:
                length, at = _varint(body, at, end)
            if length > end - at:
                raise _wire_error("buffer underflow")
            at += length
        if not groups:
            return at
        number, wire, at = _wire_key(body, at, end)


def _varint(body: bytes, at: int, end: int, where: str = "") -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise _wire_error(f"{where}invalid varint")


def _wire_error(what: str) -> FormatError:
    return FormatError(f"failed to decode Protobuf message: {what}")


# ---- Values ------------------------------------------------------------------------------------------------


def _read_string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _mistyped(value, "a string", name)
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
        raise _mistyped(value, "a string", name)
    return _parse_bytes(value, name)


def _parse_bytes(text: str, name: str) -> bytes:
    digits = trim_prefix(text, "0x")
    try:
        return binascii.unhexlify(digits)
    except ValueError as error:
        if len(digits) % 2:
            raise FormatError(f"Odd number of digits in field `{name}`: {len(digits)}") from error
        at = next(i for i, digit in enumerate(digits) if digit not in "0123456789abcdefABCDEF")
        raise FormatError(f"Invalid character {digits[at]!a} at position {at} of field `{name}`") from error


def _write_bytes(value: bytes) -> str:
    return f'"{value.hex()}"'


def _read_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _mistyped(value, "a boolean", name)
    return value


def _parse_bool(text: str, name: str) -> bool:
    if text not in ("true", "false"):
        raise FormatError(f"field `{name}` is neither `true` nor `false`")
    return text == "true"


def _write_bool(value: bool) -> str:
    return "true" if value else "false"


def _unsigned(bits: int) -> _Kind:
    def read(value: object, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _mistyped(value, f"u{bits}", name)
        if not 0 <= value < 1 << bits:
            raise FormatError(f"invalid value: integer `{value}`, expected u{bits} for field `{name}`")
        return value

    def parse(text: str, name: str) -> int:
        # Twenty digits hold any u64; more would only cost time. A leading plus is what Rust's parser takes.
        if not re.fullmatch(r"\+?[0-9]{1,20}", text):
            raise FormatError(f"invalid digit in field `{name}`, expected u{bits}")
        return read(int(text), name)

    return _Kind(_VARINT, read, parse, str)


def _message_kind(table: _Table) -> _Kind:
    def read(value: object, name: str) -> Message:
        return table.new(**_read_fields(table, value))

    def parse(text: str, name: str) -> NoReturn:
        raise FormatError(f"invalid type: a string, expected message {table.name} for field `{name}`")

    return _Kind(_LENGTH, read, parse, _write_message)


_KINDS: Final[Mapping[int, _Kind]] = {
    FieldDescriptor.TYPE_STRING: _Kind(_LENGTH, _read_string, _parse_string, encode_basestring_ascii),
    FieldDescriptor.TYPE_BYTES: _Kind(_LENGTH, _read_bytes, _parse_bytes, _write_bytes),
    FieldDescriptor.TYPE_BOOL: _Kind(_VARINT, _read_bool, _parse_bool, _write_bool),
    FieldDescriptor.TYPE_UINT32: _unsigned(32),
    FieldDescriptor.TYPE_UINT64: _unsigned(64),
}
"""The types that occur in the .proto files. Another one there is a KeyError at the first use of its message."""
