"""Binds sockets, and serves applications on them.

Binding is separate from serving. A bound socket already listens, so its address is known and clients may connect before
the application runs; and a port that is in use is an error before anything else is started.

An application is one of our own (`transport.http`) or aiohttp's. Closing does not wait for clients that keep their
connections open.

Not here: connections (`transport.http.protocol`, `transport.aiohttp_server`), TLS settings (the caller passes an
ssl.SSLContext), file permissions (the umask of the process).
"""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
import struct
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from dstack_emu.transport.connections import note_server
from dstack_emu.transport.errors import ListenError as ListenError
from dstack_emu.transport.http.application import Application
from dstack_emu.transport.http.protocol import HttpServer
from dstack_emu.transport.localhost_socket import LOCALHOST, LocalhostSocket, parts_of, require_ipv6

if TYPE_CHECKING:
    from aiohttp import web

AnyApplication: TypeAlias = "Application | web.Application"
"""An application of our own kind, or aiohttp's."""

GRACE: Final = 2.0
"""The maximum time in seconds to close a server; calls in progress get half of it to finish."""

_BACKLOG: Final = 1024


def bind_tcp(host: str, port: int, *, setting: str = "", listen: bool = True) -> socket.socket:
    """Bind and listen on a TCP address; port 0 takes a free one.

    `localhost` is 127.0.0.1 and, if the machine has it, ::1 (`LocalhostSocket`); `::` is every address of the machine.

    If `listen` is false, the port is bound, but clients are refused until something is served on it. Raises
    `ListenError`, which names `setting` if it is given.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not 0 <= port <= 65535:  # getaddrinfo would cut it to 16 bits
        raise ListenError(address, "the port is not in 0 to 65535", setting)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ListenError(address, f"no such address: {error}", setting) from error
    try:
        sock = LocalhostSocket.bind_both(port) if host == LOCALHOST else _bound(found[0])
    except OSError as error:
        raise ListenError(error.filename or address, _why(error), setting) from error
    if listen:
        sock.listen(_BACKLOG)
    return sock


def bind_udp(host: str, port: int, *, setting: str = "") -> socket.socket:
    """Bind a UDP port of an IP address; raise `ListenError`, which names `setting` if it is given."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ListenError(f"{address} (UDP)", _why(error), setting) from error
    sock.setblocking(False)
    return sock


def _bound(found: tuple[Any, ...]) -> socket.socket:
    """Bind what getaddrinfo found; the unspecified address of IPv6 takes IPv4's connections, too."""
    family, kind, protocol, _, target = found
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if target[0] == "::":
            require_ipv6()
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(target)
    except OSError:
        sock.close()
        raise
    return sock


def bind_unix(path: str | os.PathLike[str], *, setting: str = "") -> socket.socket:
    """Bind and listen on a socket file, in a folder that exists.

    A socket file without a listener is replaced. If another process listens there, or it is not a socket, raise
    `ListenError`, which names `setting` if it is given.
    """
    path = os.path.abspath(path)
    address = f"unix:{path}"
    _remove_stale(path, address, setting)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(address, _why(error), setting) from error
    return sock


def discard(sock: socket.socket) -> None:
    """Close a bound socket that nothing serves, and remove its file; do nothing if it is closed already."""
    if sock.family == socket.AF_UNIX and sock.fileno() != -1:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sock.getsockname())
    sock.close()


def reachable(sock: socket.socket) -> str:
    """Return the address of a bound TCP socket for clients on this machine: `host:port`."""
    host, port = sock.getsockname()[:2]
    # A server can listen on an unspecified address, but a client cannot connect to one.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def reset(transport: asyncio.WriteTransport) -> None:
    """End a connection at once; over TCP with a reset instead of an orderly close."""
    sock = None if transport.is_closing() else transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def reserve_unix(path: str | os.PathLike[str], *, setting: str = "") -> str:
    """Check by the rules of `bind_unix` that a socket file can be created, and return its path.

    No file is left there. Use it for a server that can only bind by itself, such as grpcio's.
    """
    path = os.path.abspath(path)
    bind_unix(path, setting=setting).close()
    os.unlink(path)
    return path


def _remove_stale(path: str, address: str, setting: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(address, _why(error), setting) from error
    if not is_socket:
        raise ListenError(address, "a file that is not a socket is there", setting)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a listener with a full backlog would block
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise ListenError(address, f"a socket is there: {_why(error)}", setting) from error
    raise ListenError(address, "another process listens there", setting)


def _why(error: OSError) -> str:
    if error.errno is None:  # the only error of bind that Python raises itself: a path too long for the system
        return f"the path is too long for a socket ({error})"
    reasons = {
        errno.EADDRINUSE: "the address is in use",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EAFNOSUPPORT: "this machine has no IPv6",
        errno.EACCES: "permission denied",
        errno.ENOENT: "its folder does not exist",
    }
    return reasons.get(error.errno) or os.strerror(error.errno)


class _Connections(Protocol):
    """The connections of an application: it makes the protocol of a new one, and closes all."""

    @property
    def connections(self) -> Collection[object]: ...

    def __call__(self) -> asyncio.BaseProtocol: ...

    async def close(self) -> None:
        """Close all connections, after the answers in progress."""
        ...


class Server:
    """A running server; `serve` makes it."""

    def __init__(
        self, sock: socket.socket, secure: bool, listeners: Sequence[asyncio.Server], connections: _Connections
    ) -> None:
        self._listeners, self._connections = listeners, connections
        note_server(self)
        self._file: tuple[Path, int] | None = None
        if sock.family == socket.AF_UNIX:
            path = Path(sock.getsockname())
            self._file = (path, path.stat().st_ino)
            self._url = f"unix:{path}"
        else:
            self._url = f"{'https' if secure else 'http'}://{reachable(sock)}"

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._connections.connections)

    @property
    def url(self) -> str:
        """The URL for clients on this machine: `http(s)://host:port` or `unix:/path`."""
        return self._url

    def stop_listening(self) -> None:
        """Accept no further connections; `close` does the rest."""
        for listener in self._listeners:
            listener.close()

    async def close(self) -> None:
        """Stop listening, let calls in progress finish (see GRACE), close connections, remove the file."""
        self.stop_listening()
        await self._connections.close()
        if self._file is not None:
            path, inode = self._file
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == inode:  # not a file that another server has created meanwhile
                    path.unlink()


async def serve(app: AnyApplication, sock: socket.socket, ssl_context: ssl.SSLContext | None = None) -> Server:
    """Serve an application, our own or aiohttp's, on a bound socket; take ownership of the socket."""
    parts = parts_of(sock)
    connections: _Connections | None = None
    listeners: list[asyncio.Server] = []
    try:
        connections = await _connections(app)
        for part in parts:
            part.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted ones inherit it
            listeners.append(await accept_on(part, connections, tls=ssl_context))
        return Server(sock, ssl_context is not None, listeners, connections)
    except BaseException:
        for listener in listeners:
            listener.close()
        if connections is not None:
            await connections.close()
        for part in parts:
            discard(part)
        raise


async def accept_on(
    sock: socket.socket,
    factory: Callable[[], asyncio.BaseProtocol],
    *,
    tls: ssl.SSLContext | None = None,
    handshake_timeout: float | None = None,
) -> asyncio.Server:
    """Accept connections on a bound socket, whose protocols `factory` makes; if this is cancelled, close the socket.

    asyncio's own `create_server` leaves the socket in its selector if it is cancelled while it begins to listen. The
    descriptor then belongs to another socket soon, whose use fails with `No such file or directory`.
    """
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        factory,
        sock=sock,
        ssl=tls,
        backlog=_BACKLOG,
        ssl_handshake_timeout=None if tls is None else handshake_timeout,
        start_serving=False,
    )
    try:
        await server.start_serving()
    except BaseException:
        server.close()
        raise
    return server


async def _connections(app: AnyApplication) -> _Connections:
    if isinstance(app, Application):
        return HttpServer(app, grace=GRACE)
    # Imported here, because a server of our own applications does not need aiohttp's.
    from dstack_emu.transport.aiohttp_server import AiohttpServer

    server = AiohttpServer(app, GRACE)
    try:
        await server.set_up()
    except BaseException:
        await server.close()
        raise
    return server


# ---- TLS alerts --------------------------------------------------------------------------------------------
# If a handshake fails, asyncio closes the connection without sending OpenSSL's alert, so a client with a certificate of
# another CA would see the end of its connection, but no reason.


class _AlertingSslObject(ssl.SSLObject):
    """Sends the alert of a failed handshake before it reports the failure."""

    outgoing: ssl.MemoryBIO
    _failure: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if not self.outgoing.pending:
                raise
            self._failure = error
            # asyncio sends pending bytes before it reads again; the client gets the alert and ends the connection.
            raise ssl.SSLWantReadError from error


class ServerTlsContext(ssl.SSLContext):
    """A context for `serve` that ends failed handshakes with OpenSSL's alert."""

    sslobject_class = _AlertingSslObject  # a documented attribute for this purpose

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Wrap as the standard library does, and keep the BIO that alerts are written to."""
        wrapped = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        if isinstance(wrapped, _AlertingSslObject):
            wrapped.outgoing = outgoing
        return wrapped
