"""What a ledger needs of an EVM, so that another engine can take the place of py-evm.

A state is named by its root, 32 bytes. An engine never changes one: what changes a state returns the root of another.
So past states, snapshots and calls without consequence need nothing of their own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dstack_emu.chain.transaction import AccessList


@dataclass(frozen=True, slots=True)
class Account:
    """An account in a state; `balance` is in wei."""

    balance: int
    nonce: int
    code: bytes


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The block in which code runs, as its opcodes see it.

    `ancestors` returns the hashes of earlier blocks, the latest first, at most 256. `timestamp` is in Unix seconds,
    `base_fee` in wei.
    """

    chain_id: int
    number: int
    timestamp: int
    coinbase: bytes
    gas_limit: int
    base_fee: int
    randomness: bytes
    ancestors: Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class Message:
    """What is executed: a call, or with `to` None the creation of a contract. Amounts are in wei.

    With `nonce` None it has the sender's, as in a call that nobody signed.
    """

    sender: bytes
    to: bytes | None
    data: bytes
    gas: int
    value: int = 0
    nonce: int | None = None
    max_fee: int = 0
    max_priority_fee: int = 0
    access_list: AccessList = ()


@dataclass(frozen=True, slots=True)
class Log:
    """One event: its contract, topics of 32 bytes, and data."""

    address: bytes
    topics: tuple[bytes, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an execution ended. `failure` is None if it succeeded; `reverted` if the contract itself refused.

    `root` is the state after it, `output` what it returned, the reason of a revert, or the code of a new contract.
    """

    root: bytes
    output: bytes
    gas_used: int
    logs: tuple[Log, ...] = ()
    failure: str | None = None
    reverted: bool = False


class Engine(Protocol):
    """An EVM with the rules of one fork (Prague), and the states that it has made."""

    name: str
    """Name and version, for web3_clientVersion."""

    def genesis(self, balances: Mapping[bytes, int]) -> bytes:
        """Return the root of a state in which these accounts have these balances."""

    def account(self, root: bytes, address: bytes) -> Account:
        """Return an account of a state; one that does not exist is empty."""

    def storage(self, root: bytes, address: bytes, slot: int) -> bytes:
        """Return the 32 bytes of a slot of an account."""

    def execute(self, root: bytes, around: Surroundings, message: Message) -> Outcome:
        """Execute a message, and charge its sender; raise `InvalidTransactionError` if it cannot begin."""

    def call(self, root: bytes, around: Surroundings, message: Message) -> Outcome:
        """Execute a message that costs nothing and has no consequence; `root` in the outcome is the one given.

        Raises `InvalidTransactionError` if it cannot begin.
        """

    def with_balance(self, root: bytes, address: bytes, balance: int) -> bytes:
        """Return the root of the same state, in which one account has another balance."""

    def list_root(self, items: Sequence[bytes]) -> bytes:
        """Return the root of the trie of a list, as a block's header has it of transactions and receipts."""
