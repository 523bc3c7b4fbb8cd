"""Keys of the guest API v1: derivation from the app's k256 key, and the claim that the app key signs for each.

    LP(x)  = length of x as 4 bytes, big-endian, then x
    key    = HKDF-SHA256(salt "dstack-guest-v1", the app's k256 key,
                         info LP("dstack-guest-v1-key") LP(algorithm) LP(domain)), 32 bytes
    claim  = LP("dstack-guest-v1-key-claim") LP(algorithm) LP(domain) LP(public key)
    link 0 = recoverable signature by the app's k256 key over keccak256(claim)
    link 1 = the KMS's signature over the app's key

Derivation is flat and each algorithm has keys of its own, unlike in v0 (`attest.kdf`). A chain proves that the holder
of the app key made the claim; whose app key it is, only link 1 says.

Source: dstack `guest-agent/src/rpc_service_v1/keys.rs` at 0fcd31cd; vectors of `sdk/rust/tests/test_client_v1.rs` at
147e39c8.
"""

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.signature import k256_key, k256_point, recover, sign_recoverable

SALT: Final = b"dstack-guest-v1"
KEY_LABEL: Final = b"dstack-guest-v1-key"
CLAIM_LABEL: Final = b"dstack-guest-v1-key-claim"
SECP256K1: Final = "secp256k1"
ED25519: Final = "ed25519"
KEY_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class GuestKey:
    """A derived key of 32 bytes, and its public key: 33 bytes (SEC1, compressed) for secp256k1, 32 for ed25519."""

    algorithm: str
    domain: str
    key: bytes
    public_key: bytes

    @property
    def claim(self) -> bytes:
        """Return what the app key signs to vouch for this key."""
        return key_claim(self.algorithm, self.domain, self.public_key)


def derive_guest_key(app_key: bytes, algorithm: str, domain: str) -> GuestKey:
    """Derive the key of an app (its k256 key, 32 bytes) for an algorithm and a domain; any text is a domain.

    Raises `FormatError` with upstream's words if the algorithm is neither `secp256k1` nor `ed25519`, or if the derived
    bytes are no scalar.
    """
    check_algorithm(algorithm)
    info = _with_lengths(KEY_LABEL, algorithm.encode(), domain.encode())
    key = HKDF(algorithm=hashes.SHA256(), length=KEY_SIZE, salt=SALT, info=info).derive(app_key)
    return GuestKey(algorithm, domain, key, _public_key(algorithm, key))


def check_algorithm(algorithm: str) -> None:
    """Raise `FormatError`, in upstream's words, unless the algorithm is one of the two, spelled exactly."""
    if not algorithm:
        raise FormatError(f"algorithm is required, use `{SECP256K1}` or `{ED25519}`")
    if algorithm not in (SECP256K1, ED25519):
        raise FormatError(f"unsupported algorithm `{algorithm}`, use `{SECP256K1}` or `{ED25519}`")


def key_claim(algorithm: str, domain: str, public_key: bytes) -> bytes:
    """Return the claim that a public key is the app's for this algorithm and domain."""
    return _with_lengths(CLAIM_LABEL, algorithm.encode(), domain.encode(), public_key)


def sign_claim(app_key: bytes, guest_key: GuestKey) -> bytes:
    """Sign a key's claim with the app's k256 key: link 0 of its chain, 65 bytes (r, s, recovery id).

    Raises `FormatError` if the app key is no scalar.
    """
    try:
        signer = k256_key(app_key)
    except FormatError as error:
        raise FormatError("the app root k256 key is not a valid secp256k1 scalar") from error
    return sign_recoverable(signer, guest_key.claim)


def recover_claim_signer(link: bytes, algorithm: str, domain: str, public_key: bytes) -> bytes:
    """Recover the app key (33 bytes, SEC1 compressed) that signed link 0 for a public key.

    That it is the app's is for link 1 to prove. Raises `FormatError` or `VerificationError` if no key recovers.
    """
    return recover(link, key_claim(algorithm, domain, public_key))


def _public_key(algorithm: str, key: bytes) -> bytes:
    if algorithm == ED25519:
        return Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()
    try:
        return k256_point(key)
    except FormatError as error:
        raise FormatError("derived secp256k1 key is not a valid scalar") from error


def _with_lengths(*items: bytes) -> bytes:
    """Join items, each after its length as 4 bytes, big-endian."""
    return b"".join(len(item).to_bytes(4, "big") + item for item in items)
