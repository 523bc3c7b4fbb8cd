"""HTTP/1.1 messages of one plain form, read and written without aiohttp's machinery, at a fraction of its cost.

The form: a head in printable ASCII, each header once and none that changes how a body or connection is read, and a body
with a length, every byte of it there. Nearly every RPC and every answer to one has it. For whatever has not, these
functions give None, and aiohttp reads the very same bytes; tests hold both readings against each other.

Not here: connections (`transport.keepalive`, `transport.connection`), and what is asked.
Source of the form: RFC 9112.
"""

import asyncio
import functools
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

from dstack_emu.transport.status import status_line

HEADER_LINES: Final = rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e]*\r\n)*)"
"""A pattern for the headers of a message, one group."""

MAX_HEAD: Final = 8190
"""Bytes of a plain head: aiohttp's own limit for one line of it."""
_MAX_HEADERS: Final = 100
"""Lines of a plain head: fewer than aiohttp's own limit."""
_MAX_LENGTH_DIGITS: Final = 9
_MAX_REQUEST: Final = 64 * 1024
"""Bytes of a plain request's body: less than any application's own limit, which aiohttp keeps."""

_REQUEST: Final = re.compile(
    rb"POST (/[0-9A-Za-z._/\-]*)(?:\?([0-9A-Za-z_=&]*))? HTTP/1\.1\r\n" + HEADER_LINES + rb"\r\n"
)
_NOT_PLAIN: Final = frozenset({"transfer-encoding", "content-encoding", "upgrade", "trailer", "expect"})


def plain_headers(lines: bytes) -> dict[str, str] | None:
    """Read what `HEADER_LINES` matched, names in lower case; None where a header is there twice or not a plain one."""
    headers: dict[str, str] = {}
    pieces = lines.decode("ascii").splitlines()
    for piece in pieces:
        name, _, value = piece.partition(":")
        headers[name.lower()] = value.strip(" \t")
    if len(headers) != len(pieces) or len(pieces) > _MAX_HEADERS or not _NOT_PLAIN.isdisjoint(headers):
        return None
    if headers.get("connection", "keep-alive").lower() != "keep-alive":
        return None
    return headers


def plain_length(headers: Mapping[str, str]) -> int | None:
    """The length of a plain message's body in bytes; None without a Content-Length, or with none that is a number."""
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) <= _MAX_LENGTH_DIGITS else None


# ---- A server's side ---------------------------------------------------------------------------------------


class PlainRequest(NamedTuple):
    """A POST that came whole: its path and query as they were sent, its Content-Type, its body, and on what it came."""

    path: str
    query: str
    content_type: str | None
    body: bytes
    transport: asyncio.Transport | None

    async def read(self) -> bytes:
        """The body."""
        return self.body


class PlainAnswer(NamedTuple):
    """An answer, as its body's giver knows it."""

    status: int
    content_type: str
    body: bytes

    def response(self) -> web.Response:
        """The same for aiohttp."""
        return web.Response(status=self.status, body=self.body, headers={"Content-Type": self.content_type})


PlainHandler = Callable[[PlainRequest], Awaitable[PlainAnswer]]


class PlainCalls:
    """Who takes an application's plain requests, by path, and what such a request need not pass there."""

    def __init__(self) -> None:
        self.handlers: dict[str, PlainHandler] = {}
        self.headers: dict[str, str] = {}
        """Headers of every answer."""
        self.passable: set[object] = set()
        """Middlewares and signals of the application that would do nothing to these calls, or nothing but `headers`."""

    def write(self, answer: PlainAnswer, **more: str) -> bytes:
        """Write an answer, to the byte as aiohttp writes it; `more` are headers of its own."""
        before, after = _answer_head(answer.status, answer.content_type, (*more.items(), *self.headers.items()))
        date, body = rfc822_formatted_time().encode(), answer.body
        return b"%b%d\r\nDate: %b\r\n%b%b" % (before, len(body), date, after, body)

    def write_failure(self) -> bytes:
        """Write what is answered, as by aiohttp, where a handler raised; it is the last answer on its connection."""
        text = f"{status_line(500)}\n\nServer got itself in trouble"
        return self.write(PlainAnswer(500, "text/plain; charset=utf-8", text.encode()), Connection="close")


_PLAIN_CALLS: Final = web.AppKey("plain_calls", PlainCalls)


def plain_calls(app: web.Application) -> PlainCalls:
    """An application's own; made when it is first asked for."""
    if _PLAIN_CALLS not in app:
        app[_PLAIN_CALLS] = PlainCalls()
    return app[_PLAIN_CALLS]


def usable_plain_calls(app: web.Application) -> PlainCalls | None:
    """The same, or None where something stands before the application that a request has to pass."""
    calls = app.get(_PLAIN_CALLS)
    if calls is None or not calls.passable.issuperset((*app.middlewares, *app.on_response_prepare)):
        return None
    return calls


def add_headers(app: web.Application, headers: Mapping[str, str]) -> None:
    """Let every answer of an application carry these headers, plain or not."""

    async def add(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(headers)

    app.on_response_prepare.append(add)
    calls = plain_calls(app)
    calls.headers.update(headers)
    calls.passable.add(add)


class _Head(NamedTuple):
    path: str
    query: str
    content_type: str | None
    length: int


def read_request(data: bytes, transport: asyncio.Transport | None) -> PlainRequest | None:
    """Read a plain request that is all of `data`."""
    end = data.find(b"\r\n\r\n") + 4
    if not 4 <= end <= MAX_HEAD:
        return None
    head = _request_head(data[:end])
    if head is None or len(data) != end + head.length or head.length > _MAX_REQUEST:
        return None
    return PlainRequest(head.path, head.query, head.content_type, data[end:], transport)


@functools.lru_cache(maxsize=64)  # clients of one make have one head
def _request_head(data: bytes) -> _Head | None:
    match = _REQUEST.fullmatch(data)
    headers = None if match is None else plain_headers(match[3])
    length = None if headers is None else plain_length(headers)
    if match is None or headers is None or length is None or "host" not in headers:
        return None
    return _Head(match[1].decode(), (match[2] or b"").decode(), headers.get("content-type"), length)


@functools.lru_cache(maxsize=64)
def _answer_head(status: int, content_type: str, headers: tuple[tuple[str, str], ...]) -> tuple[bytes, bytes]:
    """What of a head comes before the length, and what after the date."""
    before = f"HTTP/1.1 {status_line(status)}\r\nContent-Type: {content_type}\r\nContent-Length: "
    after = "".join(f"{name}: {value}\r\n" for name, value in (("Server", SERVER_SOFTWARE), *headers))
    return before.encode(), f"{after}\r\n".encode()
