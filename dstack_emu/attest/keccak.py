"""The original Keccak, which Ethereum uses; it is not SHA-3 of FIPS 202."""

from typing import Literal


def keccak(data: bytes, bits: Literal[256, 384, 512] = 256) -> bytes:
    """Return the hash of `bits` bits: 32, 48 or 64 bytes."""
    # Imported here, because with cffi it takes a tenth of the start of an agent, which does not use it.
    from Crypto.Hash import keccak as implementation

    return implementation.new(digest_bits=bits, data=data).digest()
