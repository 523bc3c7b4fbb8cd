"""Serves aiohttp applications: the webhooks, the PCCS, the control API, and pages for people.

Import this module only if such an application is served, because aiohttp's server takes time to import. The connections
are aiohttp's, except that a request's Content-Encoding is not decoded: upstream ignores it. aiohttp closes a connection
if the client shuts down its sending side, and refuses some repeated headers. Services that speak dstack's protocols are
served by `transport.http`, which does neither.

A request that cannot be read, or whose client goes away, is one line of the log, as with `transport.http`.

aiohttp waits for a client without a deadline, but for the next request on an idle connection. Here a client has as long
as with `transport.http`; then its connection is aborted. After an answer aiohttp waits up to 10 s for the rest of a
body that no handler read, even if the connection is lost meanwhile. Here that wait ends with the connection.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Any, Final

from aiohttp import StreamReader, web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from dstack_emu.transport.http.deadline import NEVER, Deadlines
from dstack_emu.transport.http.foreign_page import foreign_page
from dstack_emu.transport.open_calls import began, ended, shown_peer

log = logging.getLogger(__name__)

SHUTDOWN_STEPS: Final = 2
"""aiohttp waits this many times: for handlers to finish, and then for cancelled handlers to end."""
JUDGES_PAGES: Final = web.AppKey("judges_pages", bool)
"""Set in an application that judges itself what a browser sends it for pages of others; `foreign_page` does so here."""
LOOKS: Final = 4
"""How often the clients are looked at within the shortest deadline."""


class _ClientMistakes(logging.Filter):
    """Keeps aiohttp's records of what a client did wrong, which have a traceback, from the log, and logs a line each.

    A handler's own calls never raise ConnectionResetError: `transport.http_client` raises errors of its own.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        match error:
            case HttpProcessingError():
                log.debug("refused with %d: %s", error.code, error.message)
            case ConnectionResetError():
                log.debug("the client went away: %s", error)
            case _:
                return True
        return False


_connections = logging.getLogger(f"{__name__}.connections")
"""aiohttp's own log."""
_connections.addFilter(_ClientMistakes())


@web.middleware
async def _refuse_foreign_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    address = None if request.transport is None else request.transport.get_extra_info("sockname")
    why = foreign_page(request.method, request.path, request.headers, address, is_secure=request.secure)
    return web.Response(status=403, text=why) if why else await handler(request)


_SETTINGS: Final[Mapping[str, Any]] = {
    "access_log": None,
    "logger": _connections,
    "auto_decompress": False,
    "tcp_keepalive": False,
}


class _Connection(web.RequestHandler):
    """aiohttp's connection, which waits for no body once it is lost."""

    __slots__ = ("unread",)

    def __init__(self, server: web.Server) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **_SETTINGS)
        self.unread: StreamReader | None = None
        """The body of the request whose handler was the last to end."""

    def connection_lost(self, exc: BaseException | None) -> None:
        """Handle the end of the connection."""
        super().connection_lost(exc)
        if self.unread is not None:
            self.unread.feed_eof()


class AiohttpServer:
    """Serves one application. After `set_up`, asyncio calls it to make the protocol of each new connection."""

    def __init__(self, app: web.Application, grace: float, deadlines: Deadlines | None = None) -> None:
        self._deadlines = deadlines or Deadlines()
        self._pause = min(self._deadlines.request, self._deadlines.body, self._deadlines.reading) / LOOKS
        self._answered: dict[int, _Answered] = {}
        """The requests in progress, by the `id` of their connection."""
        self._seen: dict[web.RequestHandler, tuple[object, float]] = {}
        """What was last seen of each open connection, and since when that is so."""
        self._looking: asyncio.TimerHandle | None = None
        if not app.get(JUDGES_PAGES, False):
            app.middlewares.insert(0, _refuse_foreign_pages)
        app.middlewares.insert(0, self._noting())
        self._runner = web.AppRunner(app, shutdown_timeout=grace / SHUTDOWN_STEPS, **_SETTINGS)

    async def set_up(self) -> None:
        """Run the application's start-up handlers."""
        await self._runner.setup()

    @property
    def connections(self) -> Collection[web.RequestHandler]:
        """The open connections."""
        return () if self._runner.server is None else self._runner.server.connections

    def __call__(self) -> web.RequestHandler:
        assert self._runner.server is not None  # noqa: S101 - set_up() made it
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(self._pause, self._look)
        return _Connection(self._runner.server)

    async def close(self) -> None:
        """Close every connection; requests in progress are answered first, within the grace period."""
        await self._runner.cleanup()
        if self._looking is not None:
            self._looking.cancel()

    # ---- deadlines

    def _noting(self) -> Middleware:
        @web.middleware
        async def noted(request: web.Request, handler: Handler) -> web.StreamResponse:
            connection, answered = id(request.protocol), _Answered(request)
            self._answered[connection] = answered
            began(answered)
            try:
                return await handler(request)
            finally:
                ended(answered)
                self._answered.pop(connection, None)
                self._seen.pop(request.protocol, None)  # the client has done what was waited for
                if isinstance(request.protocol, _Connection):
                    request.protocol.unread = request.content

        return noted

    def _look(self) -> None:
        """Abort the connections of clients that are late, and look again as long as there are any connections."""
        self._looking, loop = None, asyncio.get_running_loop()
        before, self._seen = self._seen, {}
        for connection in self.connections:
            transport = connection.transport
            if transport is None:
                continue
            seen, seconds = self._awaited(connection, transport)
            last, since = before.get(connection, (None, 0.0))
            self._seen[connection] = seen, since if seen == last else loop.time()
            if seen == last and loop.time() - since >= seconds:
                transport.abort()
        if self._seen:
            self._looking = loop.call_later(self._pause, self._look)

    def _awaited(self, connection: web.RequestHandler, transport: asyncio.Transport) -> tuple[object, float]:
        """Return what is seen of a client, which changes if it does what is waited for, and its deadline."""
        unread = transport.get_write_buffer_size()
        answered = self._answered.get(id(connection))
        if unread:
            return ("reading", unread), self._deadlines.reading
        if answered is None:  # aiohttp itself ends what is idle after a request
            return "request", self._deadlines.request
        if answered.request.content.is_eof():
            return answered, NEVER
        return (answered, answered.request.content.total_bytes), self._deadlines.body


class _Answered:
    """A request in progress."""

    __slots__ = ("request",)

    def __init__(self, request: web.Request) -> None:
        self.request = request

    def described(self) -> str:
        """Say which request it is, where, and for whom."""
        transport, path = self.request.transport, self.request.rel_url.raw_path
        at, peer = (
            shown_peer(None if transport is None else transport.get_extra_info(end)) for end in ("sockname", "peername")
        )
        return f"answers {self.request.method} {path:.100} at http://{at} for {peer}"
