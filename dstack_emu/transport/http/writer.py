"""Writes answers to one client, no faster than the client reads them."""

import asyncio

from dstack_emu.transport.http.message import BODILESS, Framing, Response, is_chunked, response_head


class ResponseWriter:
    """Writes to a transport; the protocol calls `pause` and `resume` when the transport's buffer is full or not."""

    __slots__ = ("_loop", "_transport", "_writable")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()
        self._writable: asyncio.Future[None] | None = None

    @property
    def is_blocked(self) -> bool:
        """Whether the client must read before more is written."""
        return self._writable is not None

    def pause(self) -> None:
        """Block further writes."""
        self._writable = self._loop.create_future()

    def resume(self, error: ConnectionError | None = None) -> None:
        """Unblock the write that waits; with `error`, let it fail because the client has disconnected."""
        writable, self._writable = self._writable, None
        if writable is None or writable.done():
            return
        if error is None:
            writable.set_result(None)
        else:
            writable.set_exception(error)
            writable.exception()  # mark it as retrieved: perhaps nothing waits for it

    async def send(self, response: Response, framing: Framing, *, head_only: bool) -> None:
        """Write a whole answer; raise `ConnectionError` if the client disconnects meanwhile."""
        head = response_head(response, framing)
        if head_only or response.status in BODILESS:
            self._transport.write(head)
        elif isinstance(response.body, bytes):
            self._transport.write(head + response.body)
        else:
            self._transport.write(head)
            await self._send_pieces(response, is_chunked(response, framing))
        if self._writable is not None:
            await self._writable

    async def _send_pieces(self, response: Response, chunked: bool) -> None:
        assert not isinstance(response.body, bytes)  # noqa: S101 - `send` has checked it
        async for piece in response.body:
            if self._transport.is_closing():
                raise ConnectionResetError("the client went away")
            if piece:
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if self._writable is not None:
                await self._writable
        if chunked:
            self._transport.write(b"0\r\n\r\n")
