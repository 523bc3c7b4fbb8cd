"""An HTTP call as journal and faults need it, for both kinds of application: aiohttp's and our own."""

import asyncio
from typing import Protocol

from dstack_emu.transport.http import Handler, Request, Response


class RefusedByHandlerError(Exception):
    """A handler refused the call by an exception (aiohttp's `HTTPException`): its status and its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class HttpCall(Protocol):
    """One call, and the handler that answers it."""

    @property
    def path(self) -> str:
        """The path as it was sent."""
        ...

    @property
    def method(self) -> str:
        """The method of the request."""
        ...

    @property
    def transport(self) -> asyncio.Transport | None:
        """The connection of the call; None if it is closed."""
        ...

    def header(self, name: str) -> str | None:
        """Return a header's value, None if the header is missing."""
        ...

    def headers(self, name: str) -> list[str]:
        """Return every value of a header, in the order in which they were sent."""
        ...

    async def proceed(self) -> Response:
        """Call the handler and return its answer; raise `RefusedByHandlerError` if it refused by an exception."""
        ...


class DirectCall:
    """A call to an application of our own (`transport.http`)."""

    __slots__ = ("_handler", "_request", "path", "transport")

    def __init__(self, request: Request, handler: Handler) -> None:
        self._request, self._handler = request, handler
        self.path = request.path
        self.transport: asyncio.Transport | None = request.transport

    def header(self, name: str) -> str | None:
        """Return a header's value, None if the header is missing."""
        return self._request.headers.get(name)

    def headers(self, name: str) -> list[str]:
        """Return every value of a header, in the order in which they were sent."""
        return self._request.headers.get_all(name)

    @property
    def method(self) -> str:
        """The method of the request."""
        return self._request.method

    async def proceed(self) -> Response:
        """Call the handler and return its answer; raise `RefusedByHandlerError` if it refused by an exception."""
        return await self._handler(self._request)
