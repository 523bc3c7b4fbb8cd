"""The beginning of a client's connection: its bytes are kept until it is known where they go."""

import asyncio
from collections.abc import Callable
from typing import Final, cast

from dstack_emu.gateway.ingress.errors import RefusedConnectionError

_MAX_KEPT: Final = 65536
"""How many bytes are kept before no more are read; one read can bring more than that."""


class Greeting(asyncio.Protocol):
    """Keeps what a client sends. `begin` is told of the connection; `take` and `more` are for one task."""

    transport: asyncio.Transport

    def __init__(self, begin: Callable[["Greeting"], None]) -> None:
        self._begin = begin
        self._kept = bytearray()
        self._changed = asyncio.Event()
        self.has_ended = False
        """Whether the client sends nothing more."""
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to read."""
        self.transport = cast(asyncio.Transport, transport)
        self._begin(self)

    def data_received(self, data: bytes) -> None:
        """Keep data."""
        self._kept += data
        if len(self._kept) > _MAX_KEPT:
            self.transport.pause_reading()
        self._changed.set()

    def eof_received(self) -> bool:
        """Note the end; the connection stays, because the client may wait for an answer."""
        self.has_ended = True
        self._changed.set()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """Note that nobody waits for an answer any more."""
        self.has_ended = self.is_lost = True
        self._changed.set()

    async def more(self, why: str) -> bytes:
        """Wait for bytes, and take them; raise `RefusedConnectionError` with `why` if the client ends before."""
        while not self._kept:
            if self.has_ended:
                raise RefusedConnectionError(why)
            self._changed.clear()
            if not self.transport.is_closing():
                self.transport.resume_reading()
            await self._changed.wait()
        return self.take()

    async def ended(self) -> None:
        """Read on as long as there is room, and return when the client sends nothing more."""
        while not self.has_ended:
            self._changed.clear()
            if len(self._kept) <= _MAX_KEPT and not self.transport.is_closing():
                self.transport.resume_reading()
            await self._changed.wait()

    def take(self) -> bytes:
        """Return the bytes that have come and were not taken yet."""
        taken, self._kept = bytes(self._kept), bytearray()
        return taken

    def pause(self) -> None:
        """Read no more until `more` waits again."""
        if not (self.has_ended or self.transport.is_closing()):
            self.transport.pause_reading()
