"""report_data, 64 bytes in a quote: a hash of a tag and some content.

Source: dstack `dstack-attest/src/attestation.rs:540` (`to_report_data_with_hash`) and `kms/src/onboard_service.rs:730`
(the bootstrap binding) at 312dc605.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.keccak import keccak

SIZE: Final = 64
RATLS_CERT: Final = "ratls-cert"
KMS_ROOT_CA: Final = "kms-root-ca"
APP_DATA: Final = "app-data"
DEFAULT_HASH: Final = "sha512"

HASHES: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "sha384": lambda data: hashlib.sha384(data).digest(),
    "sha512": lambda data: hashlib.sha512(data).digest(),
    "sha3-256": lambda data: hashlib.sha3_256(data).digest(),
    "sha3-384": lambda data: hashlib.sha3_384(data).digest(),
    "sha3-512": lambda data: hashlib.sha3_512(data).digest(),
    "keccak256": keccak,
    "keccak384": lambda data: keccak(data, 384),
    "keccak512": lambda data: keccak(data, 512),
}


def report_data(tag: str, content: bytes, hash_algorithm: str = "") -> bytes:
    """Hash `tag:content` and pad with zeros on the right to 64 bytes; `raw` takes exactly 64 bytes as they are.

    The empty algorithm is sha512. Raises `FormatError` with upstream's words for another algorithm or length.
    """
    algorithm = hash_algorithm or DEFAULT_HASH
    if algorithm == "raw":
        if len(content) != SIZE:
            raise FormatError("invalid content length")
        return content
    hash_function = HASHES.get(algorithm)
    if hash_function is None:
        raise FormatError("invalid hash algorithm")
    return hash_function(tag.encode() + b":" + content).ljust(SIZE, b"\0")


def ratls_report_data(spki: bytes) -> bytes:
    """Bind evidence to a TLS key: the content is the key's SubjectPublicKeyInfo in DER."""
    return report_data(RATLS_CERT, spki)


def pad_report_data(data: bytes) -> bytes:
    """Pad up to 64 bytes a caller gave with zeros on the right."""
    if len(data) > SIZE:
        raise FormatError("Report data is too long")
    return data.ljust(SIZE, b"\0")


def bootstrap_report_data(ca_pubkey: bytes, k256_pubkey: bytes) -> bytes:
    """Bind a bootstrap attestation to the new root keys: SPKI DER of the CA, compressed k256 point.

    Keccak-256 over a text, then 32 zero bytes. The misspelling in the text is part of the protocol.
    """
    text = f"dstack-kms-genereted-keys-v1:{ca_pubkey.hex()};{k256_pubkey.hex()};"
    return keccak(text.encode()).ljust(SIZE, b"\0")
