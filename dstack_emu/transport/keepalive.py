"""A frugal HTTP client for small questions that are asked again and again of one server: a decision, a revalidation.

Connections, TLS, names and the parsing of whatever a server may answer are aiohttp's. What is spared is the work of its
session for each request, most of what one costs: the head is written once, and an answer that is short, plain and whole
is read where it arrives. That reading knows one form and no other: `_read_plain` gives None for anything it does not
know, and then aiohttp's own parser reads the very same bytes.

Not here: redirects, cookies, proxies, and what an answer means. Source of the form: RFC 9112.
"""

import asyncio
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import aiohttp
import yarl
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError

from dstack_emu.transport.plain import HEADER_LINES, MAX_HEAD, plain_headers, plain_length

KEPT_IDLE: Final = 2.0
"""Seconds that a connection may lie idle and be used again: less than what servers keep one for (Node's 5 s), for a
question that meets the end of its connection is lost."""

HEAD_REMEMBERED: Final = 64
"""URLs whose request heads are kept."""

_ANSWER: Final = re.compile(rb"HTTP/1\.1 (200|304) [\t\x20-\x7e]*\r\n" + HEADER_LINES + rb"\r\n")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def header_lines(headers: Mapping[str, str]) -> str:
    """Write headers as they go over the wire; their values are the caller's to keep on one line."""
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


class AnswerTooLongError(Exception):
    """An answer with a longer body than is read; the text says which length that is."""


@dataclass(frozen=True, slots=True)
class _Question:
    request: ClientRequest
    head: str
    idle: "list[_Idle]"
    """The connections that may carry it; those to one server are shared."""


@dataclass(frozen=True, slots=True)
class _Idle:
    connection: Connection
    since: float


class KeepAliveClient:
    """Asks one server or several, and keeps connections open between questions. Close it.

    `timeout` is for a whole question, in seconds, `kept_idle` how long a connection may lie idle; `max_answer` counts
    the bytes of a body, unpacked.
    """

    def __init__(
        self,
        *,
        timeout: float,
        max_answer: int,
        headers: Mapping[str, str] | None = None,
        kept_idle: float = KEPT_IDLE,
    ) -> None:
        self._timeout, self._max_answer, self._kept_idle = timeout, max_answer, kept_idle
        self._headers = dict(headers or {})
        self._connector: aiohttp.TCPConnector | None = None
        self._questions: dict[tuple[str, str], _Question] = {}
        # aiohttp's connector keeps idle connections too, at several times the price.
        self._idle: dict[ConnectionKey, list[_Idle]] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def ask(self, method: str, url: str, body: bytes | None = None, headers: str = "") -> Answer:
        r"""Ask, and read the answer, whatever its status; `headers` are lines of their own, each with its `\r\n`.

        Raises `aiohttp.ClientError`, `OSError` or `TimeoutError` where none comes (`describe_failure` has the words),
        and `AnswerTooLongError`. A GET that was lost with its connection is sent once more, a POST never.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        question = self._questions.get((method, url)) or self._prepare(method, url)
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        data = f"{question.head}{headers}{length}\r\n".encode() + (body or b"")
        try:
            return await self._exchange(question, data, deadline)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            if method != "GET":
                raise
            return await self._exchange(question, data, deadline)

    async def close(self) -> None:
        """Close the connections. A later question opens new ones."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for idle in self._idle.values():
            while idle:
                idle.pop().connection.close()
        if self._connector is not None:
            connector, self._connector = self._connector, None
            await connector.close()

    def _prepare(self, method: str, text: str) -> _Question:
        try:
            url = yarl.URL(text)
        except ValueError as error:
            raise aiohttp.InvalidURL(text, str(error)) from error
        if url.scheme not in ("http", "https") or not url.raw_host:
            raise aiohttp.InvalidURL(text)
        loop = asyncio.get_running_loop()
        request = ClientRequest(method, url, headers=self._headers, skip_auto_headers=("Content-Type",), loop=loop)
        for name in ("Content-Length", "Accept-Encoding"):
            request.headers.popall(name, None)
        lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        idle = self._idle.setdefault(request.connection_key, [])
        question = _Question(request, f"{method} {request.url.raw_path_qs} HTTP/1.1\r\n{lines}", idle)
        if len(self._questions) >= HEAD_REMEMBERED:
            self._questions.clear()
        self._questions[method, text] = question
        return question

    async def _exchange(self, question: _Question, data: bytes, deadline: float) -> Answer:
        connection = self._take(question.idle) or await self._connect(question.request, deadline)
        wire = connection.protocol
        try:
            assert isinstance(wire, _Wire)  # noqa: S101 - the connector makes no others
            answer = await wire.ask(data, deadline)
            if answer is None:
                async with asyncio.timeout_at(deadline):
                    answer = await wire.read_any(question.request, self._max_answer)
            elif len(answer.body) > self._max_answer:
                raise AnswerTooLongError(f"the answer is longer than {self._max_answer} bytes")
        except BaseException:
            connection.close()
            raise
        if wire.should_close or self._connector is None:
            connection.close()
        else:
            self._keep(question.idle, connection)
        return answer

    async def _connect(self, request: ClientRequest, deadline: float) -> Connection:
        if self._connector is None:
            self._connector = _connector()
        remaining = max(deadline - asyncio.get_running_loop().time(), 0.001)
        return await self._connector.connect(request, [], aiohttp.ClientTimeout(connect=remaining))

    def _take(self, idle: list[_Idle]) -> Connection | None:
        """The connection that was used last, while it is open and has not lain idle for too long."""
        while idle:
            last = idle.pop()
            wire, now = last.connection.protocol, asyncio.get_running_loop().time()
            if wire is not None and wire.is_connected() and now - last.since < self._kept_idle:
                return last.connection
            last.connection.close()
        return None

    def _keep(self, idle: list[_Idle], connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        idle.append(_Idle(connection, loop.time()))
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._kept_idle, self._sweep)

    def _sweep(self) -> None:
        """Close what has lain idle for too long, and look again later while there is more."""
        loop, self._sweeper = asyncio.get_running_loop(), None
        too_old = loop.time() - self._kept_idle
        for idle in self._idle.values():
            while idle and idle[0].since <= too_old:  # the oldest comes first
                idle.pop(0).connection.close()
        if any(self._idle.values()):
            self._sweeper = loop.call_later(self._kept_idle, self._sweep)


def _connector() -> aiohttp.TCPConnector:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # what is idle is kept here, not there
    # It has no hook for the protocol of its connections.
    connector._factory = functools.partial(_Wire, loop=asyncio.get_running_loop())  # type: ignore[assignment]
    return connector


class _Wire(ResponseHandler):
    """One connection: between questions nobody listens, and a plain answer is read without aiohttp's parser."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._asked: asyncio.Future[Answer | None] | None = None
        self._parsing = False

    async def ask(self, data: bytes, deadline: float) -> Answer | None:
        """Send a question; return a plain answer, or None where `read_any` has to read it."""
        if self.transport is None:
            raise aiohttp.ServerDisconnectedError
        asked: asyncio.Future[Answer | None] = self._loop.create_future()
        self._asked = asked
        timer = self._loop.call_at(deadline, self._give_up, asked)
        try:
            self.transport.write(data)
            return await asked
        finally:
            timer.cancel()
            self._asked = None

    @staticmethod
    def _give_up(asked: "asyncio.Future[Answer | None]") -> None:
        if not asked.done():
            asked.set_exception(TimeoutError())

    def data_received(self, data: bytes) -> None:
        """Read a plain answer, hand any other on, and hang up on who speaks without being asked."""
        if self._parsing:
            super().data_received(data)
        elif self._asked is not None and not self._asked.done():
            answer = _read_plain(data)
            if answer is None:
                self._parsing = True
                super().data_received(data)  # kept until there is a parser
            self._asked.set_result(answer)
        elif data:
            self.force_close()
            if self.transport is not None:
                self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell who waits for an answer."""
        super().connection_lost(exc)
        if self._asked is not None and not self._asked.done():
            self._asked.set_exception(self.exception() or aiohttp.ServerDisconnectedError())

    async def read_any(self, request: ClientRequest, max_answer: int) -> Answer:
        """Read an answer of any form with aiohttp's parser."""
        self.set_response_params(read_until_eof=True)
        try:
            message, payload = await self.read()
            while 100 <= message.code <= 199 and message.code != 101:  # informational: the answer is yet to come
                message, payload = await self.read()
        except HttpProcessingError as error:
            raise aiohttp.ClientResponseError(request.request_info, (), message=error.message) from error
        body = bytearray()
        async for chunk in payload.iter_any():
            body += chunk
            if len(body) > max_answer:
                raise AnswerTooLongError(f"the answer is longer than {max_answer} bytes")
        self._parser, self._parsing = None, False
        return Answer(message.code, {name.lower(): value for name, value in message.headers.items()}, bytes(body))


def _read_plain(data: bytes) -> Answer | None:
    """Read a whole answer of the one form that is read here; None for anything else, a part of one included.

    The form: HTTP/1.1, status 200 with one Content-Length, or 304; each header once, in printable ASCII and none that
    changes how a body or connection is read; no byte more or less than the length says.
    """
    end = data.find(b"\r\n\r\n") + 4
    if not 4 <= end <= MAX_HEAD:
        return None
    head = _plain_head(data[:end])
    if head is None or len(data) != end + head.length:
        return None
    return Answer(head.status, head.headers, data[end:])


@dataclass(frozen=True, slots=True)
class _Head:
    status: int
    headers: Mapping[str, str]
    length: int


@functools.lru_cache(maxsize=64)  # a server's heads differ by the second
def _plain_head(data: bytes) -> _Head | None:
    match = _ANSWER.fullmatch(data)
    headers = None if match is None else plain_headers(match[2])
    if match is None or headers is None:
        return None
    status = int(match[1])
    # A 304 has no body, whatever the length of what it stands for.
    length = 0 if status == 304 else plain_length(headers)
    return None if length is None else _Head(status, MappingProxyType(headers), length)
