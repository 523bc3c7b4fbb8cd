"""The server name in a ClientHello, as soon as the bytes that have arrived tell it.

The hello may come in any number of TCP segments and of TLS records, and the rest of it is not needed once the name is
there. A name that is not within the first 4096 bytes is none, as upstream reads no more. Upstream cannot read a hello
that is split over several records.

Not here: the verification of anything else in a hello, which TLS itself does.
Source: RFC 8446, sections 4.1.2, 4.2 and 5.1; RFC 6066, section 3; `gateway/src/proxy.rs` and
`gateway/src/proxy/sni.rs` of dstack 312dc605.
"""

from collections.abc import Generator
from typing import Final

from dstack_emu.gateway.ingress.errors import RefusedConnectionError

MAX_BYTES: Final = 4096
"""How many bytes from the beginning of a connection can hold the name."""

_HANDSHAKE: Final = 22
_MAX_FRAGMENT: Final = 2**14
_MESSAGE_HEADER: Final = 4  # type 1, length 3
_CLIENT_HELLO: Final = 1
_VERSION_AND_RANDOM: Final = 34
_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0


class _NoNameError(Exception):
    """No further byte can make a server name of these."""


class ServerNameReader:
    """Reads the server name at the beginning of a connection. Its work is linear in the bytes, however they come."""

    def __init__(self) -> None:
        raw, message = _Field(), _Field()
        self._raw = raw
        self._records = _unwrap(raw, message)
        self._parser = _find_name(message)
        next(self._records)
        next(self._parser)

    def receive(self, data: bytes) -> str | None:
        """Read more bytes; return the name, or None if further bytes must tell it.

        Raises `RefusedConnectionError` if the bytes are no ClientHello with a server name, whatever follows.
        """
        self._raw.data += data[: MAX_BYTES - len(self._raw.data)]
        try:
            has_further_records = self._unwrap()
            next(self._parser)
        except StopIteration as found:
            return _text(found.value)
        except _NoNameError:
            raise RefusedConnectionError("no sni found") from None
        if len(self._raw.data) >= MAX_BYTES:
            raise RefusedConnectionError(f"no sni found in the first {MAX_BYTES} bytes")
        if not has_further_records:
            raise RefusedConnectionError("no sni found")
        return None

    def _unwrap(self) -> bool:
        """Return whether further bytes can belong to the hello; those after it need not be TLS."""
        try:
            next(self._records)
        except _NoNameError:
            return False
        return True


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise RefusedConnectionError("sni: invalid utf-8") from error


class _Field:
    """Bytes that arrive little by little, and how far they are read; `end` is where they end, once that is known."""

    __slots__ = ("at", "data", "end")

    def __init__(self) -> None:
        self.data, self.at, self.end = bytearray(), 0, MAX_BYTES

    def take(self, size: int) -> Generator[None, None, bytes]:
        """Read that many bytes, and pause until they are there; raise `_NoNameError` if they are not within the end."""
        start, self.at = self.at, self.at + size
        if self.at > self.end:
            raise _NoNameError
        while len(self.data) < self.at:
            yield
        return bytes(self.data[start : self.at])

    def number(self, size: int) -> Generator[None, None, int]:
        """Read an unsigned number."""
        return int.from_bytes((yield from self.take(size)), "big")

    def vector(self, size_of_length: int) -> Generator[None, None, bytes]:
        """Read bytes that follow their length."""
        return (yield from self.take((yield from self.number(size_of_length))))


def _unwrap(raw: _Field, message: _Field) -> Generator[None, None, None]:
    """Copy the content of records as it arrives, the last one as far as it has arrived."""
    while True:
        kind = yield from raw.number(1)
        major = yield from raw.number(1)
        if kind != _HANDSHAKE or major != 3:
            raise _NoNameError
        yield from raw.take(1)
        left = yield from raw.number(2)
        if not 0 < left <= _MAX_FRAGMENT:
            raise _NoNameError
        while left:
            part = raw.data[raw.at : raw.at + left]
            message.data += part
            raw.at += len(part)
            left -= len(part)
            if left:
                yield


def _find_name(message: _Field) -> Generator[None, None, bytes]:
    if (yield from message.number(1)) != _CLIENT_HELLO:
        raise _NoNameError
    message.end = _MESSAGE_HEADER + (yield from message.number(3))
    yield from message.take(_VERSION_AND_RANDOM)
    yield from message.vector(1)  # session id
    yield from message.vector(2)  # cipher suites
    yield from message.vector(1)  # compression methods
    yield from message.number(2)  # the length of all extensions
    while (yield from message.number(2)) != _SERVER_NAME:
        yield from message.vector(2)
    yield from message.number(4)  # the length of the extension, and that of the list
    while (yield from message.number(1)) != _HOST_NAME:
        yield from message.vector(2)
    return (yield from message.vector(2))
