"""Forwards connections, as whole streams of bytes, between a client and a server.

A slow reader slows down the writer, so that nothing accumulates here. The forwarded bytes are not examined. Not here:
listening, TLS settings, and which server a client gets.
"""

import asyncio
import contextlib
from typing import Final

from dstack_emu.transport.closing import close
from dstack_emu.transport.listen import reset

CONNECT_TIMEOUT: Final = 10.0
"""Seconds until a client whose server cannot be connected is refused."""


class Side(asyncio.Protocol):
    """One of the two ends of a forwarded connection.

    With `half_closes`, an end that has sent everything may still receive; otherwise its end is that of both.
    """

    other: "Side | None" = None
    transport: asyncio.Transport | None = None
    half_closes = False
    _has_sent_all = False

    def data_received(self, data: bytes) -> None:
        """Pass data on."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        """Pass on that no more data comes; return whether the other direction goes on."""
        if not self.half_closes or self.other is None or self.other.transport is None:
            return False
        self._has_sent_all = True
        if self.other._has_sent_all:
            close(self.other.transport)
            return False
        with contextlib.suppress(OSError):  # it is gone, and its transport tells that, too
            self.other.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        """Let the other end wait."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Let the other end go on."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """Close the other end, after the pending bytes are written."""
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            close(self.other.transport)


class ClientSide(Side):
    """The end of a client, which is not read from before its server is connected."""

    _connecting: "asyncio.Task[None] | None" = None
    _early = b""

    async def connect(self, server: Side) -> None:
        """Connect the other end to the server of this client; raise `OSError`."""
        raise NotImplementedError

    def refused(self, error: OSError) -> None:
        """Handle that the server cannot be connected: by default the client is reset."""
        if self.transport is not None:
            reset(self.transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect the server."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream's
        self.transport = transport
        transport.pause_reading()  # until the server is connected
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        server = _ServerSide()
        server.half_closes = self.half_closes
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self.connect(server)
        except OSError as error:  # TimeoutError is one
            self.refused(error)
            return
        self.other, server.other = server, self
        assert server.transport is not None  # noqa: S101 - just connected
        if self._early:
            server.transport.write(self._early)
        if self.transport is None:  # the client has disconnected meanwhile
            close(server.transport)
        else:
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Pass data on."""
        if self.other is None:  # the first Pythons of 3.11 read although `connection_made` has paused that
            self._early += data
        else:
            super().data_received(data)

    def abort(self) -> None:
        """Abort both ends."""
        if self._connecting is not None:
            self._connecting.cancel()
        for side in (self, self.other):
            if side is not None and side.transport is not None:
                side.transport.abort()


class _ServerSide(Side):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream's
        self.transport = transport
