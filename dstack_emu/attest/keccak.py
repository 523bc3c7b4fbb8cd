"""The original Keccak, as Ethereum has it (not FIPS 202's SHA-3)."""

from typing import Literal


def keccak(data: bytes, bits: Literal[256, 384, 512] = 256) -> bytes:
    """Hash to 32, 48 or 64 bytes."""
    # Imported here: with its cffi it takes as long as a tenth of an agent's whole start, which hashes nothing so.
    from Crypto.Hash import keccak as implementation

    return implementation.new(digest_bits=bits, data=data).digest()
