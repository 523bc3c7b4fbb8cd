"""Serves aiohttp applications: the webhooks, the PCCS, the control API, and pages for people.

Import this module only if such an application is served, because aiohttp's server takes time to import. The connections
are aiohttp's, except that a request's Content-Encoding is not decoded: upstream ignores it. aiohttp closes a connection
if the client shuts down its sending side, and refuses some repeated headers. Services that speak dstack's protocols are
served by `transport.http`, which does neither.
"""

from collections.abc import Collection
from typing import Final

from aiohttp import web

SHUTDOWN_STEPS: Final = 2
"""aiohttp waits this many times: for handlers to finish, and then for cancelled handlers to end."""


class AiohttpServer:
    """Serves one application. After `set_up`, asyncio calls it to make the protocol of each new connection."""

    def __init__(self, app: web.Application, grace: float) -> None:
        self._runner = web.AppRunner(
            app, access_log=None, auto_decompress=False, tcp_keepalive=False, shutdown_timeout=grace / SHUTDOWN_STEPS
        )

    async def set_up(self) -> None:
        """Run the application's start-up handlers."""
        await self._runner.setup()

    @property
    def connections(self) -> Collection[object]:
        """The open connections."""
        return () if self._runner.server is None else self._runner.server.connections

    def __call__(self) -> web.RequestHandler:
        assert self._runner.server is not None  # noqa: S101 - set_up() made it
        return self._runner.server()

    async def close(self) -> None:
        """Close every connection; requests in progress are answered first, within the grace period."""
        await self._runner.cleanup()
