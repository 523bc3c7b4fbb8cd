"""A gRPC client that knows no message and no service: it asks the server for them, and imports nothing of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.foreign import TIMEOUT, Identity


@dataclass(frozen=True)
class Outcome:
    """How a call ended: status, details, and the answer's fields as pRPC's JSON has them."""

    code: str
    text: str
    fields: dict[str, Any]

    @property
    def value(self) -> dict[str, Any]:
        """The fields of a success."""
        assert self.code == "OK", self
        return self.fields


class Reflected:
    """A client of one gRPC server."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(self._database)

    def services(self) -> set[str]:
        """What the server says it serves."""
        return set(self._database.get_services())

    def methods(self, service: str) -> set[str]:
        """The methods of one of them."""
        return {method.name for method in self._pool.FindServiceByName(service).methods}

    def call(self, name: str, *, metadata: Any = None, timeout: float = TIMEOUT, **arguments: Any) -> Outcome:
        """Call `package.Service/Method`, with bytes in hex."""
        service, _, method = name.partition("/")
        descriptor: MethodDescriptor = self._pool.FindServiceByName(service).methods_by_name[method]
        stub = self.channel.unary_unary(
            f"/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )
        request = GetMessageClass(descriptor.input_type)(**_read(descriptor.input_type, arguments))
        try:
            return Outcome("OK", "", shown(stub(request, timeout=timeout, metadata=metadata, wait_for_ready=True)))
        except grpc.RpcError as error:
            return Outcome(error.code().name, error.details(), {})


def _read(descriptor: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    kinds = {field.name: field.type for field in descriptor.fields}
    return {
        name: bytes.fromhex(value) if kinds[name] == FieldDescriptor.TYPE_BYTES else value
        for name, value in arguments.items()
    }


def shown(message: Message) -> dict[str, Any]:
    """A message as pRPC's JSON has it: every field, bytes in hex, absent ones as null."""
    return {field.name: _shown(message, field) for field in message.DESCRIPTOR.fields}


def _shown(message: Message, field: Any) -> Any:
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    items = [
        item.hex() if isinstance(item, bytes) else shown(item) if isinstance(item, Message) else item
        for item in (value if field.is_repeated else [value])
    ]
    return items if field.is_repeated else items[0]


def credentials(root_ca: str, identity: Identity | None = None) -> Any:
    """TLS that verifies under one root, and shows a certificate if there is one."""
    if identity is None:
        return grpc.ssl_channel_credentials(root_ca.encode())
    key = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return grpc.ssl_channel_credentials(root_ca.encode(), key, identity.certificate.public_bytes(Encoding.PEM))


@contextmanager
def reflected(
    target: str, root_ca: str | None = None, identity: Identity | None = None, *, waiting: bool = False
) -> Iterator[Reflected]:
    """Connect to a server, in plain where no root is given; `waiting` for one that is about to speak TLS."""
    # A pool of connections of its own: grpcio shares one among channels to the same target with equal settings.
    options = (("grpc.use_local_subchannel_pool", 1),)
    channel = (
        grpc.insecure_channel(target, options)
        if root_ca is None
        else grpc.secure_channel(target, credentials(root_ca, identity), options)
    )
    with channel:
        if waiting:
            grpc.channel_ready_future(channel).result(TIMEOUT)
        yield Reflected(channel)
