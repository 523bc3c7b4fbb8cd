"""TLS of connections that are terminated: the settings of a domain, and a channel over bytes.

The channel has no socket, because the TLS transports of asyncio and uvloop cannot end one direction alone.

Not here: certificates and their issue, which the caller has.
"""

import contextlib
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from dstack_emu.gateway.ingress.errors import RefusedConnectionError

DEFAULT_VERSIONS: Final = ("1.2",)

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Upstream's library has no others for TLS 1.2."""

_SLICE: Final = 65536
"""How many bytes are given to OpenSSL at once: the buffers of a channel grow, and never shrink."""
_RECORD: Final = 16384


@dataclass(frozen=True, slots=True)
class DomainTls:
    """The TLS settings of a domain: those without ALPN, and those that agree to HTTP/2 alone."""

    plain: ssl.SSLContext
    h2: ssl.SSLContext


FindTls = Callable[[str], DomainTls | None]
"""Returns the TLS settings of a domain (without `*.`, as the client wrote it), None if there is no certificate."""


class WildcardCertificate(Protocol):
    """A certificate of a domain: its chain and its key, both in PEM. Another object is another certificate."""

    @property
    def chain(self) -> str:
        """The certificates, the domain's own first."""
        ...

    @property
    def key(self) -> str:
        """The private key."""
        ...


class TlsByDomain:
    """Makes the TLS settings of a domain when they are asked for, and again when it has another certificate."""

    def __init__(
        self, find: Callable[[str], WildcardCertificate | None], versions: Sequence[str] = DEFAULT_VERSIONS
    ) -> None:
        self._find, self._versions = find, versions
        self._made: dict[str, tuple[WildcardCertificate, DomainTls]] = {}

    def __call__(self, domain: str) -> DomainTls | None:
        """Return the settings of a domain; None if there is no certificate."""
        certificate = self._find(domain)
        if certificate is None:
            self._made.pop(domain, None)
            return None
        made = self._made.get(domain)
        if made is None or made[0] is not certificate:
            made = certificate, domain_tls(certificate.chain, certificate.key, self._versions)
            self._made[domain] = made
        return made[1]


def domain_tls(certificate: str, key: str, versions: Sequence[str] = DEFAULT_VERSIONS) -> DomainTls:
    """Make the settings of a domain from its certificate chain and key, both in PEM.

    `versions` are of `1.2` and `1.3`. Raises `ValueError` for others, and `ssl.SSLError` if the two do not fit.
    """
    unknown = [version for version in versions if version not in _VERSIONS]
    if unknown or not versions:
        raise ValueError(f"tls_versions: expected some of 1.2 and 1.3, got {list(versions)}")
    # OpenSSL reads a certificate chain only from files; the folder has mode 0700 and is deleted at once.
    with tempfile.TemporaryDirectory(prefix="dstack-emu-") as folder:
        both = Path(folder, "both.pem")
        both.touch(mode=0o600)
        both.write_text(f"{key}\n{certificate}")
        plain, h2 = _context(both, versions), _context(both, versions)
    h2.set_alpn_protocols(["h2"])
    return DomainTls(plain, h2)


def _context(file: Path, versions: Sequence[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = min(_VERSIONS[version] for version in versions)
    context.maximum_version = max(_VERSIONS[version] for version in versions)
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(file)
    return context


class TlsChannel:
    """The server's side of one TLS connection, whose directions end one by one.

    Whatever a call makes for the client is in `take`, and must be sent.
    """

    __slots__ = ("_incoming", "_object", "_outgoing", "has_ended")

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.has_ended = False
        """Whether the client sends nothing more, by a close_notify or by the end of its connection."""

    def take(self) -> bytes:
        """Return the bytes for the client."""
        return self._outgoing.read()

    def shake_hands(self, data: bytes) -> bool:
        """Read bytes of the handshake; return whether it is complete. Raises `RefusedConnectionError` if it fails."""
        self._incoming.write(data)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise RefusedConnectionError(f"failed to accept tls connection: {error.reason or error}") from error
        return True

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Decrypt bytes of the client, none after a handshake; raise `ssl.SSLError` if they are not valid."""
        view = memoryview(data)
        for start in range(0, len(data) or 1, _SLICE):
            self._incoming.write(view[start : start + _SLICE])
            yield b"".join(self._records())

    def receive_eof(self) -> None:
        """Note that the client's connection has ended; one without a close_notify is an end like any other."""
        self.has_ended = True

    def send(self, data: bytes) -> Iterator[bytes]:
        """Encrypt bytes for the client."""
        view = memoryview(data)
        for start in range(0, len(data), _SLICE):
            self._object.write(view[start : start + _SLICE])
            yield self._outgoing.read()

    def send_eof(self) -> bytes:
        """Return the close_notify for the client."""
        with contextlib.suppress(ssl.SSLError):  # the client's own close_notify has not come, or never will
            self._object.unwrap()
        return self._outgoing.read()

    def _records(self) -> Iterator[bytes]:
        while not self.has_ended:
            try:
                data = self._object.read(_RECORD)
            except ssl.SSLWantReadError:
                return
            except ssl.SSLZeroReturnError:
                data = b""
            self.has_ended = not data
            yield data
