"""A service as a table: what each RPC is called, what it takes and gives, and who answers it.

A table names no transport: `transport.prpc_server` serves it over HTTP, and `transport.grpc_server` serves the same
table from the same message types. It holds no state either: what differs from call to call (who asks, over which
connection) is the context `C`, which the server makes and the handler receives.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

C = TypeVar("C")
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


@dataclass(frozen=True, slots=True)
class Rpc(Generic[C, Q, A]):
    """One RPC. The handler raises the service's own errors, whose text is meant for the caller.

    With `old_spellings` its answer in JSON has renamed fields under their old names, too.
    """

    name: str
    request_type: type[Q]
    response_type: type[A]
    handler: Callable[[C, Q], Awaitable[A]]
    old_spellings: bool = False


@dataclass(frozen=True, slots=True)
class ServiceTable(Generic[C]):
    """The RPCs of one mount, by the name they are called with.

    That is the RPC's own name, after `prefix` (with its dot, such as `KMS.`) was trimmed. A mount that serves
    two services keys the second one's RPCs with their prefix: `Worker.Info`.
    """

    prefix: str
    rpcs: Mapping[str, Rpc[C, Any, Any]]


def without_context(method: Callable[[Q], Awaitable[A]]) -> Callable[[Any, Q], Awaitable[A]]:
    """Make a handler of a method to which it is all the same who calls."""

    async def handle(_context: Any, request: Q) -> A:
        return await method(request)

    return handle


def without_arguments(method: Callable[[], Awaitable[A]]) -> Callable[[Any, Message], Awaitable[A]]:
    """Make a handler of a method that takes nothing and to which it is all the same who calls."""

    async def handle(_context: Any, _request: Message) -> A:
        return await method()

    return handle
