"""Listening sockets, and serving an application on one.

Binding stands apart from serving: a bound socket already listens, so its address is known and clients may
connect before the application is up, and a port that is taken is known before anything else is started.

An application is one of our own (`transport.http`) or aiohttp's. Closing does not wait for clients that keep their
connections open.

Not here: connections (`transport.http.protocol`, `transport.aiohttp_server`), TLS settings (an ssl.SSLContext is the
caller's), file permissions (the caller's umask).
"""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from dstack_emu.transport.errors import ListenError as ListenError
from dstack_emu.transport.http.application import Application
from dstack_emu.transport.http.protocol import HttpServer

if TYPE_CHECKING:
    from aiohttp import web

AnyApplication: TypeAlias = "Application | web.Application"
"""An application of our own kind, or aiohttp's."""

GRACE: Final = 2.0
"""Seconds that closing a server takes at most; calls in progress get half of them to finish."""

_BACKLOG: Final = 1024


def bind_tcp(host: str, port: int, *, setting: str = "", listen: bool = True) -> socket.socket:
    """Bind and listen on a TCP address; port 0 takes a free one. Errors name `setting`, if given.

    Without `listen` the port is taken, but clients are turned away until something is served on it.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not 0 <= port <= 65535:  # getaddrinfo would cut it to 16 bits
        raise ListenError(address, "the port is not in 0 to 65535", setting)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ListenError(address, f"no such address: {error}", setting) from error
    family, kind, protocol, _, target = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)
        if listen:
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(address, _why(error), setting) from error
    return sock


def bind_unix(path: str | os.PathLike[str], *, setting: str = "") -> socket.socket:
    """Bind and listen on a socket file.

    A socket file that nobody listens on any more is replaced. One that answers, or a file of another kind, is
    left alone and refused. The folder has to exist.
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


def reachable(sock: socket.socket) -> str:
    """Where a client on this machine reaches a bound TCP socket: `host:port`."""
    host, port = sock.getsockname()[:2]
    # An unspecified address is one to listen on, not one to connect to.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def reset(transport: asyncio.WriteTransport) -> None:
    """End a connection at once: over TCP with a reset, not an orderly close."""
    sock = None if transport.is_closing() else transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def reserve_unix(path: str | os.PathLike[str], *, setting: str = "") -> str:
    """Check that a socket file can be made there, by `bind_unix`'s rules, and return its path; leave nothing there.

    For a server that can only bind by itself, such as grpcio's.
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
        errno.EACCES: "permission denied",
        errno.ENOENT: "its folder does not exist",
    }
    return reasons.get(error.errno) or os.strerror(error.errno)


class _Connections(Protocol):
    """An application's connections: called for the protocol of a new one, and closed at the end."""

    def __call__(self) -> asyncio.BaseProtocol: ...

    async def close(self) -> None:
        """Close them all, after the answers in progress."""
        ...


class Server:
    """An application being served. Made by `serve`."""

    def __init__(self, sock: socket.socket, secure: bool, listener: asyncio.Server, connections: _Connections) -> None:
        self._listener, self._connections = listener, connections
        self._file: tuple[Path, int] | None = None
        if sock.family == socket.AF_UNIX:
            path = Path(sock.getsockname())
            self._file = (path, path.stat().st_ino)
            self._url = f"unix:{path}"
        else:
            self._url = f"{'https' if secure else 'http'}://{reachable(sock)}"

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it: `http(s)://host:port` or `unix:/path`."""
        return self._url

    def stop_listening(self) -> None:
        """Accept nobody from here on, at once; `close` does the rest."""
        self._listener.close()

    async def close(self) -> None:
        """Stop listening, let calls in progress finish (see GRACE), close connections, remove the file."""
        self._listener.close()
        await self._connections.close()
        if self._file is not None:
            path, inode = self._file
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == inode:  # not the one that another server put there since
                    path.unlink()


async def serve(app: AnyApplication, sock: socket.socket, ssl_context: ssl.SSLContext | None = None) -> Server:
    """Start an application, of our own kind or of aiohttp's, on a bound socket, which it owns from here on."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted ones inherit it
    connections: _Connections | None = None
    try:
        connections = await _connections(app)
        listener = await asyncio.get_running_loop().create_server(
            connections, sock=sock, ssl=ssl_context, backlog=_BACKLOG
        )
        return Server(sock, ssl_context is not None, listener, connections)
    except BaseException:
        if connections is not None:
            await connections.close()
        sock.close()
        raise


async def _connections(app: AnyApplication) -> _Connections:
    if isinstance(app, Application):
        return HttpServer(app, grace=GRACE)
    # Imported only here: a server of our own kind of application has no use for aiohttp's.
    from dstack_emu.transport.aiohttp_server import AiohttpServer

    server = AiohttpServer(app, GRACE)
    try:
        await server.set_up()
    except BaseException:
        await server.close()
        raise
    return server


# ---- TLS alerts --------------------------------------------------------------------------------------------
# asyncio closes a connection whose handshake failed without sending what OpenSSL has to say about it, so a client with
# another CA's certificate would see its connection end and not why.


class _AlertingSslObject(ssl.SSLObject):
    """Lets the alert of a failed handshake out before the failure is reported."""

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
            # Asked to read on, asyncio first sends what is written; the client, having the alert, ends the connection.
            raise ssl.SSLWantReadError from error


class ServerTlsContext(ssl.SSLContext):
    """A context for `serve`, whose failed handshakes end with OpenSSL's alert."""

    sslobject_class = _AlertingSslObject  # a documented attribute, meant for this

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Wrap as the standard library does, and remember where alerts are written to."""
        wrapped = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        if isinstance(wrapped, _AlertingSslObject):
            wrapped.outgoing = outgoing
        return wrapped
