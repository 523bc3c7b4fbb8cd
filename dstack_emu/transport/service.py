"""Service tables: the name, the message types and the handler of each RPC of a service.

A table does not depend on a transport: `transport.prpc_server` serves it over HTTP, `transport.grpc_server` over gRPC.
It has no state: what differs between calls (the caller, the connection) is the context `C`, which the server makes and
the handler receives.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

from google.protobuf.message import Message

C = TypeVar("C")
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class Rpc(Generic[C, Q, A]):
    """One RPC. The handler raises the service's own errors, whose text is meant for the caller.

    With `old_spellings` its answer in JSON has renamed fields under their old names, too. Over HTTP, one that does not
    read its request accepts any body and any query.
    """

    name: str
    request_type: type[Q]
    response_type: type[A]
    handler: Callable[[C, Q], Awaitable[A]]
    old_spellings: bool = False
    reads_request: bool = True


@dataclass(frozen=True, slots=True)
class ServiceTable(Generic[C]):
    """The RPCs of one mount, by the name in a call after `prefix` (with its dot, such as `KMS.`) is removed.

    If a mount serves two services, the names of the second one include its prefix: `Worker.Info`.
    """

    prefix: str
    rpcs: Mapping[str, Rpc[C, Any, Any]]

    @classmethod
    def of(cls, prefix: str, *rpcs: Rpc[Any, Any, Any]) -> Self:
        """Make the table of RPCs from their names."""
        return cls(prefix, {rpc.name: rpc for rpc in rpcs})


def in_messages_of(table: ServiceTable[C], others: Mapping[type[Message], type[Message]]) -> ServiceTable[C]:
    """Return the table with the messages of another release: what these lack is neither read nor answered.

    `others` has the other release's message for each that differs. On the wire one is the other, as far as both have
    its fields.
    """
    return ServiceTable(table.prefix, {name: _in_messages_of(rpc, others) for name, rpc in table.rpcs.items()})


def _in_messages_of(rpc: Rpc[C, Any, Any], others: Mapping[type[Message], type[Message]]) -> Rpc[C, Any, Any]:
    request_type, response_type = rpc.request_type, rpc.response_type
    other_request = others.get(request_type, request_type)
    other_response = others.get(response_type, response_type)

    async def handle(context: C, request: Message) -> Message:
        return _as(other_response, await rpc.handler(context, _as(request_type, request)))

    return replace(rpc, request_type=other_request, response_type=other_response, handler=handle)


def _as(kind: type[Message], message: Message) -> Message:
    """Return a message as one of another release; fields that its own release does not have are dropped."""
    if isinstance(message, kind):
        return message
    message.DiscardUnknownFields()
    converted = kind.FromString(message.SerializeToString())
    converted.DiscardUnknownFields()
    return converted


def without_context(method: Callable[[Q], Awaitable[A]]) -> Callable[[Any, Q], Awaitable[A]]:
    """Make a handler from a method that does not need the context."""

    async def handle(_context: Any, request: Q) -> A:
        return await method(request)

    return handle


def without_arguments(method: Callable[[], Awaitable[A]]) -> Callable[[Any, Message], Awaitable[A]]:
    """Make a handler from a method that needs neither the context nor the request."""

    async def handle(_context: Any, _request: Message) -> A:
        return await method()

    return handle
