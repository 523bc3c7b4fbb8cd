"""The TLS record that ends a server's handshake with the alert handshake_failure.

OpenSSL derives its alert from its own reason to refuse a certificate, and pyOpenSSL cannot set another reason.
Therefore this record replaces OpenSSL's. It is the first record under the keys that apply once the client's certificate
has arrived: no encryption in TLS 1.2, the server's application traffic keys in TLS 1.3 (without early data).

Not here: any other alert, and a second record under the same keys.
Source: RFC 8446, sections 5.2, 6, 7.1, 7.3 and B.4; RFC 5246, section 7.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

ALERT: Final = bytes([2, 40])
"""Level fatal, description handshake_failure."""

_TYPE_ALERT: Final = b"\x15"
_TYPE_APPLICATION_DATA: Final = b"\x17"
_LEGACY_VERSION: Final = b"\x03\x03"
_TAG_SIZE: Final = 16
_IV_SIZE: Final = 12


@dataclass(frozen=True, slots=True)
class _Suite:
    hash: hashes.HashAlgorithm
    aead: Callable[[bytes], AESGCM | ChaCha20Poly1305]
    key_size: int


_SUITES: Final = {
    "TLS_AES_128_GCM_SHA256": _Suite(hashes.SHA256(), AESGCM, 16),
    "TLS_AES_256_GCM_SHA384": _Suite(hashes.SHA384(), AESGCM, 32),
    "TLS_CHACHA20_POLY1305_SHA256": _Suite(hashes.SHA256(), ChaCha20Poly1305, 32),
}


def plain_record() -> bytes:
    """Return the alert of a TLS 1.2 server, which is sent before its ChangeCipherSpec."""
    return _record(_TYPE_ALERT, ALERT)


def protected_record(suite_name: str, traffic_secret: bytes) -> bytes:
    """Return the alert as the first record under a TLS 1.3 server's application traffic secret.

    `suite_name` is one of the suites in `_SUITES`, those of RFC 8446 for general use.
    """
    suite = _SUITES[suite_name]
    key = _expand_label(suite, traffic_secret, b"key", suite.key_size)
    iv = _expand_label(suite, traffic_secret, b"iv", _IV_SIZE)  # record 0: the nonce is the iv itself
    inner = ALERT + _TYPE_ALERT
    header = _header(_TYPE_APPLICATION_DATA, len(inner) + _TAG_SIZE)
    return header + suite.aead(key).encrypt(iv, inner, header)


def _expand_label(suite: _Suite, secret: bytes, label: bytes, size: int) -> bytes:
    """Compute HKDF-Expand-Label of RFC 8446 with an empty context."""
    full = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0"
    return HKDFExpand(suite.hash, size, info).derive(secret)


def _record(kind: bytes, content: bytes) -> bytes:
    return _header(kind, len(content)) + content


def _header(kind: bytes, size: int) -> bytes:
    return kind + _LEGACY_VERSION + size.to_bytes(2, "big")
