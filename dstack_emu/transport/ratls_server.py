"""RA-TLS servers: accept client certificates of any issuer, if they contain evidence.

A client may show no certificate. If it shows one, the certificate must be parsable and valid at the present time, and
contain an attestation that decodes; otherwise the handshake ends with the alert handshake_failure. The handshake proves
that the client has the certificate's key. It does not prove that the evidence holds or binds that key: verify both for
each request.

The standard library can only verify issuers. Therefore this is pyOpenSSL between memory buffers, with the interface of
the standard library's `ssl.SSLObject`, which asyncio and uvloop use. docs/decisions/client-certificates.md has the
alternatives and the measurements. Import this module only for such a server: it loads a second OpenSSL binding.

Not here: resumed sessions (each connection shows its certificate anew), renegotiation and early data.
Source: dstack `ra-rpc/src/ratls_client_verifier.rs` at 3d5f600e.
"""

import os
import ssl
from collections.abc import Callable, Iterable
from typing import Any, Final

from OpenSSL import SSL, crypto

from dstack_emu.attest.certificate import attestation_of, load_der
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.transport.tls_alert import plain_record, protected_record

_TLS12_CIPHERS: Final = b"ECDHE+AESGCM:ECDHE+CHACHA20"
"""rustls's suites; those of TLS 1.3 are the same in both libraries."""
_SECRET_LABEL: Final = b"SERVER_TRAFFIC_SECRET_0"
_RECORD_SIZE: Final = 16 * 1024
"""The maximum number of plaintext bytes in a TLS record, and so in one read."""
_TLS12_OVERHEAD: Final = 21
"""The minimum overhead of a record in bytes: header and tag (ChaCha20-Poly1305; AES-GCM has more)."""
_TLS13_OVERHEAD: Final = 22
"""The overhead in TLS 1.3, where the content type is encrypted, too."""
_HEADER_SIZE: Final = 5
"""Bytes of a record's header: content type, version (2), length (2)."""
_CONTENT_TYPES: Final = range(20, 24)
"""change_cipher_spec, alert, handshake and application_data, of RFC 8446 section 5.1."""
_MAX_FRAGMENT: Final = _RECORD_SIZE + 2048
"""The greatest length that a record's header may give: RFC 5246 section 6.2.3; TLS 1.3 has less."""
_CHUNK: Final = 64 * 1024
_ASN1_ERRORS: Final = "asn1 encoding routines"


def attested_clients_context(
    certificate: str | os.PathLike[str],
    key: str | os.PathLike[str],
    *,
    now: Callable[[], float],
    refused: Callable[[str], None],
    required: bool = False,
) -> ssl.SSLContext:
    """Make a server's context from its certificate chain and key (PEM files).

    `now` returns the time of the validity check in Unix seconds. `refused` is called with the reason for each client
    certificate that is refused. With `required`, clients without a certificate are refused, too. Of the standard
    library's settings, only `set_alpn_protocols` has an effect.

    Raises `OSError` (`ssl.SSLError` is one) if the files cannot be loaded or do not fit together.
    """
    context = _Context(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)  # for its errors, which are clearer than pyOpenSSL's
    context.openssl = _openssl_context(certificate, key, required)
    context.now, context.refused = now, refused
    return context


def verify_client_certificate(certificate_der: bytes, now: float) -> None:
    """Verify the requirements of the handshake on a client certificate, at a time in Unix seconds.

    Raises `VerificationError` with upstream's text. Success proves neither the issuer nor the evidence.
    """
    try:
        certificate = load_der(certificate_der)
    except FormatError as error:
        raise VerificationError(f"failed to parse client certificate: {error}") from error
    if int(now) < certificate.not_valid_before_utc.timestamp():
        raise VerificationError("client certificate is not yet valid")
    if int(now) > certificate.not_valid_after_utc.timestamp():
        raise VerificationError("client certificate has expired")
    try:
        attestation = attestation_of(certificate)
    except FormatError as error:
        raise VerificationError(f"failed to decode client attestation: {error}") from error
    if attestation is None:
        raise VerificationError("client certificate carries no attestation")


def _openssl_context(certificate: str | os.PathLike[str], key: str | os.PathLike[str], required: bool) -> SSL.Context:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(_TLS12_CIPHERS)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    context.set_verify(SSL.VERIFY_PEER | (SSL.VERIFY_FAIL_IF_NO_PEER_CERT if required else 0), _accept_any_issuer)
    context.set_keylog_callback(_keep_secret)
    try:
        # As bytes, because pyOpenSSL refuses a path that is no text in the file system's encoding.
        context.use_certificate_chain_file(os.fsencode(certificate))
        context.use_privatekey_file(os.fsencode(key))
    except SSL.Error as error:
        raise ssl.SSLError(ssl.SSL_ERROR_SSL, _reason(error)) from error
    return context


def _accept_any_issuer(_connection: object, _certificate: object, _error: int, _depth: int, _ok: int) -> bool:
    """Override OpenSSL's own checks; `verify_client_certificate` is called after the handshake."""
    return True


def _keep_secret(connection: SSL.Connection, line: bytes) -> None:
    """Keep the secret that encrypts an alert, from a line in the NSS key log format."""
    label, _, secret = line.split(b" ")
    if label == _SECRET_LABEL:
        connection.get_app_data()[label] = bytes.fromhex(secret.decode())


class _Context(ssl.SSLContext):
    openssl: SSL.Context
    now: Callable[[], float]
    refused: Callable[[str], None]

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        """Offer these protocols, the preferred one first; a client without any of them is served all the same."""
        ours = [name.encode() for name in alpn_protocols]

        def choose(_connection: SSL.Connection, offered: list[bytes]) -> Any:
            return next((name for name in ours if name in offered), SSL.NO_OVERLAPPING_PROTOCOLS)

        self.openssl.set_alpn_select_callback(choose)

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Make the TLS side of one accepted connection."""
        if not server_side:
            raise ValueError("this context is for servers only")
        return _ServerSide(self, incoming, outgoing)


class _ServerSide(ssl.SSLObject):
    """The TLS side of one connection, with the methods of `ssl.SSLObject` that event loops and servers use.

    It reads from `incoming` and writes to `outgoing`, which belong to the event loop.
    """

    def __init__(self, context: _Context, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        self._owner, self._incoming, self._outgoing = context, incoming, outgoing
        self._secrets: dict[bytes, bytes] = {}
        self._connection = SSL.Connection(context.openssl, None)
        self._connection.set_accept_state()
        self._connection.set_app_data(self._secrets)
        self._partial = b""
        """The beginning of a record that has not come whole."""
        self._unread = 0
        """An upper bound of the bytes that were passed to OpenSSL and are not decrypted yet."""
        self._overhead = _TLS12_OVERHEAD
        self._peer: bytes | None = None
        self._failure: ssl.SSLError | None = None

    # ---- the handshake

    def do_handshake(self) -> None:
        """Continue the handshake; raise `SSLWantReadError` while it needs more bytes, `SSLError` if it fails."""
        if self._failure is not None:
            raise self._failure
        self._feed()
        try:
            self._connection.do_handshake()
            self._peer = self._verified_certificate()
        except SSL.WantReadError:
            self._wait_for_more()
        except SSL.Error as error:
            self._fail(error)
        except VerificationError as error:
            self._refuse(str(error))
        self._secrets.clear()
        if self._is_tls13:
            self._overhead = _TLS13_OVERHEAD
        self._flush()

    @property
    def _is_tls13(self) -> bool:
        return self._connection.get_protocol_version() == SSL.TLS1_3_VERSION

    def _verified_certificate(self) -> bytes | None:
        certificate = self._connection.get_peer_certificate()
        if certificate is None:
            return None
        der = crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)
        verify_client_certificate(der, self._owner.now())
        return der

    def _fail(self, error: SSL.Error) -> None:
        """End a handshake that failed in OpenSSL, with OpenSSL's alert."""
        reason = _reason(error)
        if _ASN1_ERRORS in str(error) and self._connection.get_peer_certificate() is None:
            self._refuse(f"failed to parse client certificate: {reason}")
        self._flush()
        self._end(reason)

    def _refuse(self, reason: str) -> None:
        """End a handshake whose client certificate is refused, with our alert."""
        self._owner.refused(reason)
        self._take_outgoing()  # drop OpenSSL's alert, or the last message of a handshake that it considers complete
        self._outgoing.write(self._alert())
        self._end(reason)

    def _alert(self) -> bytes:
        if not self._is_tls13:
            return plain_record()
        return protected_record(self._connection.get_cipher_name() or "", self._secrets[_SECRET_LABEL])

    def _end(self, reason: str) -> None:
        self._secrets.clear()
        self._failure = ssl.SSLError(ssl.SSL_ERROR_SSL, reason)
        if not self._outgoing.pending:
            raise self._failure
        # The event loop sends pending bytes before it reads again. The client gets the alert and closes.
        raise ssl.SSLWantReadError

    # ---- information for event loops and servers

    def getpeercert(self, binary_form: bool = False) -> Any:
        """Return the client's certificate in DER, or None if it showed none.

        If `binary_form` is false, return an empty dict, as the standard library does if the issuer is not verified.
        """
        if self._peer is None or binary_form:
            return self._peer
        return {}

    def selected_alpn_protocol(self) -> str | None:
        """Return the negotiated application protocol, None if there is none."""
        return self._connection.get_alpn_proto_negotiated().decode() or None

    def version(self) -> str | None:
        """Return the protocol version, such as `TLSv1.3`."""
        return self._connection.get_protocol_version_name()

    def cipher(self) -> tuple[str, str, int] | None:
        """Return the suite's name, its protocol version and the bits of its key."""
        name = self._connection.get_cipher_name()
        if name is None:
            return None
        return name, self._connection.get_cipher_version() or "", self._connection.get_cipher_bits() or 0

    def compression(self) -> str | None:
        """Return None: nothing is compressed."""
        return None

    # ---- data

    def pending(self) -> int:
        """Return an upper bound of the bytes that can be read; uvloop does not read if it is 0.

        Encrypted bytes count, too: a request that came together with the end of the handshake is still encrypted, but
        no longer in `incoming`.
        """
        return max(self._unread, self._connection.pending())

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """Read at most `len` bytes; return them, or with `buffer` their number. No bytes mean the end."""
        self._feed()
        try:
            data = self._connection.recv(min(len, _RECORD_SIZE))
        except SSL.WantReadError:
            self._unread = 0
            raise ssl.SSLWantReadError from None
        except SSL.ZeroReturnError:
            data = b""
        except SSL.Error as error:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, _reason(error)) from error
        self._count_as_read(data)
        if buffer is None:
            return data
        size = memoryview(data).nbytes
        buffer[:size] = data
        return size

    def _count_as_read(self, data: bytes) -> None:
        """Count decrypted bytes, so that an event loop omits a read that would only raise `SSLWantReadError`."""
        record_is_over = not self._connection.pending()
        self._unread -= memoryview(data).nbytes + (self._overhead if record_is_over else 0)

    def write(self, data: Any) -> int:
        """Write all of the data, and return its length in bytes."""
        view = memoryview(data)
        try:
            self._connection.sendall(view)
        except SSL.Error as error:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, _reason(error)) from error
        self._flush()
        return view.nbytes

    def unwrap(self) -> None:
        """Send close_notify; raise `SSLWantReadError` until the client has sent its own."""
        self._feed()
        try:
            over = self._connection.shutdown() or self._connection.shutdown()
        except SSL.WantReadError:
            over = False
        except SSL.Error as error:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, _reason(error)) from error
        if not over:
            self._wait_for_more()
        self._flush()

    # ---- between the event loop's buffers and OpenSSL's

    def _feed(self) -> None:
        """Give OpenSSL the records that have come whole.

        So it has nothing left if it says that it waits for more, and `_unread` is exact from there on.
        """
        if self._incoming.pending:
            data = self._partial + self._incoming.read()
            end = _end_of_whole_records(data)
            self._partial = data[end:]
            if end:
                self._connection.bio_write(data[:end])
                self._unread += end

    def _wait_for_more(self) -> None:
        self._unread = 0
        self._flush()
        raise ssl.SSLWantReadError

    def _flush(self) -> None:
        for chunk in self._take_outgoing():
            self._outgoing.write(chunk)

    def _take_outgoing(self) -> list[bytes]:
        chunks: list[bytes] = []
        while not chunks or len(chunks[-1]) == _CHUNK:
            try:
                chunks.append(self._connection.bio_read(_CHUNK))
            except SSL.WantReadError:
                break
        return chunks


def _end_of_whole_records(data: bytes) -> int:
    """Return how many bytes the whole records at the beginning of the data have; bytes that are no records all count.

    OpenSSL has to see those at once, since its refusal is the client's answer.
    """
    end = 0
    while len(data) - end >= _HEADER_SIZE:
        length = int.from_bytes(data[end + 3 : end + _HEADER_SIZE], "big")
        if data[end] not in _CONTENT_TYPES or length > _MAX_FRAGMENT:
            return len(data)
        if len(data) - end < _HEADER_SIZE + length:
            break
        end += _HEADER_SIZE + length
    return end


def _reason(error: SSL.Error) -> str:
    """Return the reasons in an error of OpenSSL."""
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return "; ".join(entry[-1] for entry in entries) or str(error) or type(error).__name__
