"""The gRPC server: serves the RPCs of service tables, with the same handlers as pRPC.

A call has the same steps as with pRPC: context (who calls), decode, handler, encode. A refusal is a status whose
details are pRPC's error text; a table maps error classes to status codes. The server also serves reflection and
`grpc.health.v1`. If a call is cancelled or its deadline passes, its handler is cancelled.

grpcio listens only on a socket file. The ports belong to `transport.relay`, which terminates TLS and forwards the
connections to that file. grpcio's own TLS is unsuitable for a KMS: it has no optional client certificates, and it drops
a client whose certificate has more than about 8 KB, which every certificate with evidence has: BoringSSL puts it into
two session tickets, and they do not fit into grpcio's buffer of 17 KB.

Not here: the services, who may call, and TLS settings. Upstream has no gRPC; this is an addition of the emulator.
"""

import asyncio
import contextlib
import functools
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
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.http.application import MAX_BODY
from dstack_emu.transport.listen import GRACE, ListenError
from dstack_emu.transport.open_calls import began, ended
from dstack_emu.transport.relay import Relay, client_of, reset_connection, start_relay
from dstack_emu.transport.service import Rpc, ServiceTable

C = TypeVar("C")

Statuses = Mapping[type[Exception], grpc.StatusCode]
"""The status code of each class of errors; for other classes, that of the nearest base class."""

ATTEST_STATUSES: Final[Statuses] = {
    UnverifiableError: grpc.StatusCode.UNAVAILABLE,
    VerificationError: grpc.StatusCode.UNAUTHENTICATED,
    FormatError: grpc.StatusCode.INVALID_ARGUMENT,
    AttestError: grpc.StatusCode.INTERNAL,
}
"""The status codes of the errors of `attest`."""

MAX_DETAILS: Final = 6 * 1024
"""The maximum size of a status's details on the wire, in bytes; by default clients accept 8 KiB of trailers."""

MAX_STREAMS: Final = 100
"""The maximum number of simultaneous calls on a connection; further ones wait in the client."""

MAX_PENDING: Final = 10_000
"""The number of calls that may wait for their handler, over all connections; above it, grpcio resets some."""

STOP_TIMEOUT: Final = 5.0
"""Seconds to wait for grpcio's server to stop."""

READING: Final = 60.0
"""Seconds that the client of a port has to read its answer; then its connection is reset.

HTTP/2 lets it refuse every byte of an answer and be alive otherwise. The connections of a socket file are grpcio's.
"""

_SILENCE: Final = 60_000
"""Milliseconds without a byte after which a client is asked whether it lives."""
_ALIVE: Final = 30_000
"""Milliseconds that it has to answer that. For its first bytes grpcio gives it twice as long."""

_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", _SILENCE),
    ("grpc.keepalive_timeout_ms", _ALIVE),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_BODY),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.server.max_pending_requests", MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING),
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GrpcPeer:
    """The client of a call: its certificate (DER), None if it has none, and the call's metadata."""

    certificate: bytes | None
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket to serve on, with TLS or without; the server takes ownership of it."""

    sock: socket.socket
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class GrpcService(Generic[C]):
    """A service table under its full name, such as `kms.KMS`. `context` is awaited before the request is decoded.

    If it is not `serving`, its health is NOT_SERVING, reflection does not list it, and its handlers refuse every call.
    """

    name: str
    table: ServiceTable[C]
    context: Callable[[GrpcPeer], Awaitable[C]]
    serving: bool = True


async def anyone(peer: GrpcPeer) -> None:
    """Return no context, for a service that does not distinguish its callers."""


class GrpcServer:
    """A running server; `serve_grpc` makes it."""

    def __init__(self, server: Any, health_servicer: Any, calls: "_Calls", path: str, folder: str | None) -> None:
        self._server, self._health, self._calls = server, health_servicer, calls
        self._path, self._folder = path, folder
        self._relays: list[Relay] = []

    async def listen(self, listener: Listener) -> str:
        """Listen on another socket; return its address for clients on this machine, `host:port`."""
        relay = await start_relay(listener.sock, self._path, self._calls.certificates, listener.tls)
        self._relays.append(relay)
        return relay.target

    async def close(self) -> None:
        """Stop listening, let calls in progress finish (see GRACE), and end the streams.

        grpcio gets STOP_TIMEOUT seconds to stop, and the same time again after all connections are closed.
        """
        for relay in self._relays:
            relay.stop_listening()
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(GRACE / 2))
        await self._calls.over(GRACE / 2)
        # A client that watches health, or has an open reflection stream, would never disconnect by itself.
        ends = (stopping, asyncio.create_task(self._server.stop(None)))
        _, late = await asyncio.wait(ends, timeout=STOP_TIMEOUT)
        for relay in self._relays:
            await relay.close(GRACE / 2)
        if late:
            await self._abandon(late)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _abandon(self, late: Iterable[asyncio.Task[None]]) -> None:
        """Wait again for grpcio to stop, now without connections; if it does not, log an error."""
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

    `statuses` adds to ATTEST_STATUSES; any other error is logged with its traceback and answered as INTERNAL with
    only the name of its type. `interceptors` are grpc.aio's. `answered` is called after each call of a table, with its
    name and its service's (`KMS.GetMeta`) and whether it was refused.
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
    """The calls in progress, and the handlers that end them."""

    def __init__(self, statuses: Statuses, answered: Callable[[str, bool], None] | None) -> None:
        self._statuses, self._answered = statuses, answered
        self.certificates: dict[str, bytes | None] = {}
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    async def over(self, seconds: float) -> None:
        """Wait until no call is in progress, at most so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()

    def handlers(self, service: GrpcService[Any]) -> Any:
        """Make grpcio's handlers of one service; messages stay bytes, so that our own decoder words the refusals."""
        methods = {
            rpc.name: grpc.unary_unary_rpc_method_handler(self._handler(service, rpc))
            for rpc in _declared_rpcs(service)
        }
        return grpc.method_handlers_generic_handler(service.name, methods)

    def _handler(self, service: GrpcService[Any], rpc: Rpc[Any, Any, Any]) -> Callable[[bytes, Any], Awaitable[bytes]]:
        name = service.table.prefix + rpc.name

        async def handle(body: bytes, call: Any) -> bytes:  # a grpc.aio.ServicerContext: grpcio has no types
            self._count += 1
            self._none.clear()
            call.add_done_callback(self._end)
            refused, answered = True, _Answered(name, call)
            began(answered)
            try:
                context = await service.context(self._peer(call))
                request = await run_aside(len(body), functools.partial(decode_binary, rpc.request_type, body))
                answer = encode_binary(await rpc.handler(context, request))
                refused = False
                return answer
            except Exception as error:  # the server's edge
                code, text = self._refusal(error, name)
            finally:
                ended(answered)
                late = asyncio.get_running_loop().call_later(READING, reset_connection, call.peer())
                call.add_done_callback(lambda _: late.cancel())
                if self._answered is not None:
                    self._answered(name, refused)
            await call.abort(code, text)
            raise AssertionError("abort raises")  # for the type checker: grpcio has no types

        return handle

    def _peer(self, call: Any) -> GrpcPeer:
        # If the connection has ended meanwhile there is no certificate; the call is about to be cancelled.
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


class _Answered:
    """A call in progress."""

    __slots__ = ("_call", "_name")

    def __init__(self, name: str, call: Any) -> None:
        self._name, self._call = name, call

    def described(self) -> str:
        """Say what it is, and for whom: the relay's client under the name that it has at grpcio."""
        return f"answers {self._name} over gRPC for {client_of(self._call.peer())}"


def details(text: str) -> str:
    """Return a text as the details of a status: UTF-8, truncated to MAX_DETAILS bytes on the wire.

    On the wire each byte that is not printable ASCII takes three (`%0A`).
    """
    data = text.encode("utf-8", "replace")
    size = 0
    for at, byte in enumerate(data):
        size += 1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3
        if size > MAX_DETAILS:
            return data[:at].decode(errors="ignore") + f"… ({len(data)} bytes, cut)"
    return data.decode()


def absent(name: str, context: Callable[[GrpcPeer], Awaitable[C]], error: Callable[[str], Exception]) -> GrpcService[C]:
    """Make a service that this server knows, but does not serve now.

    Each call is refused with the error that `error` returns for its name (`KMS.GetMeta`).
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


def _declared_rpcs(service: GrpcService[Any]) -> list[Rpc[Any, Any, Any]]:
    """Return the RPCs of a table that the .proto file declares, which reflection shows to clients.

    A table may have older ones, too. Those that its release does not have are missing, and are UNIMPLEMENTED.
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
