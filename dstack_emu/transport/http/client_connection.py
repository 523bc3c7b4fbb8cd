"""A connection of the HTTP client, for one request."""

import asyncio
import ssl
from typing import Final, cast

from dstack_emu.transport.failures import NoAnswerError
from dstack_emu.transport.http.answer import AnswerReader

_IN_USE: Final = "a connection has one request"
EARLY: Final = "the server spoke before it was sent the request"
LINGER: Final = 1.0
"""Seconds that a server which says that it ends the connection has to do so. The side that ends it first is left with a
port that cannot be used for a minute: of a client that ends thousands of connections there would be none left."""


class ClientConnection(asyncio.Protocol):
    """A connection to a server, for one request. Bytes that come before the request is sent end it.

    It is a member of `connections` while it is open.
    """

    def __init__(self, connections: "set[ClientConnection]") -> None:
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._reader: AnswerReader | None = None
        self._answered: asyncio.Future[None] | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._spoke_early = False
        self.certificate: bytes | None = None
        """The server's certificate (DER), None without TLS."""

    async def exchange(self, request: bytes, reader: AnswerReader) -> None:
        """Send the request and read its answer; raise `NoAnswerError`, `AnswerTooLongError` or `OSError`.

        If this fails or is cancelled, the connection is aborted. It cannot be used for another request.
        """
        assert self._transport is not None  # noqa: S101 - it was made
        assert self._answered is None, _IN_USE  # noqa: S101
        loop = asyncio.get_running_loop()
        self._reader, self._answered = reader, loop.create_future()
        if self._transport.is_closing():
            raise NoAnswerError(EARLY if self._spoke_early else "connection closed before the answer")
        self._transport.write(request)
        try:
            await self._answered
        except BaseException:
            self.abort()
            raise
        finally:
            self._reader = None
        if not reader.is_last:
            self.close()
        elif not self._transport.is_closing():
            self._lingering = loop.call_later(LINGER, self.close)

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
        self._connections.add(self)
        channel: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if channel is not None:
            self.certificate = channel.getpeercert(binary_form=True)

    def data_received(self, data: bytes) -> None:
        """Parse a part of the answer."""
        if self._reader is None or self._answered is None:
            self._spoke_early = self._answered is None
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
        if self._lingering is not None:
            self._lingering.cancel()
        self._end(error)
        self._connections.discard(self)

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
