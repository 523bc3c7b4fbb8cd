"""Parses the requests of one client's connection from its bytes, without I/O.

llhttp (through httptools) parses the bytes in its strict mode. What llhttp accepts and a server must not accept is
refused here: versions other than 1.0 and 1.1; Transfer-Encoding that is repeated, in HTTP/1.0, or not chunked at last;
heads over the limits. After a refusal nothing more is read: the beginning of the next request is not known.

Limits and statuses are those of hyper, the server of the real programs: at most 100 headers, and status 431 if there
are more. hyper's limit for a whole head is about 400 KiB; here it is 64 KiB.

Not here: sockets, time, and the answers.
Source of the format: RFC 9112. Source of the statuses: recorded answers of the real programs.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

import httptools

from dstack_emu.transport.http.body import Body, BodyBrokenError
from dstack_emu.transport.http.headers import Headers

MAX_HEAD: Final = 64 * 1024
"""The maximum length of a request's head (request line and headers) in bytes."""
MAX_HEADERS: Final = 100
"""The maximum number of a request's headers."""

_CONTINUE: Final = b"100-continue"
_LINE_OVERHEAD: Final = 4
"""Bytes of a header's line in addition to name and value: a colon, a space, CR and LF."""


@dataclass(frozen=True, slots=True)
class InvalidRequest:
    """Bytes that are not a valid request: the status of the answer, the last on its connection, and the reason."""

    status: int
    reason: str


@dataclass(slots=True, eq=False)
class IncomingRequest:
    """A request whose head has arrived; its body may still be arriving.

    `path` and `query` are as they were sent, without percent-decoding; those of an absolute target
    (`http://host/path`) are the part after the host. `is_kept_alive`: the client wants to keep the connection.
    """

    method: str
    path: str
    query: str
    is_http_10: bool
    headers: Headers
    is_kept_alive: bool
    awaits_continue: bool
    body: Body


class _RefusedError(Exception):
    """Stops the parser; the connection has the reason."""


class ServerConnection:
    """Parses the bytes of one connection; `max_body` is the limit of a body in bytes.

    `receive` takes bytes, `receive_eof` the client's end of file. `next_request` returns the next request to answer, in
    their order (pipelining). After an answer, `can_continue` is whether another request may follow. The methods `on_…`
    are callbacks of httptools.
    """

    def __init__(self, max_body: int) -> None:
        self._max_body = max_body
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[IncomingRequest | InvalidRequest] = deque()
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._current: IncomingRequest | None = None
        self._is_in_head = False
        self._unsettled = 0
        """Bytes of an incomplete head or of a body's framing that have arrived so far."""
        self._feeding = 0
        """Such bytes among those that the parser is processing."""
        self._upgrade_body = 0
        """Bytes of a body that are still to come after a head that requests another protocol."""
        self._invalid: InvalidRequest | None = None
        self.is_over = False
        """Whether nothing more is read: after the end of file, an invalid request, or the last request."""

    # ---- state

    @property
    def is_waiting(self) -> bool:
        """Whether a request waits for its answer."""
        return bool(self._waiting)

    @property
    def is_within_request(self) -> bool:
        """Whether a request has begun and is not complete."""
        return self._is_in_head or self._current is not None

    @property
    def can_continue(self) -> bool:
        """Whether another request waits or may still come."""
        return self.is_waiting or not self.is_over

    def next_request(self) -> IncomingRequest | InvalidRequest | None:
        """Return the next request to answer, None if there is none."""
        return self._waiting.popleft() if self._waiting else None

    # ---- input

    def receive(self, data: bytes) -> None:
        """Parse bytes; this raises nothing."""
        if self.is_over:
            return
        self._feeding = len(data)
        if self._upgrade_body:
            data = self._take_upgrade_body(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            if not self.is_over:  # bytes after the last request are ignored
                self._refuse(self._invalid or InvalidRequest(400, str(error)))
            return
        self._unsettled += self._feeding
        if self._unsettled > MAX_HEAD and not self.is_over:
            self._refuse(InvalidRequest(431, f"head or framing longer than {MAX_HEAD} bytes"))

    def receive_eof(self) -> None:
        """Handle the client's end of file. An incomplete request is not answered, and its body fails."""
        self.is_over = True
        current, self._current = self._current, None
        if current is not None:
            current.body.fail(BodyBrokenError("the connection ended within the body"))
            if current in self._waiting:
                self._waiting.remove(current)

    def _feed(self, data: bytes) -> None:
        while data and not self.is_over:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._take_upgrade_body(data[upgrade.args[0] :])
            else:
                return

    def _take_upgrade_body(self, data: bytes) -> bytes:
        """Take the body after a request to upgrade, which llhttp considers another protocol; return the rest.

        There is no other protocol here, so the request to upgrade is ignored, as hyper does.
        """
        taken, rest = data[: self._upgrade_body], data[self._upgrade_body :]
        if self._upgrade_body and self._current is not None:
            self._upgrade_body -= len(taken)
            self.on_body(taken)
            if not self._upgrade_body:
                self._end_request()
        return rest

    def _refuse(self, invalid: InvalidRequest) -> None:
        """End the connection: fail the body of a request whose head is complete, or let the status be answered."""
        current, self._current = self._current, None
        self.is_over = True
        if current is None:
            self._waiting.append(invalid)
        else:
            current.body.fail(BodyBrokenError(invalid.reason))

    # ---- httptools' callbacks

    def on_message_begin(self) -> None:
        """Handle the beginning of a head."""
        self._is_in_head = True

    def on_url(self, part: bytes) -> None:
        """Add a part of the target."""
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header; drop a trailer."""
        if self._is_in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Make a request from the head."""
        headers, self._headers = self._headers, []
        target, self._target = self._target, b""
        if self._unsettled + self._feeding > MAX_HEAD and _size(target, headers) > MAX_HEAD:
            raise self._refused(431, f"a head longer than {MAX_HEAD} bytes")
        if len(headers) > MAX_HEADERS:
            raise self._refused(431, f"{len(headers)} headers, at most {MAX_HEADERS} are read")
        self._current = self._request(target, headers)
        self._waiting.append(self._current)
        self._is_in_head = False
        self._unsettled = self._feeding = 0

    def on_body(self, piece: bytes) -> None:
        """Add a part of the body."""
        if self._current is not None:
            self._current.body.add(piece)
        self._unsettled = self._feeding = 0

    def on_message_complete(self) -> None:
        """End the request, unless its body comes after a request to upgrade."""
        if not self._upgrade_body:
            self._end_request()

    # ---- requests

    def _request(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> IncomingRequest:
        names = [name for name, _ in headers]
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._refused(400, f"HTTP/{version} is not supported, 1.0 or 1.1 expected")
        is_http_10, is_chunked = version == "1.0", b"transfer-encoding" in names
        if is_chunked and (is_http_10 or names.count(b"transfer-encoding") > 1 or not _ends_in_chunks(headers)):
            raise self._refused(400, "Transfer-Encoding that is repeated, in HTTP/1.0, or not chunked")
        body = Body(self._max_body)
        length = int(_last(headers, b"content-length")) if b"content-length" in names else 0
        body.expect(length)
        if self._parser.should_upgrade():
            if is_chunked:
                raise self._refused(400, "a request to upgrade cannot have a chunked body")
            self._upgrade_body = length
        method, (path, query) = self._parser.get_method(), self._split(target)
        return IncomingRequest(
            method=method.decode(),
            path=path,
            query=query,
            is_http_10=is_http_10,
            headers=Headers(headers),
            is_kept_alive=self._parser.should_keep_alive() and method != b"CONNECT",
            awaits_continue=not is_http_10 and b"expect" in names and _last(headers, b"expect").lower() == _CONTINUE,
            body=body,
        )

    def _split(self, target: bytes) -> tuple[str, str]:
        """Return path and query of a target; RFC 9112 requires every server to accept an absolute target."""
        if not target.startswith((b"/", b"*")) and b"://" in target:
            try:
                url = httptools.parse_url(target)
            except httptools.HttpParserInvalidURLError as error:
                raise self._refused(400, "the target is not a URL") from error
            path, query = url.path or b"/", url.query or b""
        else:
            path, _, query = target.partition(b"#")[0].partition(b"?")
        return path.decode(errors="surrogateescape"), query.decode(errors="surrogateescape")

    def _end_request(self) -> None:
        current, self._current = self._current, None
        self._unsettled = self._feeding = 0
        if current is not None:
            current.body.end()
            self.is_over = self.is_over or not current.is_kept_alive

    def _refused(self, status: int, reason: str) -> _RefusedError:
        self._invalid = InvalidRequest(status, reason)
        return _RefusedError(reason)


def _size(target: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    """Return the length of a head in bytes, without method and version."""
    return len(target) + sum(len(name) + len(value) + _LINE_OVERHEAD for name, value in headers)


def _last(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Return the last value of an existing header."""
    return next(value for each, value in reversed(headers) if each == name)


def _ends_in_chunks(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether the last transfer coding is chunked; otherwise the end of a request's body is unknown."""
    return _last(headers, b"transfer-encoding").lower().rpartition(b",")[2].strip(b" \t") == b"chunked"
