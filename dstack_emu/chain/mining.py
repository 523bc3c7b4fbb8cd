"""What mining makes of a transaction: the message that is executed, its receipt, and the hash of its block."""

from dataclasses import replace

from dstack_emu.attest.keccak import keccak
from dstack_emu.chain.block import BASE_FEE, Block, Receipt
from dstack_emu.chain.engine import Message, Outcome
from dstack_emu.chain.errors import ExecutionFailedError, ExecutionRevertedError
from dstack_emu.chain.revert import revert_message
from dstack_emu.chain.transaction import Transaction, created_address


def message_of(transaction: Transaction) -> Message:
    """Return what the engine executes for a transaction."""
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


def receipt_of(transaction: Transaction, outcome: Outcome) -> Receipt:
    """Return the receipt of a transaction that was executed."""
    price = min(transaction.max_fee, BASE_FEE + transaction.max_priority_fee)
    created = created_address(transaction.sender, transaction.nonce) if transaction.to is None else None
    return Receipt(transaction, outcome.failure is None, outcome.gas_used, price, outcome.logs, created)


def hashed(block: Block) -> Block:
    """Return a block with the hash and the size (bytes) of its header."""
    header = block.header()
    return replace(block, hash=keccak(header), size=len(header))


def require_success(outcome: Outcome) -> None:
    """Raise what a message failed with, if it did."""
    if outcome.reverted:
        raise ExecutionRevertedError(revert_message(outcome.output), outcome.output)
    if outcome.failure is not None:
        raise ExecutionFailedError(outcome.failure)
