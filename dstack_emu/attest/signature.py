"""Recoverable secp256k1 signatures over Keccak-256, as dstack's KMS and agents make them.

65 bytes: r, s (low), recovery id 0 or 1; nonces by RFC 6979 with SHA-256. Source: dstack `kms/src/crypto.rs` and
`guest-agent/src/rpc_service.rs` at 312dc605.
"""

import hashlib
from typing import Final

from coincurve import PrivateKey, PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.keccak import keccak

KMS_ISSUED: Final = b"dstack-kms-issued"
ENV_ENCRYPT_PUBKEY: Final = b"dstack-env-encrypt-pubkey"
K256_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
"""Order of the group of secp256k1 (SEC 2)."""


def k256_key(secret: bytes, what: str = "secp256k1 key") -> PrivateKey:
    """Load a secp256k1 private key from its 32-byte scalar; raise `FormatError` when it is out of range."""
    if len(secret) != 32:
        raise FormatError(f"{what}: 32 bytes expected, got {len(secret)}")
    try:
        return PrivateKey(secret)
    except ValueError as error:
        raise FormatError(f"{what}: a scalar below the group order and not zero expected") from error


def k256_point(secret: bytes, what: str = "secp256k1 key") -> bytes:
    """Give the public key of a 32-byte scalar: the compressed point, 33 bytes. Half as dear as a `k256_key`."""
    if len(secret) != 32:
        raise FormatError(f"{what}: 32 bytes expected, got {len(secret)}")
    try:
        return PublicKey.from_secret(secret).format()
    except ValueError as error:
        raise FormatError(f"{what}: a scalar below the group order and not zero expected") from error


def sign_recoverable(key: PrivateKey, message: bytes) -> bytes:
    """Sign keccak(message): 65 bytes r, s, recovery id."""
    return key.sign_recoverable(keccak(message), hasher=None)


def recover(signature: bytes, message: bytes) -> bytes:
    """Recover the signer of keccak(message) as a 33-byte compressed SEC1 point.

    Success proves that the holder of the returned key signed this message; whose key it is, the caller must know.
    """
    if len(signature) != 65:
        raise FormatError(f"recoverable signature: 65 bytes expected, got {len(signature)}")
    try:
        return PublicKey.from_signature_and_message(signature, keccak(message), hasher=None).format()
    except Exception as error:  # coincurve raises bare Exception where libsecp256k1 finds no point
        raise VerificationError(f"recoverable signature: no key recovers ({error})") from error


def k256_sign(key: PrivateKey, data: bytes, *, prehashed: bool = False) -> bytes:
    """Sign SHA-256 of data, or a 32-byte digest as it is: 64 bytes r, s (low), no recovery id."""
    return key.sign_recoverable(data, hasher=None if prehashed else _sha256)[:64]


def k256_verify(public_key: bytes, signature: bytes, data: bytes, *, prehashed: bool = False) -> bool:
    """Check a 64-byte signature by a SEC1 point; a high s is no signature.

    Raises `FormatError("signature error")`, upstream's words, for bytes that are no key or no signature at all.
    """
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if len(signature) != 64 or not 0 < r < K256_ORDER or not 0 < s < K256_ORDER:
        raise FormatError("signature error")
    try:
        key = PublicKey(public_key)
    except ValueError as error:
        raise FormatError("signature error") from error
    digest = _as_scalar_bytes(data) if prehashed else _sha256(data)
    return digest is not None and key.verify(encode_dss_signature(r, s), digest, hasher=None)


def _as_scalar_bytes(digest: bytes) -> bytes | None:
    """Return a digest as RustCrypto's ecdsa reads it: none below 16 bytes, else padded left or cut to 32."""
    return None if len(digest) < 16 else digest[:32].rjust(32, b"\0")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def app_key_message(app_id: bytes, public_key: bytes) -> bytes:
    """Return what the root k256 key signs for an app's key: prefix, `:`, app id, compressed public key (33 bytes)."""
    return KMS_ISSUED + b":" + app_id + public_key


def env_key_message(app_id: bytes, public_key: bytes, timestamp: int | None = None) -> bytes:
    """Return what the root k256 key signs for an app's X25519 env key.

    `signature_v1` puts the time as a big-endian u64 after the app id.
    """
    stamp = b"" if timestamp is None else timestamp.to_bytes(8, "big")
    return ENV_ENCRYPT_PUBKEY + b":" + app_id + stamp + public_key
