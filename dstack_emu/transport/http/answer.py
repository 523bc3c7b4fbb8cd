"""Parses one answer of a server from its bytes, without I/O.

llhttp (through httptools) parses the bytes in its strict mode. What llhttp accepts and a client must not accept is
refused here: lines, heads and bodies over the limits, and an answer in another protocol.

Not here: sockets, time, redirects, and the meaning of an answer. Source of the format: RFC 9112.
"""

import zlib
from collections.abc import Callable
from typing import Final

import httptools

from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError

MAX_LINE: Final = 8190
"""The maximum length of a header with its name, in bytes."""
MAX_HEAD: Final = 64 * 1024
"""The maximum length of a head, and of the framing between two pieces of a body, in bytes."""
NOT_HTTP: Final = "the answer is not HTTP"

_WITHOUT_BODY: Final = frozenset((204, 304))
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class AnswerReader:
    """Parses the answer to one request, and keeps its body.

    With `write`, the pieces of a successful answer's body are passed to it instead, and other bodies are dropped.
    `max_body` is the maximum length of the body in bytes. With `unpacks`, a compressed body is decompressed, and the
    limit applies to the result. The methods `on_…` are callbacks of httptools.
    """

    _take: Callable[[bytes], object]

    def __init__(self, max_body: int, write: Callable[[bytes], object] | None = None, *, unpacks: bool = True) -> None:
        self._max_body, self._unpacks = max_body, unpacks
        self._content = bytearray()
        self._write, self._take = write, self._content.extend
        self._parser = httptools.HttpResponseParser(self)
        self._decoder: _Decoder | None = None
        self._size = self._unsettled = 0
        self._error: Exception | None = None
        self._has_head = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_complete = False
        self.is_last = False
        """Whether the server said that it ends the connection after this answer."""

    @property
    def body(self) -> bytes:
        """The body of a complete answer; empty if it was passed to `write`."""
        return bytes(self._content)

    def receive(self, data: bytes) -> None:
        """Parse bytes; raise `NoAnswerError` or `AnswerTooLongError`, after which the reader must not be used again."""
        self._unsettled += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            raise NoAnswerError(NOT_HTTP) from error
        except httptools.HttpParserError as error:
            if not self.is_complete:
                raise self._error or NoAnswerError(NOT_HTTP) from error
        if self._unsettled > MAX_HEAD and not self.is_complete:
            raise NoAnswerError(NOT_HTTP)

    def receive_eof(self) -> None:
        """Handle the end of the connection; raise `NoAnswerError` if the answer is not complete."""
        if self.is_complete:
            return
        if not self._has_head:
            raise NoAnswerError("connection closed before the answer")
        if any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
            raise NoAnswerError("connection closed within the answer")
        self._complete()

    # ---- httptools' callbacks

    def on_message_begin(self) -> None:
        """Refuse a second answer."""
        if self.is_complete:
            raise NoAnswerError(NOT_HTTP)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header; drop a trailer."""
        if len(name) + len(value) > MAX_LINE:
            raise self._failed(NoAnswerError(NOT_HTTP))
        if not self._has_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Handle the end of the head; drop an informational one, which the final answer follows."""
        self.status, self._unsettled = self._parser.get_status_code(), 0
        if self.status < 200:
            self.headers = []
            return
        self._has_head = True
        self.is_last = not self._parser.should_keep_alive()
        packed = self._header(b"content-encoding").lower()
        if self._write is not None:
            self._take = self._write if 200 <= self.status < 300 else _drop
        if self._unpacks and packed in (b"gzip", b"x-gzip", b"deflate"):
            self._decoder = _Decoder(is_gzip=packed != b"deflate")
        if self.status in _WITHOUT_BODY:  # even if the head states a length
            self._complete()

    def on_body(self, piece: bytes) -> None:
        """Add a piece of the body."""
        self._unsettled = 0
        if self.is_complete:
            return
        if self._decoder is not None:
            try:
                piece = self._decoder.decode(piece, self._max_body - self._size + 1)
            except zlib.error:
                raise self._failed(NoAnswerError(NOT_HTTP)) from None
        self._size += len(piece)
        if self._size > self._max_body:
            raise self._failed(AnswerTooLongError(f"the answer is longer than {self._max_body} bytes"))
        self._take(piece)

    def on_message_complete(self) -> None:
        """Complete the answer, unless it was an informational one."""
        if self._has_head and not self.is_complete:
            self._complete()

    def _complete(self) -> None:
        self.is_complete = True

    def _failed(self, error: Exception) -> Exception:
        self._error = error
        return error

    def _header(self, name: bytes) -> bytes:
        return next((value for each, value in self.headers if each == name), b"")


def _drop(_piece: bytes) -> None: ...


class _Decoder:
    """Decompresses a body. Servers use `deflate` for two formats: zlib's, and raw deflate."""

    def __init__(self, *, is_gzip: bool) -> None:
        self._is_gzip = is_gzip
        self._unpacker: zlib._Decompress | None = None

    def decode(self, piece: bytes, most: int) -> bytes:
        """Decompress a piece to at most `most` bytes; raise `zlib.error`."""
        if self._unpacker is None and piece:
            self._unpacker = zlib.decompressobj(_GZIP if self._is_gzip else _ZLIB if piece[0] & 0xF == 8 else _RAW)
        return b"" if self._unpacker is None else self._unpacker.decompress(piece, most)
