"""Forwards connections from a listening socket to a server on a socket file, and terminates TLS.

It is for a server that cannot use a bound socket, or whose TLS is unsuitable. The certificate of each client is
recorded under the name that its connection has at the server; a name is used only once.

Not here: TLS settings (the caller passes an ssl.SSLContext), and the forwarding of bytes (`transport.forward`).
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

from dstack_emu.transport.forward import ClientSide, Side
from dstack_emu.transport.listen import accept_on, reachable, reset
from dstack_emu.transport.localhost_socket import parts_of
from dstack_emu.transport.open_calls import shown_peer

HANDSHAKE_TIMEOUT: Final = 20.0
"""The timeout of a client's TLS handshake in seconds."""

_log = logging.getLogger(__name__)

_by_name: Final[WeakValueDictionary[str, "_Client"]] = WeakValueDictionary()
"""Every forwarded connection of this process, by its name at the server."""


def reset_connection(name: str) -> bool:
    """Reset the client's connection with that name at the server; return whether there is one."""
    client = _by_name.get(name)
    if client is None or client.transport is None:
        return False
    reset(client.transport)
    return True


def client_of(name: str) -> str:
    """Return the address of the client whose connection has that name at the server, and where it has connected to."""
    client = _by_name.get(name)
    if client is None or client.transport is None:
        return "a client that has gone"
    ends = (shown_peer(client.transport.get_extra_info(end)) for end in ("peername", "sockname"))
    return " at ".join(ends)


class Relay:
    """A running relay; `start_relay` makes it."""

    def __init__(self, path: str, certificates: MutableMapping[str, bytes | None]) -> None:
        self._path, self._certificates = path, certificates
        self._token, self._count = secrets.token_hex(8), 0
        self._carried: set[_Client] = set()
        self._listening: list[asyncio.Server] = []
        self._none = asyncio.Event()
        self._none.set()
        self.target = ""
        """The address for clients on this machine: `host:port`."""

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Listen on a bound socket, and take ownership of it."""
        self.target = reachable(sock)
        for part in parts_of(sock):
            listening = await accept_on(part, lambda: _Client(self), tls=tls, handshake_timeout=HANDSHAKE_TIMEOUT)
            self._listening.append(listening)

    def stop_listening(self) -> None:
        """Accept no further connections; existing ones continue."""
        for listening in self._listening:
            listening.close()

    async def close(self, seconds: float) -> None:
        """Stop listening, wait at most so many seconds until every connection has ended, and abort the rest."""
        self.stop_listening()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()
        for client in set(self._carried):
            client.abort()

    def connect(self, client: "_Client", certificate: bytes | None) -> socket.socket:
        """Connect a client to the server, and record its certificate under a new name; raise `OSError`."""
        self._count += 1
        name = f"dstack-emu-{self._token}-{self._count}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.bind(f"\0{name}")  # no file: an abstract name
            sock.connect(self._path)  # it connects at once, or fails because the backlog is full
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
    """Forward the connections of a bound socket to the socket file at `path`.

    While a connection lasts, `certificates` has its client certificate (DER), or None, under the peer address that
    grpcio reports for it: `unix-abstract:…`.
    """
    relay = Relay(path, certificates)
    try:
        await relay.start(sock, tls)
    except BaseException:
        sock.close()
        raise
    return relay


class _Client(ClientSide):
    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._sock: socket.socket | None = None
        self.name = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        channel = transport.get_extra_info("ssl_object")
        try:
            self._sock = self._relay.connect(self, None if channel is None else channel.getpeercert(binary_form=True))
        except OSError as error:
            _log.error("a connection cannot be forwarded: %s", error)
            assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream's
            transport.abort()
            return
        super().connection_made(transport)

    async def connect(self, server: Side) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: server, sock=self._sock)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._relay.ended(self)
