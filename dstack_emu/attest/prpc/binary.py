"""The protobuf encoding, read as strictly as prost reads it."""

from typing import Final, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.prpc.messages import Field, MessageTable, table_of
from dstack_emu.attest.varint import read_varint

M = TypeVar("M", bound=Message)

_VARINT, _FIXED64, _LENGTH, _GROUP_START, _GROUP_END, _FIXED32 = range(6)
_WIRE_NAMES: Final = ("Varint", "SixtyFourBit", "LengthDelimited", "StartGroup", "EndGroup", "ThirtyTwoBit")
_MAX_GROUPS: Final = 100
MAX_FIELDS: Final = 10_000
"""The maximum number of fields of a message, those of messages and groups within it among them.

Each is looked at. The requests of the services have at most a dozen, and one for each alternative name.
"""


def encode_binary(message: Message) -> bytes:
    """Encode an answer (or a request) as protobuf; Empty is no bytes."""
    return message.SerializeToString()


def decode_binary(message_type: type[M], body: bytes) -> M:
    """Decode a protobuf message; for Empty the body is ignored.

    Raises `FormatError`: `failed to decode Protobuf message: …`, also where protobuf's own parser is lenient: it
    keeps a known field of another wire type as an unknown one, prost refuses it.
    """
    if message_type is Empty:
        return message_type()
    _WireCheck(body).check(table_of(message_type), 0, len(body))
    try:
        return message_type.FromString(body)
    except DecodeError as error:
        raise _wire_error("malformed") from error


class _WireCheck:
    """Checks the fields of one message as prost does, and counts them."""

    __slots__ = ("_body", "_count")

    def __init__(self, body: bytes) -> None:
        self._body, self._count = body, 0

    def check(self, table: MessageTable, at: int, end: int) -> None:
        """Check the fields between two offsets; raise `FormatError`."""
        while at < end:
            number, wire, at = self._key(at, end)
            field = table.by_number.get(number)
            at = self._skip(at, end, number, wire) if field is None else self._check_field(table, field, wire, at, end)

    def _check_field(self, table: MessageTable, field: Field, wire: int, at: int, end: int) -> int:
        """Check the value of one known field and return where the next field begins."""
        where = f"{table.name}.{field.name}: "
        expected = _VARINT if field.scalar is not None and field.scalar.is_varint else _LENGTH
        if wire != expected:
            raise _wire_error(f"{where}invalid wire type: {_WIRE_NAMES[wire]} (expected {_WIRE_NAMES[expected]})")
        value, at = _varint(self._body, at, end, where)
        if wire == _VARINT:
            return at
        if value > end - at:
            raise _wire_error(f"{where}buffer underflow")
        if field.message is not None:
            self.check(field.message, at, at + value)
        elif field.is_string:
            try:
                self._body[at : at + value].decode()
            except UnicodeDecodeError as error:
                raise _wire_error(f"{where}invalid string value: data is not UTF-8 encoded") from error
        return at + value

    def _key(self, at: int, end: int) -> tuple[int, int, int]:
        self._count += 1
        if self._count > MAX_FIELDS:
            raise _wire_error(f"at most {MAX_FIELDS} fields expected, got more")
        key, at = _varint(self._body, at, end)
        number, wire = key >> 3, key & 7
        if key > 0xFFFFFFFF:
            raise _wire_error(f"invalid key value: {key}")
        if wire > _FIXED32:
            raise _wire_error(f"invalid wire type value: {wire}")
        if number == 0:
            raise _wire_error("invalid tag value: 0")
        return number, wire, at

    def _skip(self, at: int, end: int, number: int, wire: int) -> int:
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
            else:
                at = _skip_value(self._body, at, end, wire)
            if not groups:
                return at
            number, wire, at = self._key(at, end)


def _skip_value(body: bytes, at: int, end: int, wire: int) -> int:
    if wire == _VARINT:
        return _varint(body, at, end)[1]
    length = 8 if wire == _FIXED64 else 4
    if wire == _LENGTH:
        length, at = _varint(body, at, end)
    if length > end - at:
        raise _wire_error("buffer underflow")
    return at + length


def _varint(body: bytes, at: int, end: int, where: str = "") -> tuple[int, int]:
    try:
        return read_varint(body, at, end)
    except (EOFError, OverflowError) as error:
        raise _wire_error(f"{where}invalid varint") from error


def _wire_error(what: str) -> FormatError:
    return FormatError(f"failed to decode Protobuf message: {what}")
