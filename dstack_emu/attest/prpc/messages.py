"""What the codecs need to know of a message type, worked out once for each message of the `.proto` files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from dstack_emu.attest.proto import (
    dstack_guest_pb2,
    dstack_guest_v1_pb2,
    gateway_pb2,
    gateway_v05_pb2,
    guest_api_pb2,
    kms_pb2,
    kms_v05_pb2,
    vmm_pb2,
    vmm_v05_pb2,
)
from dstack_emu.attest.prpc.scalars import SCALARS, Scalar

OLD_SPELLINGS: Final[Mapping[str, str]] = {"kms.AttestationInfoResponse.tee_variant": "attestation_mode"}
"""Fields that were renamed, and the name they had. JSON is read under both, and the new name counts more than the old
one; it is written under both by a service whose release is to serve clients of either."""

OMITTED_WHEN_EMPTY: Final = frozenset(
    {
        "dstack_guest.GetQuoteResponse.attestation",
        "gateway.StatusResponse.accel",
        "kms.GetMetaResponse.os_image_verification",
    }
)
"""Fields that JSON leaves out if they are empty or absent: not every release has them.

They are the only exceptions to "every field is always present".
"""


@dataclass(frozen=True, slots=True)
class Field:
    """One field. It holds a scalar or a message, and the other of `scalar` and `message` is None."""

    name: str
    number: int
    spellings: tuple[str, ...]
    """The names that JSON has for it."""
    key: str
    """The name as a JSON object has it, quotes and colon included."""
    old_keys: tuple[str, ...]
    """The old spellings in the same form."""
    scalar: Scalar | None
    message: "MessageTable | None"
    is_string: bool
    repeated: bool
    is_map: bool
    """A map, which is in answers alone; `message` is that of its entries, with key and value."""
    presence: bool
    omitted_when_empty: bool


@dataclass(frozen=True, slots=True)
class MessageTable:
    """One message type: its name, how to make one, and its fields in the order of the `.proto` file."""

    name: str
    new: Callable[..., Message]
    fields: tuple[Field, ...]
    by_name: Mapping[str, Field]
    by_number: Mapping[int, Field]


def table_of(message: Message | type[Message]) -> MessageTable:
    """Return the table of a message's type; that of a type which is not dstack's is worked out anew."""
    return _TABLES.get(message.DESCRIPTOR) or _describe(message.DESCRIPTOR)


def _describe(descriptor: Any) -> MessageTable:
    fields = tuple(map(_describe_field, descriptor.fields))
    return MessageTable(
        name=descriptor.name,
        new=GetMessageClass(descriptor),
        fields=fields,
        by_name={spelling: field for field in fields for spelling in field.spellings},
        by_number={field.number: field for field in fields},
    )


def _describe_field(field: FieldDescriptor) -> Field:
    old = OLD_SPELLINGS.get(field.full_name)
    message = _describe(field.message_type) if field.message_type is not None else None
    spellings = (field.name,) if old is None else (field.name, old)
    return Field(
        name=field.name,
        number=field.number,
        spellings=spellings,
        key=f'"{field.name}":',
        old_keys=tuple(f'"{spelling}":' for spelling in spellings[1:]),
        scalar=SCALARS[field.type] if message is None else None,
        message=message,
        is_string=field.type == FieldDescriptor.TYPE_STRING,
        repeated=field.is_repeated,
        is_map=field.message_type is not None and field.message_type.GetOptions().map_entry,
        presence=field.has_presence,
        omitted_when_empty=field.full_name in OMITTED_WHEN_EMPTY,
    )


_FILES: Final = (
    dstack_guest_pb2.DESCRIPTOR,
    dstack_guest_v1_pb2.DESCRIPTOR,
    kms_pb2.DESCRIPTOR,
    kms_v05_pb2.DESCRIPTOR,
    vmm_pb2.DESCRIPTOR,
    vmm_v05_pb2.DESCRIPTOR,
    guest_api_pb2.DESCRIPTOR,
    gateway_pb2.DESCRIPTOR,
    gateway_v05_pb2.DESCRIPTOR,
)
_TABLES: Final[Mapping[object, MessageTable]] = {
    descriptor: _describe(descriptor)
    for descriptor in chain.from_iterable(file.message_types_by_name.values() for file in _FILES)
}
