"""An ingress in a thread, on either event loop, with a table of instances; apps are plain sockets in threads."""

import asyncio
import contextlib
import queue
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import uvloop

from dstack_emu.gateway.connections import Connections
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.ingress.app_address import AppAddresses, TxtTable
from dstack_emu.gateway.ingress.connection import Interrupt
from dstack_emu.gateway.ingress.record import ConnectionRecord
from dstack_emu.gateway.ingress.server import Ingress
from dstack_emu.gateway.ingress.settings import IngressSettings
from dstack_emu.gateway.ingress.tls import DomainTls
from dstack_emu.gateway.routing import Endpoint, Instance
from dstack_emu.gateway.state import PolicyEntry
from dstack_emu.transport.listen import bind_tcp
from tests import tls

DOMAIN: Final = "app.localhost"
APP: Final = "3327603e03f5bd1f830812ca4a789277fc31f577"
LOOPS: Final[Mapping[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
TIMEOUT: Final = 20.0

App = Callable[[socket.socket], None]


@dataclass
class Table:
    """Routes and reach of a test: instances by name, policies by instance, endpoints by instance and port."""

    instances: dict[str, list[Instance]] = field(default_factory=dict)
    policies: dict[str, PolicyEntry | None] = field(default_factory=dict)
    endpoints: dict[tuple[str, int], Endpoint] = field(default_factory=dict)
    txt: dict[str, str] = field(default_factory=dict)
    interrupt: Interrupt = lambda: None

    def candidates(self, name: str) -> Sequence[Instance]:
        """Return the instances of a name."""
        return self.instances.get(name, [])

    async def port_policy(self, instance: Instance) -> PolicyEntry | None:
        """Return the policy of an instance, everything by default."""
        return self.policies.get(instance.id, PolicyEntry())

    def endpoint(self, instance: Instance, port: int) -> Endpoint | None:
        """Return where a port of an instance is."""
        return self.endpoints.get((instance.id, port))

    def add(self, name: str, port: int, endpoint: Endpoint, app_id: str = APP) -> Instance:
        """Add an instance, under its name and that of its app."""
        instance = Instance(name, app_id, "10.0.0.2")
        self.instances[name] = [instance]
        self.instances.setdefault(app_id, [])
        if instance not in self.instances[app_id]:
            self.instances[app_id].append(instance)
        self.endpoints[name, port] = endpoint
        return instance


class ThisNode:
    """What a gateway tells about itself."""

    failure = ""
    """Why its app info cannot be had."""

    async def app_info(self) -> Mapping[str, Any]:
        """Return a part of what a guest agent says."""
        if self.failure:
            raise GatewayError(self.failure)
        return {"app_name": "dstack-gateway"}

    async def acme_info(self) -> Mapping[str, Any]:
        """Return a part of what AcmeInfo says."""
        return {"account_uri": "acme://account"}


class RunningIngress:
    """A running ingress, and what it has told of connections."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, table: Table, this_node: ThisNode, connections: Connections, port: int
    ) -> None:
        self._loop, self.table, self.this_node, self.port = loop, table, this_node, port
        self.connections = connections
        self.records: queue.Queue[ConnectionRecord] = queue.Queue()

    def connect(self) -> socket.socket:
        """Connect, and send nothing."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)

    def connect_tls(self, label: str, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
        """Connect, and shake hands under a label of the domain."""
        context = context or tls.client()
        return context.wrap_socket(self.connect(), server_hostname=f"{label}.{DOMAIN}", suppress_ragged_eofs=False)

    def ended(self) -> ConnectionRecord:
        """Wait for the next connection that ends, and return its record."""
        return self.records.get(timeout=TIMEOUT)

    def counted(self, instance_id: str = "") -> int:
        """Return the number of connections, of an instance or of all."""

        async def count() -> int:
            return self.connections.of(instance_id) if instance_id else self.connections.total

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result(TIMEOUT)


@contextmanager
def running_ingress(
    domain: DomainTls, *, loop: str = "uvloop", settings: IngressSettings | None = None
) -> Iterator[RunningIngress]:
    """Run an ingress for `*.app.localhost` on a free port."""
    table, this_node, event_loop, begun = Table(), ThisNode(), LOOPS[loop](), threading.Event()
    running: list[RunningIngress] = []

    async def run(stop: asyncio.Event) -> None:
        sock, connections = bind_tcp("127.0.0.1", 0), Connections()
        ingress = Ingress(
            routes=table,
            reach=table,
            find_tls={DOMAIN: domain}.get,
            this_node=this_node,
            app_addresses=AppAddresses(TxtTable(table.txt)),
            settings=settings,
            connections=connections,
            on_end=lambda record: running[0].records.put(record),
            interrupt=lambda: table.interrupt(),
        )
        running.append(RunningIngress(event_loop, table, this_node, connections, sock.getsockname()[1]))
        await ingress.start([sock])
        begun.set()
        await stop.wait()
        await ingress.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=event_loop.run_until_complete, args=(run(stop),))
    thread.start()
    try:
        assert begun.wait(TIMEOUT)
        yield running[0]
    finally:
        event_loop.call_soon_threadsafe(stop.set)
        thread.join(TIMEOUT)
        event_loop.close()
        assert not thread.is_alive()


@contextmanager
def app_server(app: App) -> Iterator[Endpoint]:
    """Serve an app, a function that is called with each connection in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, app), daemon=True).start()
        try:
            yield listener.getsockname()
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, app: App) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock, _ = listener.accept()
            sock.settimeout(TIMEOUT)
            threading.Thread(target=_serve, args=(sock, app), daemon=True).start()


def _serve(sock: socket.socket, app: App) -> None:
    with sock, contextlib.suppress(OSError):
        app(sock)


def echo(sock: socket.socket) -> None:
    """Send everything back, and end when the client ends."""
    while data := sock.recv(65536):
        sock.sendall(data)


def read_all(sock: socket.socket) -> bytes:
    """Read until the end."""
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Read that many bytes, or up to the end. MSG_WAITALL does not wait at a socket with a time limit."""
    data = b""
    while len(data) < size and (part := sock.recv(size - len(data))):
        data += part
    return data


def exchanged(sock: socket.socket, data: bytes) -> bytes:
    """Send data, and receive as much meanwhile: in one thread, since Python's SSL sockets are not for two."""
    sock.setblocking(False)
    rest, received = memoryview(data), bytearray()
    not_yet = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError)
    while len(received) < len(data):
        select.select([sock], [sock] if rest else [], [], TIMEOUT)
        with contextlib.suppress(*not_yet):
            rest = rest[sock.send(rest[:65536]) if rest else 0 :]
        with contextlib.suppress(*not_yet):
            part = sock.recv(65536)
            assert part, f"the connection ended after {len(received)} bytes"
            received += part
    return bytes(received)


def is_closed(sock: socket.socket) -> bool:
    """Return whether the peer closes the connection without a byte."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


class HalfClosingClient:
    """A TLS client whose directions end one by one."""

    def __init__(self, sock: socket.socket, name: str, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._until_done(self._tls.do_handshake)

    def send(self, data: bytes) -> None:
        """Send data."""
        self._tls.write(data)
        self._flush()

    def end(self) -> None:
        """Send a close_notify and the end of the connection."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._flush()
        self._sock.shutdown(socket.SHUT_WR)

    def read_all(self) -> bytes:
        """Read until the server's close_notify; raise `ssl.SSLEOFError` if the connection ends without."""
        data = b""
        while part := self._until_done(self._read):
            data += part
        return data

    def _read(self) -> bytes:
        try:
            return self._tls.read(65536)
        except ssl.SSLZeroReturnError:
            return b""

    def _until_done(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                self._flush()
                data = self._sock.recv(65536)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._sock.sendall(data)
