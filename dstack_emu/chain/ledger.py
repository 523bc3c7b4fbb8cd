"""The chain itself: blocks, what is mined, time, snapshots. No JSON and no sockets.

Each transaction is mined at once, alone in its block. What changes the chain is recorded as an act before it returns,
and the same acts in the same order give the same chain.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from dstack_emu.attest.keccak import keccak
from dstack_emu.chain.acts import Act, Ahead, Balance, Mined, Record
from dstack_emu.chain.block import BASE_FEE, COINBASE, EMPTY_ROOT, GAS_LIMIT, Block, Receipt
from dstack_emu.chain.engine import Account, Engine, Message, Outcome, Surroundings
from dstack_emu.chain.errors import (
    ExecutionFailedError,
    ExecutionRevertedError,
    InvalidTransactionError,
    StoreError,
    UnknownStateError,
)
from dstack_emu.chain.revert import revert_message
from dstack_emu.chain.transaction import Transaction, created_address

ANCESTORS: Final = 256
GAS_OF_A_TRANSFER: Final = 21_000
MAX_EMPTY_BLOCKS: Final = 10_000
"""How many empty blocks one request may mine."""


@dataclass(frozen=True, slots=True)
class Genesis:
    """With what a chain begins: its id, its first time in Unix seconds, and balances in wei."""

    chain_id: int
    timestamp: int
    balances: Mapping[bytes, int]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    blocks: int
    root: bytes
    ahead: int
    recorded: int


class Ledger:
    """A chain in memory. `clock` returns Unix seconds: the time of the next block, unless a later one was set.

    `record` keeps what changes it; `on_block` is called with each new block. It is not safe to use from two threads at
    once.
    """

    def __init__(self, genesis: Genesis, engine: Engine, clock: Callable[[], int], record: Record) -> None:
        self.genesis, self.engine = genesis, engine
        self.on_block: list[Callable[[Block], None]] = []
        self.ahead = 0
        self.next_timestamp: int | None = None
        self._clock, self._record = clock, record
        self._snapshots: dict[int, _Snapshot] = {}
        self._last_snapshot = 0
        root = engine.genesis(genesis.balances)
        first = _hashed(Block(0, bytes(32), genesis.timestamp, root, (), EMPTY_ROOT, EMPTY_ROOT))
        self.blocks = [first]
        self.root = root
        self._numbers = {first.hash: 0}
        self._mined: dict[bytes, int] = {}
        try:
            for act in record.acts():
                self._apply(act)
        except InvalidTransactionError as error:
            raise StoreError(f"the kept state does not fit this chain: {error}; remove it") from error

    # -- reading

    @property
    def head(self) -> Block:
        """The latest block."""
        return self.blocks[-1]

    def block(self, number: int) -> Block:
        """Return a block by its number; raise `UnknownStateError`."""
        if not 0 <= number < len(self.blocks):
            raise UnknownStateError(f"block {number} does not exist: the latest is {self.head.number}")
        return self.blocks[number]

    def find_block(self, hash_: bytes) -> Block | None:
        """Return a block by its hash."""
        number = self._numbers.get(hash_)
        return None if number is None else self.blocks[number]

    def find_receipt(self, transaction_hash: bytes) -> tuple[Block, Receipt] | None:
        """Return a receipt and its block by the hash of the transaction."""
        number = self._mined.get(transaction_hash)
        return None if number is None else (self.blocks[number], self.blocks[number].receipts[0])

    def root_at(self, block: Block) -> bytes:
        """Return the state after a block; that of the latest also has balances that were set since."""
        return self.root if block is self.head else block.root

    def account(self, block: Block, address: bytes) -> Account:
        """Return an account after a block."""
        return self.engine.account(self.root_at(block), address)

    # -- executing without consequence

    def call(self, block: Block, message: Message) -> bytes:
        """Execute a call in the state after a block; return its output, or raise what it failed with."""
        outcome = self.engine.call(self.root_at(block), self._around(block), message)
        _require_success(outcome)
        return outcome.output

    def estimate(self, block: Block, message: Message) -> int:
        """Return the least gas with which a message succeeds; raise what it fails with if it has all gas."""
        root, around = self.root_at(block), self._around(block)

        def outcome(gas: int) -> Outcome:
            return self.engine.call(root, around, replace(message, gas=gas))

        first = outcome(message.gas)
        _require_success(first)
        low, high = GAS_OF_A_TRANSFER - 1, message.gas
        # Most calls need what they use; a sixty-fourth is kept from each inner call, and refunds come at the end.
        for guess in (first.gas_used, first.gas_used * 64 // 63 + 2_400):
            if low < guess < high and _succeeds(outcome, guess):
                high = guess
                break
            low = max(low, guess)
        while high - low > max(1, high // 1_000):
            middle = (low + high) // 2
            if _succeeds(outcome, middle):
                high = middle
            else:
                low = middle
        return high

    # -- changing

    def send(self, transaction: Transaction) -> Receipt:
        """Mine a transaction in a block of its own; raise `InvalidTransactionError` if it cannot be mined."""
        if transaction.chain_id not in (None, self.genesis.chain_id):
            raise InvalidTransactionError(
                f"chain id {self.genesis.chain_id} expected, got {transaction.chain_id}: signed for another chain"
            )
        if transaction.gas > GAS_LIMIT:
            raise InvalidTransactionError(f"exceeds block gas limit: at most {GAS_LIMIT} gas, got {transaction.gas}")
        if transaction.max_fee < BASE_FEE:
            raise InvalidTransactionError(
                f"max fee per gas less than block base fee: at least {BASE_FEE} wei, got {transaction.max_fee}"
            )
        if transaction.max_priority_fee > transaction.max_fee:
            raise InvalidTransactionError("max priority fee per gas higher than max fee per gas")
        self._require_nonce_and_balance(transaction)
        return self._commit(Mined(self._next_time(), transaction)).receipts[0]

    def mine(self, count: int = 1, interval: int = 1) -> None:
        """Mine empty blocks, `interval` seconds apart."""
        for place in range(count):
            self._commit(Mined(self._next_time() if not place else self.head.timestamp + interval, None))

    def set_balance(self, address: bytes, balance: int) -> None:
        """Set the balance of an account in wei, without a block."""
        self._record.add(Balance(address, balance))
        self._apply(Balance(address, balance))

    def move_time(self, seconds: int) -> int:
        """Let the time of blocks be further ahead of the clock; return by how many seconds it now is."""
        self._record.add(Ahead(self.ahead + seconds))
        self.ahead += seconds
        return self.ahead

    def set_time(self, moment: int) -> int:
        """Let the time of blocks be a time in Unix seconds, and go on from there; return by how many it moved."""
        moved = moment - self._clock() - self.ahead
        self.move_time(moved)
        return moved

    def snapshot(self) -> int:
        """Keep the present state; return the number of the snapshot."""
        self._last_snapshot += 1
        kept = _Snapshot(len(self.blocks), self.root, self.ahead, self._record.size())
        self._snapshots[self._last_snapshot] = kept
        return self._last_snapshot

    def revert(self, number: int) -> bool:
        """Return to a snapshot, which ends it and those after it; return whether it exists."""
        kept = self._snapshots.get(number)
        if kept is None:
            return False
        self._record.truncate(kept.recorded)
        for block in self.blocks[kept.blocks :]:
            del self._numbers[block.hash]
            for receipt in block.receipts:
                del self._mined[receipt.transaction.hash]
        del self.blocks[kept.blocks :]
        self.root, self.ahead, self.next_timestamp = kept.root, kept.ahead, None
        self._snapshots = {each: value for each, value in self._snapshots.items() if each < number}
        return True

    # -- how it is done

    def _next_time(self) -> int:
        if self.next_timestamp is None:
            return max(self._clock() + self.ahead, self.head.timestamp + 1)
        moment, self.next_timestamp = self.next_timestamp, None
        self.set_time(moment)
        return moment

    def _require_nonce_and_balance(self, transaction: Transaction) -> None:
        account = self.engine.account(self.root, transaction.sender)
        if transaction.nonce != account.nonce:
            kind = "low" if transaction.nonce < account.nonce else "high"
            raise InvalidTransactionError(
                f"nonce too {kind}: {account.nonce} expected, got {transaction.nonce}; none waits for an earlier one"
            )
        cost = transaction.gas * transaction.max_fee + transaction.value
        if account.balance < cost:
            raise InvalidTransactionError(
                f"insufficient funds for gas * price + value: {cost} wei needed, the account has {account.balance}"
            )

    def _commit(self, act: Mined) -> Block:
        block, root = self._executed(act)
        self._record.add(act)
        self._append(block, root)
        for notify in self.on_block:
            notify(block)
        return block

    def _apply(self, act: Act) -> None:
        """Do again what was recorded."""
        match act:
            case Mined():
                self._append(*self._executed(act))
            case Balance(address, balance):
                self.root = self.engine.with_balance(self.root, address, balance)
            case Ahead(seconds):
                self.ahead = seconds

    def _executed(self, act: Mined) -> tuple[Block, bytes]:
        """Return the block that an act makes, and the state after it."""
        number, parent = self.head.number + 1, self.head.hash
        empty = Block(number, parent, act.timestamp, self.root, (), EMPTY_ROOT, EMPTY_ROOT)
        if act.transaction is None:
            return _hashed(empty), self.root
        transaction = act.transaction
        outcome = self.engine.execute(self.root, self._around(empty), _message(transaction))
        receipt = _receipt(transaction, outcome)
        block = replace(
            empty,
            root=outcome.root,
            receipts=(receipt,),
            transactions_root=self.engine.list_root([transaction.raw]),
            receipts_root=self.engine.list_root([receipt.encoded()]),
        )
        return _hashed(block), outcome.root

    def _append(self, block: Block, root: bytes) -> None:
        self.blocks.append(block)
        self.root = root
        self._numbers[block.hash] = block.number
        for receipt in block.receipts:
            self._mined[receipt.transaction.hash] = block.number

    def _around(self, block: Block) -> Surroundings:
        def ancestors() -> Iterator[bytes]:
            for number in range(block.number - 1, max(block.number - 1 - ANCESTORS, -1), -1):
                yield self.blocks[number].hash

        return Surroundings(
            self.genesis.chain_id,
            block.number,
            block.timestamp,
            COINBASE,
            GAS_LIMIT,
            BASE_FEE,
            block.randomness,
            ancestors,
        )


def _message(transaction: Transaction) -> Message:
    return Message(
        transaction.sender,
        transaction.to,
        transaction.data,
        transaction.gas,
        transaction.value,
        transaction.nonce,
        transaction.max_fee,
        transaction.max_priority_fee,
        transaction.access_list,
    )


def _receipt(transaction: Transaction, outcome: Outcome) -> Receipt:
    price = min(transaction.max_fee, BASE_FEE + transaction.max_priority_fee)
    created = created_address(transaction.sender, transaction.nonce) if transaction.to is None else None
    return Receipt(transaction, outcome.failure is None, outcome.gas_used, price, outcome.logs, created)


def _hashed(block: Block) -> Block:
    header = block.header()
    return replace(block, hash=keccak(header), size=len(header))


def _succeeds(outcome: Callable[[int], Outcome], gas: int) -> bool:
    """Return whether that much gas is enough; less than a message needs to begin is not."""
    try:
        return outcome(gas).failure is None
    except InvalidTransactionError:
        return False


def _require_success(outcome: Outcome) -> None:
    if outcome.reverted:
        raise ExecutionRevertedError(revert_message(outcome.output), outcome.output)
    if outcome.failure is not None:
        raise ExecutionFailedError(outcome.failure)
