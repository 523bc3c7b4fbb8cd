"""The engine of py-evm, in Python alone. Import it only if a chain runs: the extra `eth` installs what it needs.

Source of the fork's rules: py-evm 0.12.1b1, `eth/vm/forks/prague`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Final, cast

from eth.abc import ComputationAPI, SignedTransactionAPI
from eth.constants import BLANK_ROOT_HASH
from eth.db.atomic import AtomicDB
from eth.exceptions import Revert
from eth.vm.execution_context import ExecutionContext
from eth.vm.forks.prague import PragueVM
from eth.vm.forks.prague.state import PragueState
from eth.vm.forks.prague.transactions import PragueTransactionBuilder
from eth.vm.spoof import SpoofTransaction
from eth_typing import Address, BlockNumber, Hash32
from eth_utils.exceptions import ValidationError
from trie.hexary import HexaryTrie

from dstack_emu.attest.cache import BoundedCache
from dstack_emu.chain import rlp
from dstack_emu.chain.engine import Account, Log, Message, Outcome, Surroundings
from dstack_emu.chain.errors import InvalidTransactionError

ANYWHERE: Final = Surroundings(1, 0, 0, bytes(20), 0, 0, bytes(32), tuple)
"""For reading a state: no code runs."""
RECURSION_LIMIT: Final = 1024 * 12
"""Frames of Python: what py-evm needs for calls that are nested as deeply as the EVM lets them.

py-evm imports py_ecc, which sets 100,000 for the whole process. At that depth, C code such as the parser of JSON
overflows the stack, which ends the process; at this one it does not.
"""
sys.setrecursionlimit(RECURSION_LIMIT)
MAX_OUTCOMES: Final = 256
MAX_OUTCOMES_SIZE: Final = 1024 * 1024
"""What is kept of calls: how many outcomes, and bytes of their data and outputs."""
CREATION: Final = b""
"""py-evm's address of a transaction that creates a contract."""


class PyEvm:
    """An `Engine`; every state stays in memory.

    What a call returns follows from state, block and message alone, so that its outcome is kept for the same call. The
    state object of the last call is used again for another one in the same state and block: what it has read of the
    tries takes a third of a call's time. Each call leaves it as it was. `ancestors` are no part of a block's identity
    here: they follow from its `randomness`, which a ledger derives from the parent.
    """

    name = f"py-evm/v{version('py-evm')}"

    def __init__(self) -> None:
        self._db = AtomicDB()
        self._last: tuple[object, PragueState] | None = None
        self._outcomes = BoundedCache[object, Outcome](MAX_OUTCOMES, MAX_OUTCOMES_SIZE)

    def genesis(self, balances: Mapping[bytes, int]) -> bytes:
        """Return the root of a state in which these accounts have these balances."""
        state = self._state(BLANK_ROOT_HASH, ANYWHERE)
        for address, balance in balances.items():
            state.set_balance(Address(address), balance)
        return _kept(state)

    def with_balance(self, root: bytes, address: bytes, balance: int) -> bytes:
        """Return the root of the same state, in which one account has another balance."""
        state = self._state(root, ANYWHERE)
        state.set_balance(Address(address), balance)
        return _kept(state)

    def account(self, root: bytes, address: bytes) -> Account:
        """Return an account of a state."""
        state, of = self._state(root, ANYWHERE), Address(address)
        return Account(state.get_balance(of), state.get_nonce(of), state.get_code(of))

    def storage(self, root: bytes, address: bytes, slot: int) -> bytes:
        """Return the 32 bytes of a slot."""
        return self._state(root, ANYWHERE).get_storage(Address(address), slot).to_bytes(32, "big")

    def execute(self, root: bytes, around: Surroundings, message: Message) -> Outcome:
        """Execute a message, and charge its sender."""
        state = self._state(root, around)
        computation, gas_used = _run(state, around, message)
        return _outcome(_kept(state), computation, gas_used)

    def call(self, root: bytes, around: Surroundings, message: Message) -> Outcome:
        """Execute a message that costs nothing and has no consequence."""
        # Without a price it must not fail for being below the base fee, and BASEFEE is then 0, as in other nodes.
        free = around if message.max_fee else replace(around, base_fee=0)
        place = (root, replace(free, ancestors=tuple))
        known = self._outcomes.get((place, message))
        if known is None:
            known = self._called(place, root, free, message)
            self._outcomes.put((place, message), known, len(message.data) + len(known.output))
        return known

    def list_root(self, items: Sequence[bytes]) -> bytes:
        """Return the root of the trie of a list."""
        trie = HexaryTrie({})
        for place, item in enumerate(items):
            trie[rlp.encode(rlp.number(place))] = item
        return bytes(trie.root_hash)

    def _called(self, place: object, root: bytes, around: Surroundings, message: Message) -> Outcome:
        if self._last is None or self._last[0] != place:
            self._last = (place, self._state(root, around))
        state = self._last[1]
        before = state.snapshot()
        try:
            return _outcome(root, *_run(state, around, message))
        finally:
            state.revert(before)

    def _state(self, root: bytes, around: Surroundings) -> PragueState:
        context = ExecutionContext(
            coinbase=Address(around.coinbase),
            timestamp=around.timestamp,
            block_number=BlockNumber(around.number),
            difficulty=0,
            mix_hash=Hash32(around.randomness),
            gas_limit=around.gas_limit,
            prev_hashes=map(Hash32, around.ancestors()),
            chain_id=around.chain_id,
            base_fee_per_gas=around.base_fee,
            excess_blob_gas=0,
        )
        return PragueState(self._db, context, Hash32(root))


def _kept(state: PragueState) -> bytes:
    state.persist()
    return bytes(state.state_root)


def _run(state: PragueState, around: Surroundings, message: Message) -> tuple[ComputationAPI, int]:
    """Execute a message as a transaction; return the computation, and the gas that it has used."""
    sender = Address(message.sender)
    unsigned = PragueTransactionBuilder.new_unsigned_dynamic_fee_transaction(
        chain_id=around.chain_id,
        nonce=state.get_nonce(sender) if message.nonce is None else message.nonce,
        max_priority_fee_per_gas=message.max_priority_fee,
        max_fee_per_gas=message.max_fee,
        gas=message.gas,
        to=Address(message.to or CREATION),
        value=message.value,
        data=message.data,
        access_list=[(Address(address), [*map(_number, slots)]) for address, slots in message.access_list],
    )
    transaction = cast("SignedTransactionAPI", SpoofTransaction(unsigned, from_=sender))  # it has every attribute
    try:
        computation = state.apply_transaction(transaction)
    except ValidationError as error:
        raise InvalidTransactionError(str(error)) from error
    return computation, PragueVM.finalize_gas_used(transaction, computation)


def _number(slot: bytes) -> int:
    return int.from_bytes(slot, "big")


def _outcome(root: bytes, computation: ComputationAPI, gas_used: int) -> Outcome:
    if not computation.is_error:
        return Outcome(root, computation.output, gas_used, tuple(map(_log, computation.get_log_entries())))
    reverted = isinstance(computation.error, Revert)
    failure = "execution reverted" if reverted else _words(computation.error)
    return Outcome(root, computation.output if reverted else b"", gas_used, (), failure, reverted)


def _log(entry: tuple[bytes, tuple[int, ...], bytes]) -> Log:
    address, topics, data = entry
    return Log(address, tuple(topic.to_bytes(32, "big") for topic in topics), data)


def _words(error: Exception) -> str:
    """Return what went wrong: the name of py-evm's class, such as `out of gas`, and its text."""
    name = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in type(error).__name__).strip()
    return f"{name}: {error}"
