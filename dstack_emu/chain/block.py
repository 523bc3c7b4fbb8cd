"""Blocks, what is mined in them, and their bytes: header, receipts, blooms.

Source: execution-specs of the fork Prague (EIP-7685 for the last field of a header).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dstack_emu.attest.keccak import keccak
from dstack_emu.chain import rlp
from dstack_emu.chain.engine import Log
from dstack_emu.chain.transaction import Transaction

BLOOM_SIZE: Final = 256
EMPTY_ROOT: Final = keccak(rlp.encode(b""))
EMPTY_UNCLES: Final = keccak(rlp.encode([]))
EMPTY_REQUESTS: Final = hashlib.sha256().digest()
COINBASE: Final = bytes(20)
GAS_LIMIT: Final = 30_000_000
BASE_FEE: Final = 1_000_000_000
"""Wei per gas, the same in every block: a transaction that was priced a while ago is still valid."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """How a transaction ended. `created` is the address of a new contract, `price` the wei paid per gas."""

    transaction: Transaction
    succeeded: bool
    gas_used: int
    price: int
    logs: tuple[Log, ...]
    created: bytes | None

    def encoded(self) -> bytes:
        """Return its encoding in the trie of receipts."""
        logs: list[rlp.Item] = [[log.address, list(log.topics), log.data] for log in self.logs]
        fields: list[rlp.Item] = [rlp.number(self.succeeded), rlp.number(self.gas_used), bloom(self.logs), logs]
        kind = self.transaction.kind
        return (bytes([kind]) if kind else b"") + rlp.encode(fields)


@dataclass(frozen=True, slots=True)
class Block:
    """A block with no transaction or one. `root` is the state after it."""

    number: int
    parent: bytes
    timestamp: int
    root: bytes
    receipts: tuple[Receipt, ...]
    transactions_root: bytes
    receipts_root: bytes
    hash: bytes = b""
    size: int = 0

    @property
    def gas_used(self) -> int:
        """The gas of all transactions."""
        return sum(receipt.gas_used for receipt in self.receipts)

    @property
    def bloom(self) -> bytes:
        """The bloom filter of all logs."""
        return bloom(log for receipt in self.receipts for log in receipt.logs)

    @property
    def randomness(self) -> bytes:
        """What the opcode PREVRANDAO reads: derived from the parent, so it can be predicted."""
        return keccak(b"randomness" + self.parent)

    def header(self) -> bytes:
        """Return the encoded header, whose hash is the block's."""
        numbers = (0, self.number, GAS_LIMIT, self.gas_used, self.timestamp)
        fields: list[rlp.Item] = [self.parent, EMPTY_UNCLES, COINBASE, self.root]
        fields += [self.transactions_root, self.receipts_root, self.bloom, *map(rlp.number, numbers), b""]
        fields += [self.randomness, bytes(8), rlp.number(BASE_FEE), EMPTY_ROOT, b"", b"", bytes(32), EMPTY_REQUESTS]
        return rlp.encode(fields)


def bloom(logs: Iterable[Log]) -> bytes:
    """Return the bloom filter of logs, 256 bytes: three bits for each address and topic."""
    bits = 0
    for log in logs:
        for value in (log.address, *log.topics):
            digest = keccak(value)
            for place in (0, 2, 4):
                bits |= 1 << (int.from_bytes(digest[place : place + 2], "big") % (8 * BLOOM_SIZE))
    return bits.to_bytes(BLOOM_SIZE, "big")
