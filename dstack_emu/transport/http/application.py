"""An application: who answers which request. Exact paths first, then what a finder finds in the path, then a 404."""

from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Final

from dstack_emu.transport.http.message import HeaderPairs, Request, Response
from dstack_emu.transport.http.pages import status_page

MAX_BODY: Final = 10 * 1024 * 1024
"""Bytes of a request's body: so many are accepted, one more is not."""

Handler = Callable[[Request], Awaitable[Response]]
Middleware = Callable[[Request, Handler], Awaitable[Response]]
Finder = Callable[[Request], Handler | None]
"""Finds who answers a request whose path is none of the application's own; None if it knows nobody."""


class Application:
    """Routes requests to handlers; `headers` go with every answer, `max_body` is the longest body in bytes.

    `middlewares` go around every request, the first one outermost. A request of the method HEAD goes to the handler
    for GET; the server sends the head of its answer alone.
    """

    def __init__(
        self, *, headers: HeaderPairs = (), middlewares: Iterable[Middleware] = (), max_body: int = MAX_BODY
    ) -> None:
        self.headers, self.max_body = headers, max_body
        self.middlewares = list(middlewares)
        self._routes: dict[tuple[str, str], Handler] = {}
        self._finders: list[Finder] = []

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Let a handler answer requests of one method for one path, as it is sent."""
        self._routes[method, path] = handler

    def add_finder(self, finder: Finder) -> None:
        """Ask a finder about requests that have no handler of their own, after those that were added before."""
        self._finders.append(finder)

    def handler(self) -> Handler:
        """Return what answers every request, with the middlewares as they are now."""
        handler: Handler = self._answer
        for middleware in reversed(self.middlewares):
            handler = _around(middleware, handler)
        return handler

    async def _answer(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        handler = self._routes.get((method, request.path)) or self._find(request)
        return await handler(request)

    def _find(self, request: Request) -> Handler:
        for finder in self._finders:
            handler = finder(request)
            if handler is not None:
                return handler
        return _not_found


def _around(middleware: Middleware, handler: Handler) -> Handler:
    def call(request: Request) -> Awaitable[Response]:
        return middleware(request, handler)

    return call


async def _not_found(request: Request) -> Response:
    return status_page(HTTPStatus.NOT_FOUND, request)
