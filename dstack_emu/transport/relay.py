"""Carrying connections from a listening socket to a server on a socket file, TLS taken off on the way.

For a server that cannot take a bound socket, or whose TLS will not do. Who reads slowly slows down who writes: nothing
piles up here. What each client showed as its certificate is noted under the name that its connection has at the
server; a name is used once.

Not here: TLS settings (an ssl.SSLContext is the caller's), and any look into what is carried.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
from collections.abc import MutableMapping
from typing import Final
from weakref import WeakValueDictionary

from dstack_emu.transport.listen import reachable, reset

HANDSHAKE_TIMEOUT: Final = 20.0
"""Seconds that a client may take for its TLS handshake."""

_log = logging.getLogger(__name__)

_by_name: Final[WeakValueDictionary[str, "_Client"]] = WeakValueDictionary()
"""Every connection that this process carries, by its name at the server."""


def reset_connection(name: str) -> bool:
    """Reset a client's connection, by the name that it has at the server; return whether it is one carried here."""
    client = _by_name.get(name)
    if client is None or client.transport is None:
        return False
    reset(client.transport)
    return True


class Relay:
    """Connections being carried. Made by `start_relay`."""

    def __init__(self, path: str, certificates: MutableMapping[str, bytes | None]) -> None:
        self._path, self._certificates = path, certificates
        self._token, self._count = secrets.token_hex(8), 0
        self._carried: set[_Client] = set()
        self._listening: asyncio.Server | None = None
        self._none = asyncio.Event()
        self._none.set()
        self.target = ""
        """What a client on this machine connects to: `host:port`."""

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Listen on a bound socket, which is the relay's from here on."""
        self.target = reachable(sock)
        self._listening = await asyncio.get_running_loop().create_server(
            lambda: _Client(self),
            sock=sock,
            ssl=tls,
            backlog=1024,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_TIMEOUT,
        )

    def stop_listening(self) -> None:
        """Take no more connections; those that are there go on."""
        if self._listening is not None:
            self._listening.close()

    async def close(self, seconds: float) -> None:
        """Stop listening, wait at most so long until every connection has ended, and cut the rest."""
        self.stop_listening()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()
        for client in set(self._carried):
            client.abort()

    def connect(self, client: "_Client", certificate: bytes | None) -> socket.socket:
        """Connect one client to the server, and note its certificate under a new name."""
        self._count += 1
        name = f"dstack-emu-{self._token}-{self._count}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.bind(f"\0{name}")  # no file: an abstract name
            sock.connect(self._path)  # at once, or the server's backlog is full
        except OSError:
            sock.close()
            raise
        client.name = f"unix-abstract:{name}"
        self._certificates[client.name] = certificate
        _by_name[client.name] = client
        self._carried.add(client)
        self._none.clear()
        return sock

    def ended(self, client: "_Client") -> None:
        """Forget a client."""
        self._certificates.pop(client.name, None)
        _by_name.pop(client.name, None)
        self._carried.discard(client)
        if not self._carried:
            self._none.set()


async def start_relay(
    sock: socket.socket,
    path: str,
    certificates: MutableMapping[str, bytes | None],
    tls: ssl.SSLContext | None = None,
) -> Relay:
    """Carry the connections of a bound socket to the socket file at `path`.

    `certificates` has the certificate (DER) of each connection while it lasts, or None for one without, by the name of
    its peer address as grpcio writes it: `unix-abstract:…`.
    """
    relay = Relay(path, certificates)
    try:
        await relay.start(sock, tls)
    except BaseException:
        sock.close()
        raise
    return relay


class _Side(asyncio.Protocol):
    """One of the two ends of a carried connection."""

    other: "_Side | None" = None
    transport: asyncio.Transport | None = None

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()  # after what is still to be written


class _Server(_Side):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream's
        self.transport = transport


class _Client(_Side):
    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._connecting: asyncio.Task[None] | None = None
        self.name = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream's
        self.transport = transport
        transport.pause_reading()  # until there is somewhere to write
        channel = transport.get_extra_info("ssl_object")
        try:
            sock = self._relay.connect(self, None if channel is None else channel.getpeercert(binary_form=True))
        except OSError as error:
            _log.error("a connection cannot be carried: %s", error)
            transport.abort()
            return
        self._connecting = asyncio.create_task(self._connect(sock))

    async def _connect(self, sock: socket.socket) -> None:
        _, server = await asyncio.get_running_loop().create_unix_connection(_Server, sock=sock)
        self.other, server.other = server, self
        if self.transport is None:  # gone meanwhile
            assert server.transport is not None  # noqa: S101 - just connected
            server.transport.close()
        else:
            self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._relay.ended(self)

    def abort(self) -> None:
        """Cut the connection."""
        for side in (self, self.other):
            if side is not None and side.transport is not None:
                side.transport.abort()
