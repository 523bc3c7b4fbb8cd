"""A server's connections: aiohttp's, and what real clients need beside.

A client that shuts down its sending side still gets its answers: aiohttp closes such a connection at once. A request's
Content-Encoding is not undone, as upstream ignores it. And a plain request (`transport.plain`) is answered past
aiohttp, whose machinery is most of what a short RPC costs. The first request of another form goes to aiohttp, and with
it all that follows on the connection: only aiohttp's parser knows where one of those ends.

What follows reaches into aiohttp's request loop, for which it has no public hook; tests/test_transport.py and
tests/test_plain.py hold it to the behaviour.
"""

import asyncio
from typing import Any, cast

from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import _ErrInfo

from dstack_emu.transport.plain import PlainCalls, PlainHandler, PlainRequest, read_request, usable_plain_calls


class ConnectionRunner(web.AppRunner):
    """An application's runner, whose connections are these."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        plain = usable_plain_calls(self.app)
        return _ConnectionServer(server.request_handler, plain, request_factory=server.request_factory)


class _ConnectionServer(web.Server):
    def __init__(self, handler: Any, plain: PlainCalls | None, **options: Any) -> None:
        super().__init__(handler, **options)
        self._plain = plain

    def __call__(self) -> web.RequestHandler:
        loop = asyncio.get_running_loop()
        return _Connection(self, self._plain, loop=loop, access_log=None, auto_decompress=False, tcp_keepalive=False)


class _Accepted(BaseProtocol):
    """A connection whose socket has its options already: event loops set TCP_NODELAY, `serve` all that is inherited."""

    __slots__ = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)


class _Connection(web.RequestHandler, _Accepted):
    """Answers what has been asked in full before the client's end of file, then closes."""

    __slots__ = ("_answering", "_half_closed", "_held", "_last_body", "_plain")

    def __init__(self, server: web.Server, plain: PlainCalls | None, **options: Any) -> None:
        super().__init__(server, **options)
        self._half_closed = False
        self._last_body: StreamReader | None = None
        self._plain = plain
        """Who answers plain requests; None from the first one of another form on."""
        self._answering: asyncio.Task[None] | None = None
        self._held = b""
        """What came while a plain request was being answered."""

    # ---- what comes in

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As aiohttp does, but for its request loop, which is not needed before there is a request for it."""
        if self._plain is None or self._manager is None:
            super().connection_made(transport)
            return
        _Accepted.connection_made(self, transport)
        self._manager.connection_made(self, cast(asyncio.Transport, transport))
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        self._waiter = self._loop.create_future()  # how aiohttp knows that a connection is idle

    def data_received(self, data: bytes) -> None:
        if self._answering is not None:
            self._held += data
            if self.transport is not None:
                self.transport.pause_reading()  # its client may wait as it would for aiohttp
            return
        if self._close or self._force_close:
            return  # as aiohttp does
        if self._plain is not None:
            request = read_request(data, self.transport)
            handler = None if request is None else self._plain.handlers.get(request.path)
            if request is not None and handler is not None:
                self._answering = self._loop.create_task(self._answer(self._plain, handler, request))
                return
            self._plain = None
            self._task_handler = self._loop.create_task(self.start())
        super().data_received(data)
        if self._messages:
            self._note_last()

    def _note_last(self) -> None:
        """Know the body of the last request, by which the end of what a client asks is told."""
        message, body = self._messages[-1]
        before = self._messages[-2][1] if len(self._messages) > 1 else self._last_body
        if isinstance(message, _ErrInfo) and before is not None and not before.is_eof():
            # What came in place of the rest of a body is no HTTP; aiohttp would let its reader wait for it forever.
            self._messages.pop()
            before.set_exception(web.RequestPayloadError(message.message))
            before.feed_eof()  # nor is there anything to wait for once it is answered
            self.close()
            body = before
        self._last_body = body

    def eof_received(self) -> bool | None:  # type: ignore[override]  # aiohttp narrows asyncio's own type
        """Keep the connection (True) while a request that came in whole waits for its answer."""
        if self.ssl_context is not None or not self._owes_answer():
            return None  # TLS has no half-closed connections in asyncio
        self._half_closed = True
        if not self._messages and self._answering is None:
            self.close()  # after the request in progress
        return True

    def _owes_answer(self) -> bool:
        if self._answering is not None:
            return True
        idle = self._waiter is not None and not self._waiter.done()
        return self._last_body is not None and self._last_body.is_eof() and not idle

    # ---- aiohttp's answers

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        finished = await super().finish_response(request, resp, start_time)
        if self._half_closed and not self._messages:
            self.close()
        return finished

    # ---- plain answers

    async def _answer(self, calls: PlainCalls, handler: PlainHandler, request: PlainRequest) -> None:
        self._request_in_progress = True  # `shutdown` waits for what is
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        try:
            try:
                answer = calls.write(await handler(request))
            except Exception:
                self.log_exception("Error handling request for %s", request.path)
                answer = calls.write_failure()
                self._close = True
            if self.transport is not None:
                self.transport.write(answer)
                if self._paused:
                    await self._drain_helper()
        except ConnectionError:
            return  # the client went away
        finally:
            self._answering, self._request_in_progress = None, False
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)
        self._go_on()

    def _go_on(self) -> None:
        """Take up what came meanwhile."""
        held, self._held = self._held, b""
        if self.transport is not None and held:
            self.transport.resume_reading()
            self.data_received(held)
        if self.transport is not None and (self._close or self._half_closed) and not self._owes_answer():
            self.transport.close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's own signature
        """Let the call in progress finish, or end it after so many seconds; then close."""
        await super().shutdown(timeout)
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.wait((self._answering,), timeout=timeout)
