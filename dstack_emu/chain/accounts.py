"""The development accounts of a chain: their keys follow from the seed, and are no secrets."""

from collections.abc import Callable
from typing import Final

from dstack_emu.chain.transaction import ORDER

COUNT: Final = 10
BALANCE: Final = 10_000 * 10**18
"""Wei of each account at the beginning."""

Derive = Callable[[str, int], bytes]
"""Derives so many bytes for a use that the label names."""


def private_keys(derive: Derive) -> tuple[bytes, ...]:
    """Return the private keys, 32 bytes each; the first one's account deploys and owns the contracts."""
    return tuple(_key(derive(f"chain account {number}", 48)) for number in range(COUNT))


def _key(uniform: bytes) -> bytes:
    """Return a key below the order of the curve, and not 0, from 48 uniform bytes."""
    return (int.from_bytes(uniform, "big") % (ORDER - 1) + 1).to_bytes(32, "big")
