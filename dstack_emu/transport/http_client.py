"""An HTTP client for short requests, with a deadline for each request and a limit for the length of an answer.

Connections are kept between requests. Redirects are followed only on request. There are no proxies and no cookies, and
the client does not offer to accept compression.

Not here: the meaning of an answer; parsing it (`transport.http.answer`).
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin

from dstack_emu.attest.cache import Memo
from dstack_emu.attest.version import EMULATOR
from dstack_emu.transport.failures import NoAnswerError, NoAnswerInTimeError, describe_failure
from dstack_emu.transport.http.answer import AnswerReader
from dstack_emu.transport.http.client_connection import ClientConnection
from dstack_emu.transport.http.headers import Headers
from dstack_emu.transport.http.origin import Origin, RequestTarget

KEPT_IDLE: Final = 2.0
"""Seconds for which an idle connection is kept for the next request. Servers keep one for longer (Node for 5 s);
otherwise a request could be lost on a connection that the server is closing."""
MAX_REDIRECTS: Final = 10

_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_WITH_BODY: Final = frozenset(("POST", "PUT", "PATCH"))


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer; the names of its headers are case-insensitive.

    `certificate` is that of the server (DER), None without TLS.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    certificate: bytes | None = None


class HttpClient:
    """Sends requests. Close it; a later request opens new connections.

    `timeout` is for a whole request, in seconds. `max_answer` is the maximum length of a body in bytes, uncompressed.
    `headers` are sent with every request. `kept_idle` is the time in seconds for which an idle connection is kept.
    `tls` are the settings for https (None: the system's authorities verify servers). With `unix`, every request goes to
    that socket file, and the host in its URL is ignored. With `unpacks` false, a compressed body is returned as it is.
    """

    def __init__(
        self,
        *,
        timeout: float,
        max_answer: int,
        headers: Mapping[str, str] | None = None,
        kept_idle: float = KEPT_IDLE,
        tls: ssl.SSLContext | None = None,
        unix: str | None = None,
        unpacks: bool = True,
    ) -> None:
        self.timeout, self._max_answer, self._kept_idle = timeout, max_answer, kept_idle
        self._headers = _lines({"User-Agent": f"dstack-emu/{EMULATOR}", **(headers or {}), "Accept": "*/*"})
        self._tls, self._unix, self._unpacks = tls, unix, unpacks
        self._target = Memo(RequestTarget.parse, lambda url, target: 3 * len(url), max_entries=64, max_bytes=1 << 16)
        self._idle: dict[Origin, list[ClientConnection]] = {}
        self._open: set[ClientConnection] = set()

    async def send(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        follow_redirects: bool = False,
        write: Callable[[bytes], object] | None = None,
    ) -> HttpAnswer:
        """Send a request and return the answer, whatever its status is.

        With `write`, the pieces of a successful answer's body are passed to it. Raises `NoAnswerError`, whose text says
        why, and `AnswerTooLongError`. If the connection ends before the answer, a GET is sent once more, a POST is not.
        """
        try:
            async with asyncio.timeout(self.timeout):
                for _ in range(MAX_REDIRECTS):
                    answer = await self._send(method, url, body, headers or {}, write)
                    location = answer.headers.get("location")
                    if not follow_redirects or answer.status not in _REDIRECTS or location is None:
                        return answer
                    url = urljoin(url, location)
        except (OSError, TimeoutError) as error:
            kind = NoAnswerInTimeError if isinstance(error, TimeoutError) and not error.errno else NoAnswerError
            raise kind(describe_failure(error, self.timeout)) from error
        raise NoAnswerError(f"more than {MAX_REDIRECTS} redirects")

    async def close(self) -> None:
        """Close all connections, including those in use."""
        for connection in tuple(self._open):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # their transports close in the loop's next turn

    async def _send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: Mapping[str, str],
        write: Callable[[bytes], object] | None,
    ) -> HttpAnswer:
        target = self._target(url)
        length = b"" if body is None and method not in _WITH_BODY else b"Content-Length: %d\r\n" % len(body or b"")
        head = b"%b %b HTTP/1.1\r\n%b%b%b%b\r\n" % (
            *(method.encode(), target.path, target.lines),
            *(self._headers, _lines(headers), length),
        )
        request = head + (body or b"")
        try:
            return await self._exchange(target.origin, request, write)
        except (NoAnswerError, ConnectionError) as error:
            if method != "GET" or not _was_lost(error):
                raise
        return await self._exchange(target.origin, request, write)

    async def _exchange(self, origin: Origin, request: bytes, write: Callable[[bytes], object] | None) -> HttpAnswer:
        connection = self._take(origin) or await self._connect(origin)
        reader = AnswerReader(self._max_answer, write, unpacks=self._unpacks)
        await connection.exchange(request, reader)
        if connection.is_open:
            connection.wait_idle(self._kept_idle)
            self._idle.setdefault(origin, []).append(connection)
        return HttpAnswer(reader.status, Headers(reader.headers), reader.body, connection.certificate)

    # ---- connections

    def _take(self, origin: Origin) -> ClientConnection | None:
        """Take the connection that became idle last; return None if there is none."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            connection.wake()
            if connection.is_open:
                return connection
        return None

    async def _connect(self, origin: Origin) -> ClientConnection:
        loop = asyncio.get_running_loop()
        if self._unix is not None:
            _, connection = await loop.create_unix_connection(self._new, self._unix)
            return connection
        tls = self._settings() if origin.is_secure else None
        failure: OSError = socket.gaierror(f"no address of {origin.host}")
        for *_, address in await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM):
            try:
                _, connection = await loop.create_connection(
                    self._new, str(address[0]), origin.port, ssl=tls, server_hostname=origin.host if tls else None
                )
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = error
            else:
                return connection
        raise failure

    def _new(self) -> ClientConnection:
        connection = ClientConnection(self._lost)
        self._open.add(connection)
        return connection

    def _lost(self, connection: ClientConnection) -> None:
        self._open.discard(connection)
        for idle in self._idle.values():
            if connection in idle:
                idle.remove(connection)

    def _settings(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def _was_lost(error: Exception) -> bool:
    """Return whether the connection ended before the answer began."""
    return isinstance(error, ConnectionError) or str(error) == "connection closed before the answer"


def _lines(headers: Mapping[str, str]) -> bytes:
    for name, value in headers.items():
        if any(character in name + value for character in "\r\n\0"):
            raise ValueError(f"a header may not have a line break: {name!r:.80}")
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode(errors="surrogateescape")
