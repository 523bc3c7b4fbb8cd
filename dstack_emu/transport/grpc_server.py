"""gRPC: serves the RPCs of service tables, from the very handlers that pRPC has.

The order of a call is pRPC's: context (who asks), decode, handler, encode. A refusal is a status whose details are
the text that pRPC answers; which status, says one table from error class to code. Beside the tables there are
reflection and `grpc.health.v1`. A call that is cancelled, or over its deadline, ends its handler where it stands.

grpcio listens on a socket file alone; ports are ours, and `transport.relay` carries their connections there, TLS taken
off. For a KMS grpcio's own TLS will not do: it knows no optional client certificate, and a client whose certificate is
longer than some 8 KB (with evidence it always is) loses its connection, since BoringSSL puts the certificate into two
session tickets, which grpcio's buffer of 17 KB does not hold.

Not here: which services there are, who may call, and TLS settings. Upstream has no gRPC: this is ours.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor_pool import Default as default_pool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dstack_emu.attest.errors import AttestError, FormatError, UnverifiableError, VerificationError
from dstack_emu.attest.prpc import decode_binary, encode_binary
from dstack_emu.transport.http.application import MAX_BODY
from dstack_emu.transport.listen import GRACE, ListenError
from dstack_emu.transport.relay import Relay, start_relay
from dstack_emu.transport.service import Rpc, ServiceTable

C = TypeVar("C")

Statuses = Mapping[type[Exception], grpc.StatusCode]
"""Which code an error is answered with: the entry of its own class, else of the nearest one above."""

ATTEST_STATUSES: Final[Statuses] = {
    UnverifiableError: grpc.StatusCode.UNAVAILABLE,
    VerificationError: grpc.StatusCode.UNAUTHENTICATED,
    FormatError: grpc.StatusCode.INVALID_ARGUMENT,
    AttestError: grpc.StatusCode.INTERNAL,
}
"""The codes of the protocol package's own errors."""

MAX_DETAILS: Final = 6 * 1024
"""Bytes of a status's details as they go over the wire; clients take 8 KiB of trailers unless told otherwise."""

MAX_STREAMS: Final = 100
"""Calls at once on one connection; more wait at the client."""

MAX_PENDING: Final = 10_000
"""Calls that may wait for their handler to start, over all connections; grpcio resets some beyond it."""

STOP_TIMEOUT: Final = 5.0
"""Seconds for which the end of grpcio's server is waited for."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_BODY),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.server.max_pending_requests", MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING),
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GrpcPeer:
    """Who is at the other end of a call: the certificate it showed (DER), if any, and the call's metadata."""

    certificate: bytes | None
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket to serve on, which the server owns from there on, with TLS or in plain."""

    sock: socket.socket
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class GrpcService(Generic[C]):
    """A table under its full name, such as `kms.KMS`. `context` is awaited first, as pRPC's.

    Where it is not `serving`, its health says so, reflection does not list it, and the table's handlers say why.
    """

    name: str
    table: ServiceTable[C]
    context: Callable[[GrpcPeer], Awaitable[C]]
    serving: bool = True


async def anyone(peer: GrpcPeer) -> None:
    """The context of a service to which it is all the same who calls."""


class GrpcServer:
    """Services being served. Made by `serve_grpc`."""

    def __init__(self, server: Any, health_servicer: Any, calls: "_Calls", path: str, folder: str | None) -> None:
        self._server, self._health, self._calls = server, health_servicer, calls
        self._path, self._folder = path, folder
        self._relays: list[Relay] = []

    async def listen(self, listener: Listener) -> str:
        """Let clients in on one more socket, and return what one on this machine connects to: `host:port`."""
        relay = await start_relay(listener.sock, self._path, self._calls.certificates, listener.tls)
        self._relays.append(relay)
        return relay.target

    async def close(self) -> None:
        """Stop listening, let calls in progress finish (see GRACE), end the streams.

        grpcio may take STOP_TIMEOUT seconds to end, and as long again once all connections are cut.
        """
        for relay in self._relays:
            relay.stop_listening()
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(GRACE / 2))
        await self._calls.over(GRACE / 2)
        # Who watches health, or holds a stream of reflection, would never leave.
        ends = (stopping, asyncio.create_task(self._server.stop(None)))
        _, late = await asyncio.wait(ends, timeout=STOP_TIMEOUT)
        for relay in self._relays:
            await relay.close(GRACE / 2)
        if late:
            await self._abandon(late)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _abandon(self, late: Iterable[asyncio.Task[None]]) -> None:
        """Wait once more for grpcio to end, now that there is no connection; then leave it as it is."""
        _, late = await asyncio.wait(late, timeout=STOP_TIMEOUT)
        for task in late:
            task.cancel()
        if late:
            _log.error("grpcio did not end its server at %s within %g s", self._path, 2 * STOP_TIMEOUT)


async def serve_grpc(
    services: Sequence[GrpcService[Any]],
    *listeners: Listener,
    statuses: Statuses,
    path: str | None = None,
    interceptors: Sequence[Any] = (),
    answered: Callable[[str, bool], None] | None = None,
) -> GrpcServer:
    """Serve on bound sockets, and on a socket file whose `path` was reserved (`transport.listen.reserve_unix`).

    `statuses` adds to ATTEST_STATUSES; an error of neither is logged with its traceback and answered INTERNAL, with its
    type's name alone. `interceptors` are grpc.aio's. `answered` is told of each call of a table when it is over: its
    full name without the package (`KMS.GetMeta`), and whether it was refused.
    """
    calls = _Calls({**ATTEST_STATUSES, **statuses}, answered)
    server = grpc.aio.server(options=_OPTIONS, interceptors=list(interceptors))
    server.add_generic_rpc_handlers(tuple(calls.handlers(service) for service in services))
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    state = health_pb2.HealthCheckResponse
    for service in services:
        await servicer.set(service.name, state.SERVING if service.serving else state.NOT_SERVING)
    listed = [service.name for service in services if service.serving]
    reflection.enable_server_reflection([*listed, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    folder = tempfile.mkdtemp(prefix="dstack-emu-") if path is None else None
    path = path or os.path.join(str(folder), "grpc.sock")
    served = GrpcServer(server, servicer, calls, path, folder)
    try:
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise ListenError(f"unix:{path}", "grpcio cannot bind it") from error
        await server.start()
        for listener in listeners:
            await served.listen(listener)
    except BaseException:
        for listener in listeners:
            listener.sock.close()
        await served.close()
        raise
    return served


class _Calls:
    """The calls under way, and how each ends."""

    def __init__(self, statuses: Statuses, answered: Callable[[str, bool], None] | None) -> None:
        self._statuses, self._answered = statuses, answered
        self.certificates: dict[str, bytes | None] = {}
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    async def over(self, seconds: float) -> None:
        """Wait until no call is under way, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()

    def handlers(self, service: GrpcService[Any]) -> Any:
        """Make grpcio's handlers of one service; messages come and go as bytes, so that refusals are ours to word."""
        methods = {
            rpc.name: grpc.unary_unary_rpc_method_handler(self._handler(service, rpc)) for rpc in _promised(service)
        }
        return grpc.method_handlers_generic_handler(service.name, methods)

    def _handler(self, service: GrpcService[Any], rpc: Rpc[Any, Any, Any]) -> Callable[[bytes, Any], Awaitable[bytes]]:
        name = service.table.prefix + rpc.name

        async def handle(body: bytes, call: Any) -> bytes:  # a grpc.aio.ServicerContext: grpcio has no types
            self._count += 1
            self._none.clear()
            call.add_done_callback(self._end)
            refused = True
            try:
                context = await service.context(self._peer(call))
                answer = encode_binary(await rpc.handler(context, decode_binary(rpc.request_type, body)))
                refused = False
                return answer
            except Exception as error:  # the server's edge
                code, text = self._refusal(error, name)
            finally:
                if self._answered is not None:
                    self._answered(name, refused)
            await call.abort(code, text)
            raise AssertionError("abort raises")  # for the type checker, to which grpcio is unknown

        return handle

    def _peer(self, call: Any) -> GrpcPeer:
        # A connection that is gone meanwhile is one of nobody; its call is about to be cancelled.
        certificate = self.certificates.get(call.peer())
        return GrpcPeer(
            certificate, {key: value for key, value in call.invocation_metadata() if isinstance(value, str)}
        )

    def _end(self, call: Any) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    def _refusal(self, error: Exception, name: str) -> tuple[grpc.StatusCode, str]:
        for kind in type(error).__mro__:
            if code := self._statuses.get(kind):
                return code, details(str(error))
        _log.error("%r failed", name, exc_info=error)
        return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}"


def details(text: str) -> str:
    """Make a text fit for the details of a status: UTF-8, cut where it would be longer than clients take.

    On the wire each byte beyond printable ASCII is three (`%0A`).
    """
    data = text.encode("utf-8", "replace")
    size = 0
    for at, byte in enumerate(data):
        size += 1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3
        if size > MAX_DETAILS:
            return data[:at].decode(errors="ignore") + f"… ({len(data)} bytes, cut)"
    return data.decode()


def absent(name: str, context: Callable[[GrpcPeer], Awaitable[C]], error: Callable[[str], Exception]) -> GrpcService[C]:
    """Make the stand-in for a service that this server knows and does not serve now.

    Each call of it is refused with the error that `error` makes of its name (`KMS.GetMeta`).
    """
    descriptor = default_pool().FindServiceByName(name)

    def refuse(method: str) -> Callable[[C, Message], Awaitable[Message]]:
        async def handle(_context: C, _request: Message) -> Message:
            raise error(method)

        return handle

    rpcs = {
        method.name: Rpc(
            method.name,
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            refuse(f"{descriptor.name}.{method.name}"),
        )
        for method in descriptor.methods
    }
    return GrpcService(name, ServiceTable(f"{descriptor.name}.", rpcs), context, serving=False)


def _promised(service: GrpcService[Any]) -> list[Rpc[Any, Any, Any]]:
    """Return the RPCs of a table that the .proto file names, which is what reflection tells clients.

    A table may have older ones, too. It may lack some that its release does not have: they are UNIMPLEMENTED.
    """
    rpcs = []
    for method in default_pool().FindServiceByName(service.name).methods:
        rpc = service.table.rpcs.get(method.name)
        if rpc is None:
            continue
        types = rpc.request_type.DESCRIPTOR, rpc.response_type.DESCRIPTOR
        if types != (method.input_type, method.output_type):
            raise TypeError(f"{method.full_name}: the table has other types than the .proto file")
        rpcs.append(rpc)
    return rpcs
