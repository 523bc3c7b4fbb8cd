"""The chain itself: blocks, what is mined, time, snapshots. No JSON and no sockets.

Each transaction is mined at once, alone in its block. What changes the chain is recorded as an act before it returns,
and the same acts in the same order give the same chain.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dstack_emu.chain.acts import Act, Ahead, Balance, Forgetful, Mined, Record
from dstack_emu.chain.block import BASE_FEE, COINBASE, EMPTY_ROOT, GAS_LIMIT, Block, Receipt
from dstack_emu.chain.engine import Account, Engine, Message, Outcome, Surroundings
from dstack_emu.chain.errors import InvalidTransactionError, StoreError, UnknownStateError
from dstack_emu.chain.mining import hashed, message_of, receipt_of, require_success
from dstack_emu.chain.transaction import Transaction

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
    acts: int


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
        self._done: list[tuple[Act, _Snapshot]] = []  # each act, and what was before it
        root = engine.genesis(genesis.balances)
        first = hashed(Block(0, bytes(32), genesis.timestamp, root, (), EMPTY_ROOT, EMPTY_ROOT))
        self.blocks = [first]
        self.root = root
        self._numbers = {first.hash: 0}
        self._mined: dict[bytes, int] = {}
        try:
            for act in record.acts():
                before = self._present()
                self._apply(act)
                self._done.append((act, before))
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
        require_success(outcome)
        return outcome.output

    def estimate(self, block: Block, message: Message) -> int:
        """Return gas that suffices, at most 1.5 % above the least; raise what a message fails with if it has all gas.

        That bound is geth's (`estimateGasErrorRatio`): each step less is an execution less.
        """
        root, around = self.root_at(block), self._around(block)

        def outcome(gas: int) -> Outcome:
            return self.engine.call(root, around, replace(message, gas=gas))

        first = outcome(message.gas)
        require_success(first)
        low, high = GAS_OF_A_TRANSFER - 1, message.gas
        # Most calls need what they use; a sixty-fourth is kept from each inner call, and refunds, which are a fifth at
        # most (EIP-3529), come at the end.
        used, without_refunds = first.gas_used, first.gas_used * 5 // 4
        for guess in (used, used * 64 // 63 + 2_400, without_refunds * 64 // 63 + 2_400):
            if low < guess < high and _succeeds(outcome, guess):
                high = guess
                break
            low = max(low, guess)
        while high - low > high * 15 // 1_000:
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
        self._do(Balance(address, balance))

    def move_time(self, seconds: int) -> int:
        """Let the time of blocks be further ahead of the clock; return by how many seconds it now is."""
        self._do(Ahead(self.ahead + seconds))
        return self.ahead

    def set_time(self, moment: int) -> int:
        """Let the time of blocks be a time in Unix seconds, and go on from there; return by how many it moved."""
        moved = moment - self._clock() - self.ahead
        self.move_time(moved)
        return moved

    def snapshot(self) -> int:
        """Keep the present state; return the number of the snapshot."""
        self._last_snapshot += 1
        self._snapshots[self._last_snapshot] = self._present()
        return self._last_snapshot

    def revert(self, number: int) -> bool:
        """Return to a snapshot, which ends it and those after it; return whether it exists."""
        kept = self._snapshots.get(number)
        if kept is None:
            return False
        self._return_to(kept)
        self._snapshots = {each: value for each, value in self._snapshots.items() if each < number}
        return True

    def capture(self) -> tuple[Act, ...]:
        """Return the acts that have made the chain what it is."""
        return tuple(act for act, _ in self._done)

    def restore(self, acts: Sequence[Act]) -> None:
        """Make the chain what these acts make of it; raise `InvalidTransactionError` for those of another chain.

        The acts that have been done at the beginning are not done again.
        """
        same = 0
        while same < min(len(acts), len(self._done)) and acts[same] == self._done[same][0]:
            same += 1
        if same < len(self._done):
            self._return_to(self._done[same][1])
        for act in acts[same:]:
            self._do(act)

    def reorganise(self, count: int) -> None:
        """Replace the last blocks by as many empty ones, which are a second later; raise `UnknownStateError`.

        Their transactions are gone: nobody mines them again.
        """
        first = self.block(self.head.number - count + 1)
        times = [block.timestamp + 1 for block in self.blocks[first.number :]]
        self._return_to(next(before for _, before in reversed(self._done) if before.blocks <= first.number))
        for moment in times:
            self._do(Mined(moment, None))

    def fork(self) -> "Ledger":
        """Return a chain that begins as this one is now; nothing that is done on it is kept, told, or done here."""
        fork = copy.copy(self)
        fork.blocks, fork._numbers, fork._mined = list(self.blocks), dict(self._numbers), dict(self._mined)
        fork.on_block, fork._record, fork._snapshots, fork._done = [], Forgetful(), {}, []
        return fork

    # -- how it is done

    def _present(self) -> _Snapshot:
        return _Snapshot(len(self.blocks), self.root, self.ahead, self._record.size(), len(self._done))

    def _do(self, act: Act) -> None:
        """Do an act, and record it."""
        before = self._present()
        self._apply(act)
        self._record.add(act)
        self._done.append((act, before))

    def _return_to(self, kept: _Snapshot) -> None:
        self._record.truncate(kept.recorded)
        del self._done[kept.acts :]
        for block in self.blocks[kept.blocks :]:
            del self._numbers[block.hash]
            for receipt in block.receipts:
                del self._mined[receipt.transaction.hash]
        del self.blocks[kept.blocks :]
        self.root, self.ahead, self.next_timestamp = kept.root, kept.ahead, None
        self._snapshots = {each: value for each, value in self._snapshots.items() if value.acts <= kept.acts}

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
        before = self._present()
        block, root = self._executed(act)
        self._record.add(act)
        self._done.append((act, before))
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
            return hashed(empty), self.root
        transaction = act.transaction
        outcome = self.engine.execute(self.root, self._around(empty), message_of(transaction))
        receipt = receipt_of(transaction, outcome)
        block = replace(
            empty,
            root=outcome.root,
            receipts=(receipt,),
            transactions_root=self.engine.list_root([transaction.raw]),
            receipts_root=self.engine.list_root([receipt.encoded()]),
        )
        return hashed(block), outcome.root

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


def _succeeds(outcome: Callable[[int], Outcome], gas: int) -> bool:
    """Return whether that much gas is enough; less than a message needs to begin is not."""
    try:
        return outcome(gas).failure is None
    except InvalidTransactionError:
        return False
