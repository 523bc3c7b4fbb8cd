"""The request that a handler gets, the response that it returns, and the encoding of a response's head."""

import asyncio
import functools
import time
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Final

from dstack_emu.transport.http.connection import IncomingRequest
from dstack_emu.transport.http.headers import Headers
from dstack_emu.transport.status import status_line

SERVER: Final = "dstack-emu"
"""The value of every answer's Server header."""

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

BODILESS: Final = (204, 304)
"""Statuses whose answers have no body; here they have no Content-Length either."""

HeaderPairs = tuple[tuple[str, str], ...]


class Request:
    """A request, and its connection.

    `path` and `query` are as they were sent, without percent-decoding.
    """

    __slots__ = ("_certificate", "_incoming", "headers", "method", "path", "query", "transport")

    def __init__(
        self, incoming: IncomingRequest, transport: asyncio.Transport, certificate: Callable[[], bytes | None]
    ) -> None:
        self._incoming, self._certificate = incoming, certificate
        self.method = incoming.method
        self.path = incoming.path
        self.query = incoming.query
        self.headers: Headers = incoming.headers
        self.transport = transport

    @property
    def client_certificate(self) -> bytes | None:
        """The client's certificate (DER); None without TLS, or if it showed none."""
        return self._certificate()

    async def read(self) -> bytes:
        """Wait for the whole body and return it; raise `BodyError` if it is too long or ends early.

        If the client has sent `Expect: 100-continue`, it is told to continue.
        """
        body = self._incoming.body
        if self._incoming.awaits_continue:
            self._incoming.awaits_continue = False
            self.transport.write(CONTINUE)
        if not body.is_settled:
            settled = asyncio.Event()
            body.when_settled(settled.set)
            await settled.wait()
        return body.take()


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: its status, its headers in order, and its body.

    A streamed body is sent in chunks, unless `length` is given. The server adds Content-Length, Date, Server and
    Connection.
    """

    status: int = 200
    body: bytes | AsyncIterable[bytes] = b""
    headers: HeaderPairs = ()
    length: int | None = None

    @classmethod
    def of(cls, body: bytes | str, content_type: str, status: int = 200, **headers: str) -> "Response":
        """Make an answer with a content type; a text is encoded in UTF-8, and the type says so."""
        if isinstance(body, str):
            body, content_type = body.encode(), f"{content_type}; charset=utf-8"
        more = tuple((name.replace("_", "-"), value) for name, value in headers.items())
        return cls(status, body, (("Content-Type", content_type), *more))

    @property
    def content_length(self) -> int | None:
        """The length of the body in bytes, None if it is not known."""
        return len(self.body) if isinstance(self.body, bytes) else self.length


@dataclass(frozen=True, slots=True)
class Framing:
    """How answers are sent on a connection; `headers` are added to every answer."""

    is_http_10: bool = False
    is_kept_alive: bool = True
    headers: HeaderPairs = ()


def is_chunked(response: Response, framing: Framing) -> bool:
    """Return whether an answer is sent in chunks: its length is unknown, and the client supports chunks."""
    return response.content_length is None and not framing.is_http_10


def response_head(response: Response, framing: Framing) -> bytes:
    """Encode the head of an answer, with the empty line at its end."""
    length = response.content_length
    before, after = _fixed_parts(response.status, response.headers, framing, length is None)
    counted = b"" if length is None or response.status in BODILESS else b"Content-Length: %d\r\n" % length
    return b"%b%bDate: %b\r\n%b" % (before, counted, _date(int(time.time())), after)


@functools.lru_cache(maxsize=64)  # there are few different heads
def _fixed_parts(status: int, headers: HeaderPairs, framing: Framing, has_no_length: bool) -> tuple[bytes, bytes]:
    """Encode the part of a head before the length, and the part after the date."""
    last: HeaderPairs = (("Server", SERVER), *framing.headers)
    if has_no_length and not framing.is_http_10:
        last += (("Transfer-Encoding", "chunked"),)
    if framing.is_kept_alive == framing.is_http_10:  # not the version's default
        last += (("Connection", "keep-alive" if framing.is_kept_alive else "close"),)
    version = "HTTP/1.0" if framing.is_http_10 else "HTTP/1.1"
    first = f"{version} {status_line(status)}\r\n{_lines(headers)}"
    return first.encode(), f"{_lines(last)}\r\n".encode()


def _lines(headers: HeaderPairs) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers)


@functools.lru_cache(maxsize=2)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()
