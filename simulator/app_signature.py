"""The algorithms with which an app signs by its agent: secp256k1, over data or a digest, and ed25519.

Source: dstack `guest-agent/src/rpc_service.rs` at 312dc605.
"""

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.proto import dstack_guest_pb2 as pb
from dstack_emu.attest.signature import k256_key, k256_sign, k256_verify

PREHASHED: Final = "secp256k1_prehashed"


def known_algorithm(algorithm: str, known: tuple[str, ...]) -> str:
    """Resolve the alias `k256`; raise `FormatError` for an algorithm that is not among the known ones."""
    algorithm = "secp256k1" if algorithm == "k256" else algorithm
    if algorithm not in known:
        raise FormatError("Unsupported algorithm")
    return algorithm


def sign(algorithm: str, key: bytes, data: bytes) -> bytes:
    """Sign with a key of 32 bytes; for `secp256k1_prehashed` the data is a digest of 32 bytes."""
    if algorithm == "ed25519":
        return ed25519.Ed25519PrivateKey.from_private_bytes(key).sign(data)
    return k256_sign(k256_key(key), data, prehashed=algorithm == PREHASHED)


def verify(algorithm: str, request: pb.VerifyRequest) -> bool:
    """Return whether a signature is valid; raise `FormatError` for bytes that are no key or no signature."""
    if algorithm == "ed25519":
        return _verify_ed25519(request)
    return k256_verify(request.public_key, request.signature, request.data, prehashed=algorithm == PREHASHED)


def _verify_ed25519(request: pb.VerifyRequest) -> bool:
    if len(request.public_key) != 32:
        raise FormatError("invalid public key")
    if len(request.signature) != 64:
        raise FormatError("signature error")
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(request.public_key).verify(request.signature, request.data)
    except (InvalidSignature, ValueError):
        return False
    return True
