"""Applications: route requests to handlers, by exact path, then by finders; otherwise the answer is 404."""

from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Final

from dstack_emu.transport.http.message import HeaderPairs, Request, Response
from dstack_emu.transport.http.pages import status_page

MAX_BODY: Final = 10 * 1024 * 1024
"""The maximum length of a request's body in bytes."""

Handler = Callable[[Request], Awaitable[Response]]
Middleware = Callable[[Request, Handler], Awaitable[Response]]
Finder = Callable[[Request], Handler | None]
"""Returns the handler of a request without an exact route, None if it has none."""


class Application:
    """Routes requests to handlers; `headers` are added to every answer, `max_body` is the limit of a body in bytes.

    `middlewares` wrap every request; the first one is the outermost. A HEAD request goes to the handler for GET, and
    the server sends only the head of the answer.
    """

    def __init__(
        self, *, headers: HeaderPairs = (), middlewares: Iterable[Middleware] = (), max_body: int = MAX_BODY
    ) -> None:
        self.headers, self.max_body = headers, max_body
        self.middlewares = list(middlewares)
        self._routes: dict[tuple[str, str], Handler] = {}
        self._finders: list[Finder] = []

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Add a route: method and path, which is compared as it is sent."""
        self._routes[method, path] = handler

    @property
    def paths(self) -> list[str]:
        """Return the path of every route."""
        return [path for _, path in self._routes]

    def add_finder(self, finder: Finder) -> None:
        """Add a finder, which is called for requests without a route, after the finders added before."""
        self._finders.append(finder)

    def handler(self) -> Handler:
        """Return the handler of all requests, with the present middlewares."""
        handler: Handler = self._answer
        for middleware in reversed(self.middlewares):
            handler = _wrapped(middleware, handler)
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


def _wrapped(middleware: Middleware, handler: Handler) -> Handler:
    def call(request: Request) -> Awaitable[Response]:
        return middleware(request, handler)

    return call


async def _not_found(request: Request) -> Response:
    return status_page(HTTPStatus.NOT_FOUND, request)
