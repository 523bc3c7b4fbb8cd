"""A connection of the HTTP client, with one request at a time."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Final, cast

from dstack_emu.transport.failures import NoAnswerError
from dstack_emu.transport.http.answer import AnswerReader

_IN_USE: Final = "a connection has one request at a time"


class ClientConnection(asyncio.Protocol):
    """A connection to a server. Between requests it is idle; bytes that come then end it.

    `on_lost` is called when it is closed, by either side.
    """

    def __init__(self, on_lost: Callable[["ClientConnection"], None]) -> None:
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._reader: AnswerReader | None = None
        self._answered: asyncio.Future[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self.certificate: bytes | None = None
        """The server's certificate (DER), None without TLS."""

    @property
    def is_open(self) -> bool:
        """Return whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, reader: AnswerReader) -> None:
        """Send a request and read its answer; raise `NoAnswerError`, `AnswerTooLongError` or `OSError`.

        If this fails or is cancelled, the connection is aborted.
        """
        assert self._transport is not None  # noqa: S101 - it was made
        assert self._answered is None, _IN_USE  # noqa: S101
        self._reader, self._answered = reader, asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._answered
        except BaseException:
            self.abort()
            raise
        finally:
            self._reader = self._answered = None
        if not reader.is_reusable:
            self.close()

    def wait_idle(self, seconds: float) -> None:
        """Close the connection in so many seconds, unless it is used before."""
        self._idle = asyncio.get_running_loop().call_later(seconds, self.close)

    def wake(self) -> None:
        """End the wait of `wait_idle`."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def close(self) -> None:
        """Close the connection after pending bytes are sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport and the server's certificate; the TLS handshake is complete."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class does not derive from asyncio's
        channel: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if channel is not None:
            self.certificate = channel.getpeercert(binary_form=True)

    def data_received(self, data: bytes) -> None:
        """Parse a part of the answer."""
        if self._reader is None or self._answered is None:
            self.abort()  # there is no request
            return
        try:
            self._reader.receive(data)
        except Exception as error:  # passed on to the caller; `write` may raise anything
            self._fail(error)
        else:
            if self._reader.is_complete and not self._answered.done():
                self._answered.set_result(None)

    def eof_received(self) -> None:
        """Handle the end of the server's bytes."""
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Handle the end of the connection."""
        self.wake()
        self._end(error)
        self._on_lost(self)

    def _end(self, error: Exception | None) -> None:
        if self._reader is None or self._answered is None or self._answered.done():
            return
        try:
            self._reader.receive_eof()
        except NoAnswerError as broken:
            self._fail(error or broken)
        else:
            self._answered.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(error)
