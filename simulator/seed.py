"""The seed: one text from which every secret and every random byte of the emulated platforms is derived.

Each use has its own label, so a new use does not change existing bytes. Deliberately weak: the seed is not a secret.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from dstack_emu.attest.kdf import p256_from_uniform

Entropy = Callable[[int], bytes]
"""A source of random bytes: `os.urandom`, or a stream of a seed."""

DEFAULT_SEED = "dstack-emu"


@dataclass(frozen=True, slots=True)
class Seed:
    """32 bytes of keying material, derived from a text."""

    material: bytes

    @classmethod
    def of(cls, text: str) -> Self:
        """Make a seed from any text."""
        return cls(hashlib.sha256(b"dstack-emu seed:" + text.encode()).digest())

    def derive(self, label: str, size: int) -> bytes:
        """Derive `size` bytes (at most 8,160) for one use."""
        return HKDFExpand(hashes.SHA256(), size, label.encode()).derive(self.material)

    def p256(self, label: str) -> ec.EllipticCurvePrivateKey:
        """Derive a P-256 key."""
        return p256_from_uniform(self.derive(label, 48))

    def child(self, label: str) -> "Seed":
        """Derive a seed for a part that has several uses."""
        return Seed(self.derive(label, 32))

    def stream(self, label: str) -> "Stream":
        """Make a source of bytes with the same sequence in every process."""
        return Stream(self.derive(label, 32))


class Stream:
    """An `Entropy` that returns each byte of its sequence once; its state is the number of bytes returned."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._position = 0

    def __call__(self, size: int) -> bytes:
        block, skip = divmod(self._position, 64)
        data = b""
        while len(data) < skip + size:
            data += hashlib.sha512(self._key + block.to_bytes(8, "big")).digest()
            block += 1
        self._position += size
        return data[skip : skip + size]

    def capture(self) -> int:
        """Return the number of bytes that were returned."""
        return self._position

    def restore(self, position: int) -> None:
        """Continue after the first `position` bytes of the sequence."""
        self._position = position
