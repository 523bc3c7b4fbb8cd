"""The types of a gRPC client's methods, because grpcio has no types."""

from collections.abc import Awaitable, Sequence
from typing import Any, Protocol, TypeVar

Q = TypeVar("Q", contravariant=True)
A = TypeVar("A", covariant=True)

Metadata = Sequence[tuple[str, str | bytes]]


class UnaryUnary(Protocol[Q, A]):
    """A method of a client on a blocking channel; raises `grpc.RpcError`."""

    def __call__(
        self,
        request: Q,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> A:
        """Call, and wait for the answer, at most `timeout` seconds."""
        ...


class AsyncUnaryUnary(Protocol[Q, A]):
    """A method of a client on a channel of grpc.aio; raises `grpc.aio.AioRpcError`."""

    def __call__(
        self,
        request: Q,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Awaitable[A]:
        """Call; the answer is awaited."""
        ...
