"""Key derivation from the KMS root keys, bit for bit.

Source: dstack `ra-tls/src/kdf.rs` and `kms/src/crypto.rs` at 312dc605. Keys are derived here;
`kms_emu.gate` decides who receives them.
"""

import hashlib

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from dstack_emu.attest.errors import FormatError

SALT = b"RATLS"
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""The order of the group of NIST P-256 (FIPS 186-5): a scalar is less than it and not zero."""


def derive_key(material: bytes, context: list[bytes], size: int = 32) -> bytes:
    """Derive `size` bytes by HKDF-SHA256 with salt `RATLS`; info is the concatenation of the context items.

    As upstream, the items are not separated: [`a`, `bc`] and [`ab`, `c`] give the same bytes.
    """
    return HKDF(algorithm=hashes.SHA256(), length=size, salt=SALT, info=b"".join(context)).derive(material)


def p256_key(scalar: bytes) -> ec.EllipticCurvePrivateKey:
    """Make a P-256 private key from a scalar, 32 bytes, big-endian.

    Raises `FormatError` if it is zero or not less than the order.
    """
    value = int.from_bytes(scalar, "big")
    if len(scalar) != 32 or not 0 < value < P256_ORDER:
        raise FormatError(
            f"P-256 scalar: 32 bytes below the group order expected, got {len(scalar)} bytes out of range"
        )
    return ec.derive_private_key(value, ec.SECP256R1())


def p256_from_uniform(data: bytes) -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key from 48 uniform bytes, reduced modulo the order: the bias is negligible (FIPS 186-5 A.2.1)."""
    return ec.derive_private_key(int.from_bytes(data, "big") % (P256_ORDER - 1) + 1, ec.SECP256R1())


def p256_scalar(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the scalar of a P-256 key, 32 bytes, big-endian."""
    return key.private_numbers().private_value.to_bytes(32, "big")


def derive_p256(material: bytes, context: list[bytes]) -> ec.EllipticCurvePrivateKey:
    """Derive a P-256 child: the 32 derived bytes are its scalar. `material` is a parent's scalar, or a seed."""
    return p256_key(derive_key(material, context))


def derive_dh_secret(parent: ec.EllipticCurvePrivateKey | bytes, context: list[bytes]) -> bytes:
    """Derive 32 secret bytes: SHA-256 over the PKCS#8 DER of the P-256 child, public key included.

    That encoding is part of the protocol: 138 bytes, no curve parameters in the inner ECPrivateKey. `parent` is the
    P-256 key, or its scalar.
    """
    scalar = parent if isinstance(parent, bytes) else p256_scalar(parent)
    return hashlib.sha256(pkcs8_der(derive_p256(scalar, context))).digest()


def pkcs8_der(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Serialise a private key as PKCS#8 DER."""
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def pkcs8_pem(key: ec.EllipticCurvePrivateKey) -> str:
    r"""Serialise a private key as PKCS#8 PEM with `\n` line ends."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def load_p256_pem(pem: str, what: str) -> ec.EllipticCurvePrivateKey:
    """Load a P-256 private key from PEM; raise `FormatError`, which names `what`."""
    try:
        key = load_pem_private_key(pem.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError(f"{what}: PEM private key expected ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FormatError(f"{what}: P-256 private key expected, got {type(key).__name__}")
    return key
