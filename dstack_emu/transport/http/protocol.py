"""Serves an application: an asyncio protocol for each client, on the connection core.

A connection has one request in progress. Requests that arrive meanwhile wait, and while one waits nothing more is read.
A client that shuts down its sending side still gets the answers to its complete requests; over TLS it does not, because
asyncio has no half-closed TLS connections. Every wait for a client has a deadline.

Not here: listening sockets (`transport.listen`), and the handlers.
"""

import asyncio
import contextlib
import logging
import ssl
from http import HTTPStatus
from typing import Final, cast

from dstack_emu.transport.closing import close
from dstack_emu.transport.http.application import Application
from dstack_emu.transport.http.connection import IncomingRequest, InvalidRequest, ServerConnection
from dstack_emu.transport.http.deadline import Awaited, Deadline, Deadlines
from dstack_emu.transport.http.foreign_page import refusing_foreign_pages
from dstack_emu.transport.http.message import Framing, Request, Response, response_head
from dstack_emu.transport.http.writer import ResponseWriter
from dstack_emu.transport.open_calls import began, ended, shown_peer
from dstack_emu.transport.status import status_line

MAX_DROPPED: Final = 64 * 1024 * 1024
"""The number of bytes after the last answer that are dropped before the connection is closed."""

_OF_NO_REQUEST: Final = Framing(is_kept_alive=False)
"""How the refusal of an invalid request is sent: without the application's headers."""

log = logging.getLogger(__name__)


class HttpServer:
    """Serves one application on any number of connections; asyncio calls it to make the protocol of each one.

    `grace` is the time in seconds that requests in progress have when the server closes: half of it to finish, half to
    end after they are cancelled.
    """

    def __init__(self, app: Application, *, grace: float = 0.0, deadlines: Deadlines | None = None) -> None:
        self._grace = grace
        self.handler = refusing_foreign_pages(app.handler())
        self.max_body = app.max_body
        self.deadlines = deadlines or Deadlines()
        self.connections: set[HttpProtocol] = set()
        """The open connections, and those whose handler still runs."""
        self._framings = {
            (is_http_10, is_kept_alive): Framing(is_http_10, is_kept_alive, app.headers)
            for is_http_10 in (False, True)
            for is_kept_alive in (False, True)
        }

    def __call__(self) -> "HttpProtocol":
        return HttpProtocol(self)

    def framing(self, is_http_10: bool, is_kept_alive: bool) -> Framing:
        """Return the framing of an answer."""
        return self._framings[is_http_10, is_kept_alive]

    async def close(self) -> None:
        """Close every connection: idle ones at once, others when their request is answered or the grace is over."""
        for connection in list(self.connections):
            connection.finish()
        await self._handlers_end(self._grace / 2)
        for connection in list(self.connections):
            connection.abandon()
        await self._handlers_end(self._grace / 2)

    async def _handlers_end(self, seconds: float) -> None:
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)


class HttpProtocol(asyncio.Protocol):
    """One client's connection."""

    _transport: asyncio.Transport
    _writer: ResponseWriter
    _tls: ssl.SSLObject | None

    def __init__(self, server: HttpServer) -> None:
        self._server, self._loop = server, asyncio.get_running_loop()
        self._core = ServerConnection(server.max_body)
        self._deadline = Deadline(server.deadlines, self._expired)
        self._request: IncomingRequest | None = None
        """The request that `task` answers."""
        self.task: asyncio.Task[None] | None = None
        self._certificate: bytes | None = None
        self._is_open = self._is_reading = True
        self._is_finishing = False
        """Whether the answer in progress is the last one."""
        self._is_lingering = False
        """Whether the last answer is sent, and further bytes of the client are dropped."""
        self._dropped = 0

    # ---- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._tls = transport.get_extra_info("ssl_object")
        self._writer = ResponseWriter(self._transport)
        self._server.connections.add(self)
        self._deadline.begin("request")

    def data_received(self, data: bytes) -> None:
        """Parse the client's bytes, and answer complete requests."""
        if self._is_lingering:
            self._drop(data)
            return
        self._core.receive(data)
        if self.task is None:
            self._go_on()
        elif self._deadline.awaited == "body":
            self._wait()
        self._choose_reading()

    def eof_received(self) -> bool:
        """Handle the client's end of file; return True, to keep the connection, if a request must still be answered."""
        is_cut_off = self._is_within_body()
        self._core.receive_eof()
        if self._is_lingering or is_cut_off or self._tls is not None:
            return False
        return self.task is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the connection. A handler that runs may finish: it may do more than answer."""
        self._is_open = False
        self._core.receive_eof()
        self._deadline.close()
        self._writer.resume(ConnectionResetError("the client went away"))
        if self.task is None:
            self._server.connections.discard(self)

    def pause_writing(self) -> None:
        """Stop writing until the client has read more."""
        self._writer.pause()
        self._wait()

    def resume_writing(self) -> None:
        """Continue to write."""
        self._writer.resume()
        self._wait()

    def described(self) -> str:
        """Say which request it answers, where, and for whom."""
        what = "" if self._request is None else f"{self._request.method} {self._request.path:.100}"
        at = shown_peer(self._transport.get_extra_info("sockname"))
        url = at if at.startswith("unix:") else f"{'http' if self._tls is None else 'https'}://{at}"
        return f"answers {what} at {url} for {shown_peer(self._transport.get_extra_info('peername'))}"

    # ---- closing the server

    def finish(self) -> None:
        """Close the connection, after the request in progress is answered."""
        self._is_finishing = True
        if self.task is None:
            close(self._transport)

    def abandon(self) -> None:
        """Close the connection without another answer."""
        if self.task is not None:
            self.task.cancel()
        close(self._transport)

    # ---- requests

    def _go_on(self) -> None:
        """Begin to answer the next request; there is none in progress."""
        following = None if self._is_finishing else self._core.next_request()
        if isinstance(following, IncomingRequest):
            self._request = following
            self.task = self._loop.create_task(self._answer(following))
        elif isinstance(following, InvalidRequest):
            self._refuse(following)
        elif self._is_finishing or self._core.is_over:
            close(self._transport)
            return
        self._wait()

    async def _answer(self, incoming: IncomingRequest) -> None:
        began(self)
        try:
            response = await self._handle(incoming)
            await self._receive_rest(incoming)
            if self._is_open:
                await self._send(incoming, response)
        except ConnectionError as error:
            log.debug("%s %s: %s", incoming.method, incoming.path, error)
            self._transport.abort()
        except Exception:  # the server's edge: an answer that has begun can only be aborted
            log.exception("Error within the answer to %s", incoming.path)
            self._transport.abort()
        finally:
            self.task = self._request = None
            ended(self)
            if not self._is_open:
                self._server.connections.discard(self)
        if self._is_open and not self._is_lingering:
            self._go_on()
            self._choose_reading()

    async def _handle(self, incoming: IncomingRequest) -> Response:
        try:
            return await self._server.handler(Request(incoming, self._transport, self._client_certificate))
        except Exception:  # the server's edge
            log.exception("Error handling request for %s", incoming.path)
            incoming.is_kept_alive = False
            text = f"{status_line(HTTPStatus.INTERNAL_SERVER_ERROR)}\n\nServer got itself in trouble"
            return Response.of(text, "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)

    async def _receive_rest(self, incoming: IncomingRequest) -> None:
        """Wait for the rest of a body that the handler did not read, so that the connection stays usable.

        A body over the limit is settled already. A body that the client sends only when it is told to continue is not
        requested.
        """
        if incoming.is_kept_alive and not (incoming.awaits_continue or incoming.body.is_settled):
            settled = asyncio.Event()
            incoming.body.when_settled(settled.set)
            await settled.wait()

    async def _send(self, incoming: IncomingRequest, response: Response) -> None:
        is_read = incoming.body.has_ended
        ends_body = response.content_length is not None or not incoming.is_http_10
        is_last = self._is_finishing or not (incoming.is_kept_alive and is_read and ends_body)
        framing = self._server.framing(incoming.is_http_10, not is_last)
        await self._writer.send(response, framing, head_only=incoming.method == "HEAD")
        self._is_finishing = is_last
        if is_last and not is_read:
            self._linger()

    def _refuse(self, invalid: InvalidRequest) -> None:
        log.debug("refused with %d: %s", invalid.status, invalid.reason)
        # As upstream: the library answers before the web server has a request to add its headers to.
        self._transport.write(response_head(Response(invalid.status), _OF_NO_REQUEST))
        self._linger()

    def _client_certificate(self) -> bytes | None:
        if self._certificate is None and self._tls is not None:
            self._certificate = self._tls.getpeercert(binary_form=True)
        return self._certificate

    # ---- closing a connection

    def _linger(self) -> None:
        """Close the connection when the client stops sending; closing it before could lose the answer."""
        self._is_finishing = self._is_lingering = True
        if self._transport.can_write_eof():  # TLS cannot
            with contextlib.suppress(OSError):  # it is gone, and its transport tells that, too
                self._transport.write_eof()
        self._wait()
        self._choose_reading()

    def _drop(self, data: bytes) -> None:
        """Drop bytes after the last answer, up to the end of a body."""
        self._dropped += len(data)
        was_over = self._core.is_over
        self._core.receive(data)
        if self._dropped > MAX_DROPPED or not (was_over or self._core.is_within_request):
            close(self._transport)
        else:
            self._wait()

    # ---- waiting and reading

    def _is_within_body(self) -> bool:
        return self._request is not None and not self._request.body.is_settled

    def _choose_reading(self) -> None:
        """Read nothing while a request waits, so that waiting requests cannot fill the memory."""
        is_reading = self._is_lingering or not (self._core.is_waiting or self._core.is_over)
        if is_reading == self._is_reading or self._transport.is_closing():
            return
        self._is_reading = is_reading
        if is_reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _wait(self) -> None:
        """Set the deadline of the present wait."""
        awaited = self._awaited()
        if awaited != "head" or self._deadline.awaited != "head":
            self._deadline.begin(awaited)

    def _awaited(self) -> Awaited:
        if self._writer.is_blocked:
            return "reading"
        if self._is_lingering:
            return "end"
        if self.task is not None:
            return "body" if self._is_within_body() else "nothing"
        return "head" if self._core.is_within_request else "request"

    def _expired(self, awaited: Awaited) -> None:
        """Handle a deadline that has passed."""
        log.debug("waited %g s for: %s", self._server.deadlines.of(awaited), awaited)
        match awaited:
            case "head":
                self._core.receive_eof()
                self._refuse(InvalidRequest(HTTPStatus.REQUEST_TIMEOUT, "the head did not come in time"))
            case "body":
                self._core.receive_eof()
            case "reading":
                self._transport.abort()
            case _:
                close(self._transport)
