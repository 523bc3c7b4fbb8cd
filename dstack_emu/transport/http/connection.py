"""One client's connection as bytes, without I/O: what it sends comes in, requests and refusals go out in its order.

llhttp (through httptools) reads the bytes, in its strict mode. What it accepts and a server must not is refused here:
another version than 1.0 and 1.1; Transfer-Encoding twice, in HTTP/1.0, or not ending in chunks; heads over the limits.
A refused connection is not read any further: after bytes that are no HTTP nobody knows where the next request begins.

Limits and statuses are hyper's, which the real programs are served by: at most 100 headers, and 431 if there are more.
hyper's limit for a whole head is about 400 KiB; here it is 64 KiB.

Not here: sockets, time, and what is answered.
Source of the form: RFC 9112. Source of the statuses: recorded answers of the real programs.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

import httptools

from dstack_emu.transport.http.body import Body, BodyBrokenError
from dstack_emu.transport.http.headers import Headers

MAX_HEAD: Final = 64 * 1024
"""Bytes of a request's head: request line and headers."""
MAX_HEADERS: Final = 100
"""Headers of a request."""

_CONTINUE: Final = b"100-continue"
_LINE_OVERHEAD: Final = 4
"""Bytes of a header's line beside name and value: a colon, a space, CR and LF."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that is no request: the status that is answered before the connection is closed, and why."""

    status: int
    reason: str


@dataclass(slots=True, eq=False)
class IncomingRequest:
    """A request whose head came whole; its body may be still on its way.

    `path` and `query` are as they were sent, without percent-decoding; of an absolute target (`http://host/path`) they
    are what follows the host. `is_kept_alive` says whether the client wants the connection to go on.
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
    """Ends the parser's work; its refusal is in the connection."""


class ServerConnection:
    """Reads one connection; `max_body` is the longest body in bytes that is kept.

    `receive` takes bytes, `receive_eof` the client's end of file; `next_request` gives what is to be answered next, in
    the order of the requests (pipelining). After an answer `can_continue` says whether another may follow.
    The methods `on_…` are httptools' callbacks.
    """

    def __init__(self, max_body: int) -> None:
        self._max_body = max_body
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[IncomingRequest | Refusal] = deque()
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._current: IncomingRequest | None = None
        self._is_in_head = False
        self._unsettled = 0
        """Bytes that came since the last thing that was complete: part of a head, or of a body's framing."""
        self._feeding = 0
        """The same of the bytes that the parser has in hand."""
        self._upgrade_body = 0
        """Bytes of a body that are still to come behind a head that asked for another protocol."""
        self._refusal: Refusal | None = None
        self.is_over = False
        """Whether nothing more is read: after an end of file, a refusal, or a request that ends the connection."""

    # ---- what its owner asks

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to answer."""
        return bool(self._waiting)

    @property
    def is_within_request(self) -> bool:
        """Whether the client has begun a request and not ended it."""
        return self._is_in_head or self._current is not None

    @property
    def can_continue(self) -> bool:
        """Whether there is, or may still come, something else to answer."""
        return self.is_waiting or not self.is_over

    def next_request(self) -> IncomingRequest | Refusal | None:
        """Return what is to be answered next, if anything has come."""
        return self._waiting.popleft() if self._waiting else None

    # ---- what comes in

    def receive(self, data: bytes) -> None:
        """Read bytes, whatever they are."""
        if self.is_over:
            return
        self._feeding = len(data)
        if self._upgrade_body:
            data = self._take_upgrade_body(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            if not self.is_over:  # what follows the last request is nobody's
                self._refuse(self._refusal or Refusal(400, str(error)))
            return
        self._unsettled += self._feeding
        if self._unsettled > MAX_HEAD and not self.is_over:
            self._refuse(Refusal(431, f"head or framing longer than {MAX_HEAD} bytes"))

    def receive_eof(self) -> None:
        """Read no more. A request that did not come whole is not answered, and its body fails."""
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
        """Read a body that llhttp does not: it takes what follows a request to upgrade for another protocol.

        No other protocol is spoken here, so the request is answered as if it had not asked for one, as hyper does.
        """
        taken, rest = data[: self._upgrade_body], data[self._upgrade_body :]
        if self._upgrade_body and self._current is not None:
            self._upgrade_body -= len(taken)
            self.on_body(taken)
            if not self._upgrade_body:
                self._end_request()
        return rest

    def _refuse(self, refusal: Refusal) -> None:
        """End the connection: a request that has begun is broken, and what is no request is answered by a status."""
        current, self._current = self._current, None
        self.is_over = True
        if current is None:
            self._waiting.append(refusal)
        else:
            current.body.fail(BodyBrokenError(refusal.reason))

    # ---- httptools' callbacks

    def on_message_begin(self) -> None:
        """Take note that a head has begun."""
        self._is_in_head = True

    def on_url(self, part: bytes) -> None:
        """Take a part of the target."""
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; a trailer is dropped."""
        if self._is_in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Make a request of the head."""
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
        """Take a part of the body."""
        if self._current is not None:
            self._current.body.add(piece)
        self._unsettled = self._feeding = 0

    def on_message_complete(self) -> None:
        """End the request, unless its body is still to be taken past llhttp."""
        if not self._upgrade_body:
            self._end_request()

    # ---- requests

    def _request(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> IncomingRequest:
        names = [name for name, _ in headers]
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._refused(400, f"HTTP/{version} is not spoken here")
        is_http_10, is_chunked = version == "1.0", b"transfer-encoding" in names
        if is_chunked and (is_http_10 or names.count(b"transfer-encoding") > 1 or not _ends_in_chunks(headers)):
            raise self._refused(400, "Transfer-Encoding that is repeated, in HTTP/1.0, or not chunked")
        body = Body(self._max_body)
        length = int(_last(headers, b"content-length")) if b"content-length" in names else 0
        body.expect(length)
        if self._parser.should_upgrade():
            if is_chunked:
                raise self._refused(400, "a body in chunks cannot go with a request to upgrade")
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
        """Return a target's path and query; RFC 9112 wants an absolute target to be accepted by every server."""
        if not target.startswith((b"/", b"*")) and b"://" in target:
            try:
                url = httptools.parse_url(target)
            except httptools.HttpParserInvalidURLError as error:
                raise self._refused(400, "the target is no URL") from error
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
        self._refusal = Refusal(status, reason)
        return _RefusedError(reason)


def _size(target: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    """Count a head's bytes, less the method and the version."""
    return len(target) + sum(len(name) + len(value) + _LINE_OVERHEAD for name, value in headers)


def _last(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Return the last value of a header that is there."""
    return next(value for each, value in reversed(headers) if each == name)


def _ends_in_chunks(headers: list[tuple[bytes, bytes]]) -> bool:
    """Tell whether the last transfer coding is chunked: without that nobody knows where a request's body ends."""
    return _last(headers, b"transfer-encoding").lower().rpartition(b",")[2].strip(b" \t") == b"chunked"
