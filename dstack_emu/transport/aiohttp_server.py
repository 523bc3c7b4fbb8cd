"""Serving an aiohttp application: the webhooks, the PCCS, control, and pages for people.

Imported only when one is served, because aiohttp's server takes time to import. Connections are aiohttp's in all but
one thing: the Content-Encoding of a request is not undone, as upstream ignores it. aiohttp closes a connection whose
client shuts down its sending side, and refuses repeated headers of some names; what speaks dstack's protocols is served
by `transport.http`, which does neither.
"""

from typing import Final

from aiohttp import web

SHUTDOWN_STEPS: Final = 2
"""aiohttp waits for handlers to finish, and then as long for them to end once they are cancelled."""


class AiohttpServer:
    """Serves one application. asyncio calls it for the protocol of each new connection, once it is set up."""

    def __init__(self, app: web.Application, grace: float) -> None:
        self._runner = web.AppRunner(
            app, access_log=None, auto_decompress=False, tcp_keepalive=False, shutdown_timeout=grace / SHUTDOWN_STEPS
        )

    async def set_up(self) -> None:
        """Run what the application does at its start."""
        await self._runner.setup()

    def __call__(self) -> web.RequestHandler:
        assert self._runner.server is not None  # noqa: S101 - set_up() made it
        return self._runner.server()

    async def close(self) -> None:
        """Close every connection, those in progress once they are answered or the grace is over."""
        await self._runner.cleanup()
