"""A call by HTTP as journal and faults see it, whichever kind of application answers it."""

import asyncio
from typing import Protocol

from dstack_emu.transport.http import Handler, Request, Response


class RefusedByHandlerError(Exception):
    """A handler's answer that came as an exception (aiohttp's `HTTPException`): its status, and the reason's text."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class HttpCall(Protocol):
    """One call, and the handler that would answer it."""

    @property
    def path(self) -> str:
        """The path as it was sent."""
        ...

    @property
    def transport(self) -> asyncio.Transport | None:
        """The connection that it came on; None if that is gone."""
        ...

    def header(self, name: str) -> str | None:
        """Return a header's value."""
        ...

    async def proceed(self) -> Response:
        """Let the handler answer."""
        ...


class DirectCall:
    """A call to an application of our own."""

    __slots__ = ("_handler", "_request", "path", "transport")

    def __init__(self, request: Request, handler: Handler) -> None:
        self._request, self._handler = request, handler
        self.path = request.path
        self.transport: asyncio.Transport | None = request.transport

    def header(self, name: str) -> str | None:
        """Return a header's value."""
        return self._request.headers.get(name)

    async def proceed(self) -> Response:
        """Let the handler answer."""
        return await self._handler(self._request)
