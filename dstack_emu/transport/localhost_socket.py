"""The socket of `localhost`: one port on 127.0.0.1 and, if the machine has it, on ::1.

Clients of `localhost` try either address, in an order that differs from client to client.
"""

import errno
import socket
from typing import Final, Self

LOCALHOST: Final = "localhost"

_ATTEMPTS: Final = 20
"""How many free ports are tried: one that is free on IPv4 may be in use on IPv6."""

_NO_IPV6: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


class LocalhostSocket(socket.socket):
    """The IPv4 socket; `twin` is the IPv6 one of the same port, None if the machine has none or a server took it."""

    twin: socket.socket | None = None

    @classmethod
    def bind_both(cls, port: int) -> Self:
        """Bind both addresses (port 0: a free one); raise `OSError`, whose filename is the address."""
        for attempt in range(_ATTEMPTS):
            sock = cls(socket.AF_INET, socket.SOCK_STREAM)
            try:
                _bind(sock, "127.0.0.1", port)
                sock.twin = _twin(sock.getsockname()[1])
            except OSError as error:
                sock.close()
                if port == 0 and error.errno == errno.EADDRINUSE and attempt < _ATTEMPTS - 1:
                    continue
                raise
            return sock
        raise AssertionError("the last attempt returns or raises")

    def take_twin(self) -> socket.socket | None:
        """Return the IPv6 socket to a new owner, who closes it."""
        twin, self.twin = self.twin, None
        return twin

    def dup(self) -> Self:
        """Duplicate both sockets."""
        made = super().dup()
        made.twin = None if self.twin is None else self.twin.dup()
        return made

    def listen(self, backlog: int = socket.SOMAXCONN) -> None:
        """Listen on both sockets."""
        super().listen(backlog)
        if self.twin is not None:
            self.twin.listen(backlog)

    def close(self) -> None:
        """Close both sockets."""
        super().close()
        if self.twin is not None:
            self.twin.close()


def _bind(sock: socket.socket, host: str, port: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"[{host}]:{port}" if ":" in host else f"{host}:{port}") from error


def _twin(port: int) -> socket.socket | None:
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno in _NO_IPV6:
            return None
        raise
    try:
        _bind(sock, "::1", port)
    except OSError as error:
        sock.close()
        if error.errno in _NO_IPV6:
            return None
        raise
    return sock


def require_ipv6() -> None:
    """Raise `OSError` (EAFNOSUPPORT) if the machine has no IPv6: where it is switched off, `::` can still be bound."""
    probe = _twin(0)
    if probe is None:
        raise OSError(errno.EAFNOSUPPORT, "no IPv6")
    probe.close()


def parts_of(sock: socket.socket) -> tuple[socket.socket, ...]:
    """Return the sockets to serve on, which the caller owns: one, or the two of `localhost`."""
    twin = sock.take_twin() if isinstance(sock, LocalhostSocket) else None
    return (sock,) if twin is None else (sock, twin)


def bound_host(sock: socket.socket) -> str:
    """Return the host with which a TCP socket can be bound again."""
    return LOCALHOST if isinstance(sock, LocalhostSocket) else str(sock.getsockname()[0])
