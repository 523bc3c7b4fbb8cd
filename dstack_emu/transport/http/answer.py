"""One answer of a server as bytes, without I/O: pieces come in, and the answer is complete or broken.

llhttp (through httptools) reads the bytes, in its strict mode. What a client must not accept and llhttp does is refused
here: lines and heads over the limits, an answer in another protocol, a body that is longer than is read.

Not here: sockets, time, redirects, and what an answer means. Source of the form: RFC 9112.
"""

import zlib
from collections.abc import Callable
from typing import Final

import httptools

from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError

MAX_LINE: Final = 8190
"""Bytes of a header of an answer, its name included."""
MAX_HEAD: Final = 64 * 1024
"""Bytes of a head, and of the framing between two pieces of a body."""
NOT_HTTP: Final = "the answer is not HTTP"

_WITHOUT_BODY: Final = frozenset((204, 304))
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class AnswerReader:
    """Reads the answer to one request. Pieces of its body are kept.

    With `write` they go there instead if the status says success, and are dropped if not.

    `max_body` is the longest body that is read, in bytes; with `unpacks` it counts, and is given, uncompressed. The
    methods `on_…` are httptools' callbacks.
    """

    _take: Callable[[bytes], object]

    def __init__(self, max_body: int, write: Callable[[bytes], object] | None = None, *, unpacks: bool = True) -> None:
        self._max_body, self._unpacks = max_body, unpacks
        self._pieces: list[bytes] = []
        self._write, self._take = write, self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._decoder: _Decoder | None = None
        self._size = self._unsettled = 0
        self._error: Exception | None = None
        self._has_head = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_complete = False
        self.is_reusable = False
        """Whether the connection may serve another request: the answer is complete, and nothing came behind it."""

    @property
    def body(self) -> bytes:
        """Return the body of a complete answer, unless it was written elsewhere."""
        return b"".join(self._pieces) if len(self._pieces) != 1 else self._pieces[0]

    def receive(self, data: bytes) -> None:
        """Read bytes; raise `NoAnswerError` or `AnswerTooLongError`, after which nothing more may be read."""
        self._unsettled += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            raise NoAnswerError(NOT_HTTP) from error
        except httptools.HttpParserError as error:
            if not self.is_complete:
                raise self._error or NoAnswerError(NOT_HTTP) from error
            self.is_reusable = False
        if self._unsettled > MAX_HEAD and not self.is_complete:
            raise NoAnswerError(NOT_HTTP)

    def receive_eof(self) -> None:
        """Take note that the server has ended the connection; raise `NoAnswerError` if its answer is not complete."""
        self.is_reusable = False
        if self.is_complete:
            return
        if not self._has_head:
            raise NoAnswerError("connection closed before the answer")
        if any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
            raise NoAnswerError("connection closed within the answer")
        self._complete()

    # ---- httptools' callbacks

    def on_message_begin(self) -> None:
        """Take note of an answer that nobody asked for."""
        if self.is_complete:
            self.is_reusable = False
            raise NoAnswerError(NOT_HTTP)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; a trailer is dropped."""
        if len(name) + len(value) > MAX_LINE:
            raise self._failed(NoAnswerError(NOT_HTTP))
        if not self._has_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Take the head, unless it is that of an informational answer, which another one follows."""
        self.status, self._unsettled = self._parser.get_status_code(), 0
        if self.status < 200:
            self.headers = []
            return
        self._has_head = True
        self.is_reusable = self._parser.should_keep_alive()
        packed = self._header(b"content-encoding").lower()
        if self._write is not None:
            self._take = self._write if 200 <= self.status < 300 else _drop
        if self._unpacks and packed in (b"gzip", b"x-gzip", b"deflate"):
            self._decoder = _Decoder(is_gzip=packed != b"deflate")
        if self.status in _WITHOUT_BODY:  # whatever length the head names
            self._complete()

    def on_body(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._unsettled = 0
        if self.is_complete:
            self.is_reusable = False
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
        """End the answer, unless it was an informational one."""
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
    """Unpacks a body. Servers mean two things by `deflate`: zlib's format, or the bare one."""

    def __init__(self, *, is_gzip: bool) -> None:
        self._is_gzip = is_gzip
        self._unpacker: zlib._Decompress | None = None

    def decode(self, piece: bytes, most: int) -> bytes:
        """Unpack a piece to at most so many bytes; raise `zlib.error`."""
        if self._unpacker is None and piece:
            self._unpacker = zlib.decompressobj(_GZIP if self._is_gzip else _ZLIB if piece[0] & 0xF == 8 else _RAW)
        return b"" if self._unpacker is None else self._unpacker.decompress(piece, most)
