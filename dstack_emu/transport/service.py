"""Service tables: the name, the message types and the handler of each RPC of a service.

A table does not depend on a transport: `transport.prpc_server` serves it over HTTP, `transport.grpc_server` over gRPC.
It has no state: what differs between calls (the caller, the connection) is the context `C`, which the server makes and
the handler receives.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
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
