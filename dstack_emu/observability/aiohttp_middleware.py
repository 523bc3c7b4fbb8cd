"""Journal and faults around an aiohttp application: adapts its requests and responses to `observability.middleware`."""

import asyncio
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDict, istr

from dstack_emu.observability.http_call import RefusedByHandlerError
from dstack_emu.observability.middleware import HttpInstruments
from dstack_emu.observability.spans import HEADER
from dstack_emu.observability.w3c_trace import TRACEPARENT
from dstack_emu.transport.http import Response

_FOLDED: Final = {name: istr(name) for name in (HEADER, TRACEPARENT)}
"""Every call looks these names up. As `istr` each is folded to lower case once, not at each call."""


def aiohttp_middleware(instruments: HttpInstruments) -> Middleware:
    """Make the middleware of an aiohttp application."""

    @web.middleware
    async def instrumented(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not instruments.concern(request.rel_url.raw_path):
            return await handler(request)
        return await answered(instruments, AiohttpCall(request, handler))

    return instrumented


async def answered(instruments: HttpInstruments, call: "AiohttpCall") -> web.StreamResponse:
    """Answer a call with journal and faults; raise the handler's own refusal."""
    try:
        answer = await instruments.answer(call)
    except RefusedByHandlerError as refusal:
        raise refusal.__cause__ or refusal from None
    return await call.give(answer)


class AiohttpCall:
    """A call to an aiohttp application. If nothing changed the handler's response, that very response is sent."""

    __slots__ = ("_handler", "_made", "_request", "_seen", "path", "transport")

    def __init__(self, request: web.Request, handler: Handler) -> None:
        self._request, self._handler = request, handler
        self.path = request.rel_url.raw_path
        self.transport: asyncio.Transport | None = request.transport
        self._made: web.StreamResponse | None = None
        self._seen: Response | None = None

    def header(self, name: str) -> str | None:
        """Return a header's value, None if the header is missing."""
        return self._request.headers.get(_FOLDED.get(name, name))

    def headers(self, name: str) -> list[str]:
        """Return every value of a header, in the order in which they were sent."""
        return self._request.headers.getall(name, [])

    @property
    def method(self) -> str:
        """The method of the request."""
        return self._request.method

    async def proceed(self) -> Response:
        """Call the handler and return its answer; raise `RefusedByHandlerError` for an `HTTPException`."""
        try:
            made = await self._handler(self._request)
        except web.HTTPException as refusal:
            raise RefusedByHandlerError(refusal.status, refusal.reason) from refusal
        body = made.body if isinstance(made, web.Response) else b""
        headers = tuple((name, value) for name, value in made.headers.items() if name != "Content-Length")
        self._made = made
        self._seen = Response(made.status, bytes(body) if isinstance(body, bytes | bytearray) else b"", headers)
        return self._seen

    async def give(self, answer: Response) -> web.StreamResponse:
        """Return an answer as aiohttp's; if its body is a stream, send it here."""
        if answer is self._seen and self._made is not None:
            return self._made
        headers = CIMultiDict(answer.headers)
        if isinstance(answer.body, bytes):
            return web.Response(status=answer.status, body=answer.body, headers=headers)
        begun = web.StreamResponse(status=answer.status, headers=headers)
        begun.content_length = answer.length
        await begun.prepare(self._request)
        try:
            async for piece in answer.body:
                await begun.write(piece)
        except ConnectionError:
            return begun  # the client has closed the connection
        await begun.write_eof()
        return begun
