"""A cheap load generator: blocking sockets in turn, with one request in progress on each.

Of an answer it parses only status and Content-Length, so that the server's speed is measured and not its own.
"""

import socket
import ssl
import time
from collections.abc import Callable, Sequence

_TIMEOUT = 30.0


class LoadError(Exception):
    """An answer is not a 200 with a length, so the measured server does not work."""


class Connection:
    """A kept-alive connection that sends one request again and again."""

    def __init__(self, sock: socket.socket, request: bytes) -> None:
        sock.settimeout(_TIMEOUT)
        self._sock, self._request = sock, request

    def send(self) -> None:
        """Send the request."""
        self._sock.sendall(self._request)

    def receive(self) -> bytes:
        """Read one answer, and return its body."""
        data = bytearray()
        while (end := data.find(b"\r\n\r\n")) < 0:
            self._more(data)
        head = bytes(data[:end]).lower()
        _, found, length = head.partition(b"\r\ncontent-length:")
        if not found:
            raise LoadError(f"an answer with a length expected, got {head[:200]!r}")
        total = end + 4 + int(length.split(b"\r\n", 1)[0])
        while len(data) < total:
            self._more(data)
        if head.split(b" ", 2)[1] != b"200":
            raise LoadError(bytes(data[:1000]).decode(errors="replace"))
        return bytes(data[end + 4 :])

    def call(self) -> bytes:
        """Send the request, and return the body of the answer."""
        self.send()
        return self.receive()

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def _more(self, data: bytearray) -> None:
        chunk = self._sock.recv(65536)
        if not chunk:
            raise LoadError("the connection was closed within an answer")
        data += chunk


def post(path: str, body: bytes, host: str = "localhost") -> bytes:
    """Return the bytes of a POST of JSON."""
    headers = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body


def connect_unix(path: str) -> socket.socket:
    """Connect to a socket file."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def connect_tcp(address: tuple[str, int]) -> socket.socket:
    """Connect to a TCP server."""
    sock = socket.create_connection(address, timeout=_TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def connect_tls(address: tuple[str, int], context: ssl.SSLContext) -> socket.socket:
    """Connect to a TLS server, and perform the handshake."""
    return context.wrap_socket(connect_tcp(address), server_hostname=address[0])


def closed_loop(connections: Sequence[Connection]) -> Callable[[float], float]:
    """Make a measurement that keeps a request in progress on every connection, and returns calls per second."""

    def measure(seconds: float) -> float:
        calls, began = 0, time.perf_counter()
        for connection in connections:
            connection.send()
        while time.perf_counter() - began < seconds:
            for connection in connections:
                connection.receive()
                connection.send()
            calls += len(connections)
        for connection in connections:
            connection.receive()
        return (calls + len(connections)) / (time.perf_counter() - began)

    return measure


def make_calls(connections: Sequence[Connection], calls: int) -> None:
    """Make that many calls: one after another on each connection, at the same time on all connections."""
    while calls > 0:
        batch = connections[:calls]
        for connection in batch:
            connection.send()
        for connection in batch:
            connection.receive()
        calls -= len(batch)
