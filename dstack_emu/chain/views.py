"""Blocks, transactions, receipts and logs in the JSON of Ethereum's RPC.

Every member that strict clients require is there: alloy refuses a block without one of them.
Source: ethereum/execution-apis.
"""

from typing import Any

from dstack_emu.chain.block import (
    BASE_FEE,
    COINBASE,
    EMPTY_REQUESTS,
    EMPTY_ROOT,
    EMPTY_UNCLES,
    GAS_LIMIT,
    Block,
    Receipt,
    bloom,
)
from dstack_emu.chain.engine import Log
from dstack_emu.chain.quantities import data, quantity
from dstack_emu.chain.transaction import DYNAMIC_FEE, LEGACY, Transaction


def block_view(block: Block, *, full: bool) -> dict[str, Any]:
    """Return a block, with whole transactions or their hashes."""
    transactions = [
        transaction_view(block, receipt) if full else data(receipt.transaction.hash) for receipt in block.receipts
    ]
    return {
        **header_view(block),
        "size": quantity(block.size + sum(len(receipt.transaction.raw) for receipt in block.receipts)),
        "totalDifficulty": "0x0",
        "transactions": transactions,
        "uncles": [],
        "withdrawals": [],
    }


def header_view(block: Block) -> dict[str, Any]:
    """Return the header of a block, as subscribers to newHeads get it."""
    return {
        "number": quantity(block.number),
        "hash": data(block.hash),
        "parentHash": data(block.parent),
        "sha3Uncles": data(EMPTY_UNCLES),
        "miner": data(COINBASE),
        "stateRoot": data(block.root),
        "transactionsRoot": data(block.transactions_root),
        "receiptsRoot": data(block.receipts_root),
        "logsBloom": data(block.bloom),
        "difficulty": "0x0",
        "gasLimit": quantity(GAS_LIMIT),
        "gasUsed": quantity(block.gas_used),
        "timestamp": quantity(block.timestamp),
        "extraData": "0x",
        "mixHash": data(block.randomness),
        "nonce": data(bytes(8)),
        "baseFeePerGas": quantity(BASE_FEE),
        "withdrawalsRoot": data(EMPTY_ROOT),
        "blobGasUsed": "0x0",
        "excessBlobGas": "0x0",
        "parentBeaconBlockRoot": data(bytes(32)),
        "requestsHash": data(EMPTY_REQUESTS),
    }


def transaction_view(block: Block, receipt: Receipt) -> dict[str, Any]:
    """Return a mined transaction."""
    transaction = receipt.transaction
    parity, r, s = transaction.signature
    view = {
        "hash": data(transaction.hash),
        "type": quantity(transaction.kind),
        "nonce": quantity(transaction.nonce),
        "blockHash": data(block.hash),
        "blockNumber": quantity(block.number),
        "blockTimestamp": quantity(block.timestamp),
        "transactionIndex": "0x0",
        "from": data(transaction.sender),
        "to": None if transaction.to is None else data(transaction.to),
        "value": quantity(transaction.value),
        "gas": quantity(transaction.gas),
        "gasPrice": quantity(receipt.price),
        "input": data(transaction.data),
        "v": quantity(transaction.v),
        "r": quantity(r),
        "s": quantity(s),
    }
    return view | _fields_by_type(transaction, parity)


def _fields_by_type(transaction: Transaction, parity: int) -> dict[str, Any]:
    chain_id = {} if transaction.chain_id is None else {"chainId": quantity(transaction.chain_id)}
    if transaction.kind == LEGACY:
        return chain_id
    accesses = [
        {"address": data(address), "storageKeys": [data(slot) for slot in slots]}
        for address, slots in transaction.access_list
    ]
    fields = {**chain_id, "accessList": accesses, "yParity": quantity(parity)}
    if transaction.kind == DYNAMIC_FEE:
        fields["maxFeePerGas"] = quantity(transaction.max_fee)
        fields["maxPriorityFeePerGas"] = quantity(transaction.max_priority_fee)
    return fields


def receipt_view(block: Block, receipt: Receipt) -> dict[str, Any]:
    """Return a receipt."""
    transaction = receipt.transaction
    return {
        "transactionHash": data(transaction.hash),
        "transactionIndex": "0x0",
        "blockHash": data(block.hash),
        "blockNumber": quantity(block.number),
        "from": data(transaction.sender),
        "to": None if transaction.to is None else data(transaction.to),
        "cumulativeGasUsed": quantity(receipt.gas_used),
        "gasUsed": quantity(receipt.gas_used),
        "contractAddress": None if receipt.created is None else data(receipt.created),
        "logs": log_views(block),
        "logsBloom": data(bloom(receipt.logs)),
        "status": quantity(receipt.succeeded),
        "effectiveGasPrice": quantity(receipt.price),
        "type": quantity(transaction.kind),
    }


def log_views(block: Block) -> list[dict[str, Any]]:
    """Return all logs of a block."""
    return [
        log_view(block, receipt, place, log) for receipt in block.receipts for place, log in enumerate(receipt.logs)
    ]


def log_view(block: Block, receipt: Receipt, place: int, log: Log) -> dict[str, Any]:
    """Return a log."""
    return {
        "address": data(log.address),
        "topics": [data(topic) for topic in log.topics],
        "data": data(log.data),
        "blockHash": data(block.hash),
        "blockNumber": quantity(block.number),
        "blockTimestamp": quantity(block.timestamp),
        "transactionHash": data(receipt.transaction.hash),
        "transactionIndex": "0x0",
        "logIndex": quantity(place),
        "removed": False,
    }
