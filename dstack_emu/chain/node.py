"""The JSON-RPC methods of a node, over a ledger: `eth_…`, `net_…` and `web3_…`.

One method of the class for each RPC, found by its name. It opens no socket. Methods for tests are in `dev_methods`.

Source: ethereum/execution-apis; the forms of errors are those that geth and anvil have in common, because clients parse
them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from dstack_emu.attest.keccak import keccak
from dstack_emu.attest.version import EMULATOR
from dstack_emu.chain.block import BASE_FEE, GAS_LIMIT, Block
from dstack_emu.chain.engine import Message
from dstack_emu.chain.errors import InvalidParamsError, InvalidTransactionError, UnknownStateError
from dstack_emu.chain.filters import Filters, LogFilter
from dstack_emu.chain.ledger import Ledger
from dstack_emu.chain.quantities import (
    Params,
    checksummed,
    data,
    parse_address,
    parse_data,
    parse_hash,
    parse_quantity,
    quantity,
)
from dstack_emu.chain.transaction import DYNAMIC_FEE, LEGACY, Transaction, address_of
from dstack_emu.chain.views import block_view, receipt_view, transaction_view

TIP: Final = 1_000_000_000
"""The wei per gas that clients are advised to add to the base fee."""
MAX_LOG_BLOCKS: Final = 100_000
MAX_FEE_BLOCKS: Final = 1_024
_TAGS: Final = ("latest", "pending", "safe", "finalized")

Method = Callable[[Params], Any]


class Node:
    """A node of a chain, with the private keys of its development accounts."""

    def __init__(self, ledger: Ledger, private_keys: tuple[bytes, ...]) -> None:
        self.ledger = ledger
        self.filters = Filters(ledger)
        self.accounts = tuple(address_of(key) for key in private_keys)
        self.impersonated: set[bytes] = set()
        self.impersonates_all = False
        self._keys = dict(zip(self.accounts, private_keys, strict=True))

    def methods(self) -> Mapping[str, Method]:
        """Return the methods by their names."""
        return {
            "web3_clientVersion": lambda _: f"dstack-emu/{EMULATOR}/{self.ledger.engine.name}",
            "web3_sha3": lambda params: data(keccak(parse_data(params.get(0), "data"))),
            "net_version": lambda _: str(self.ledger.genesis.chain_id),
            "net_listening": lambda _: True,
            "net_peerCount": lambda _: "0x0",
            "eth_chainId": lambda _: quantity(self.ledger.genesis.chain_id),
            "eth_syncing": lambda _: False,
            "eth_mining": lambda _: True,
            "eth_accounts": lambda _: [checksummed(each) for each in self.accounts],
            "eth_blockNumber": lambda _: quantity(self.ledger.head.number),
            "eth_gasPrice": lambda _: quantity(BASE_FEE + TIP),
            "eth_maxPriorityFeePerGas": lambda _: quantity(TIP),
            "eth_blobBaseFee": lambda _: "0x1",
            "eth_feeHistory": self.fee_history,
            "eth_getBalance": lambda params: quantity(self._account(params).balance),
            "eth_getTransactionCount": lambda params: quantity(self._account(params).nonce),
            "eth_getCode": lambda params: data(self._account(params).code),
            "eth_getStorageAt": self.storage_at,
            "eth_call": self.call,
            "eth_estimateGas": self.estimate_gas,
            "eth_sendRawTransaction": self.send_raw_transaction,
            "eth_sendTransaction": self.send_transaction,
            "eth_getBlockByNumber": self.block_by_number,
            "eth_getBlockByHash": self.block_by_hash,
            "eth_getBlockTransactionCountByNumber": lambda params: quantity(len(self.block(params.get(0)).receipts)),
            "eth_getBlockReceipts": self.block_receipts,
            "eth_getTransactionByHash": self.transaction_by_hash,
            "eth_getTransactionReceipt": self.transaction_receipt,
            "eth_getTransactionByBlockNumberAndIndex": self.transaction_by_block_number_and_index,
            "eth_getLogs": self.logs,
            "eth_newFilter": self.new_filter,
            "eth_newBlockFilter": lambda _: quantity(self.filters.add(None)),
            "eth_getFilterChanges": lambda params: self.filters.changes(params.number(0, "filter")),
            "eth_getFilterLogs": lambda params: self.filters.logs(params.number(0, "filter")),
            "eth_uninstallFilter": lambda params: self.filters.remove(params.number(0, "filter")),
        }

    # -- blocks and state

    def block(self, tag: object) -> Block:
        """Return the block of a tag, a number, or an object with a number or a hash (EIP-1898)."""
        if tag is None or tag in _TAGS:
            return self.ledger.head
        if tag == "earliest":
            return self.ledger.block(0)
        if isinstance(tag, dict):
            if "blockHash" in tag:
                return self._block_of_hash(tag["blockHash"])
            tag = tag.get("blockNumber")
        return self.ledger.block(parse_quantity(tag, "block"))

    def _block_of_hash(self, value: object) -> Block:
        found = self.ledger.find_block(parse_hash(value, "blockHash"))
        if found is None:
            raise UnknownStateError("header for hash not found")
        return found

    def _account(self, params: Params) -> Any:
        return self.ledger.account(self.block(params.get(1)), params.address())

    def storage_at(self, params: Params) -> str:
        """Return a slot of an account."""
        slot = params.get(1)
        place = parse_quantity(slot, "slot")
        root = self.ledger.root_at(self.block(params.get(2)))
        return data(self.ledger.engine.storage(root, params.address(), place))

    def block_by_number(self, params: Params) -> dict[str, Any] | None:
        """Return a block, null if it does not exist yet."""
        try:
            block = self.block(params.get(0))
        except UnknownStateError:
            return None
        return block_view(block, full=params.get(1) is True)

    def block_by_hash(self, params: Params) -> dict[str, Any] | None:
        """Return a block by its hash, null if there is none."""
        block = self.ledger.find_block(params.hash())
        return None if block is None else block_view(block, full=params.get(1) is True)

    def block_receipts(self, params: Params) -> list[dict[str, Any]]:
        """Return all receipts of a block."""
        block = self.block(params.get(0))
        return [receipt_view(block, receipt) for receipt in block.receipts]

    def transaction_by_hash(self, params: Params) -> dict[str, Any] | None:
        """Return a transaction, null if there is none."""
        found = self.ledger.find_receipt(params.hash())
        return None if found is None else transaction_view(*found)

    def transaction_by_block_number_and_index(self, params: Params) -> dict[str, Any] | None:
        """Return a transaction of a block by its place."""
        block, place = self.block(params.get(0)), params.number(1, "index")
        return transaction_view(block, block.receipts[place]) if place < len(block.receipts) else None

    def transaction_receipt(self, params: Params) -> dict[str, Any] | None:
        """Return a receipt, null if there is none."""
        found = self.ledger.find_receipt(params.hash())
        return None if found is None else receipt_view(*found)

    def fee_history(self, params: Params) -> dict[str, Any]:
        """Return the fees of the last blocks: the base fee never changes, and every tip is the advised one."""
        count = min(params.number(0, "blockCount"), MAX_FEE_BLOCKS)
        last = self.block(params.get(1)).number
        first = max(0, last + 1 - count)
        percentiles = params.get(2, [])
        blocks = self.ledger.blocks[first : last + 1]
        history = {
            "oldestBlock": quantity(first),
            "baseFeePerGas": [quantity(BASE_FEE)] * (len(blocks) + 1),
            "gasUsedRatio": [block.gas_used / GAS_LIMIT for block in blocks],
            "baseFeePerBlobGas": ["0x1"] * (len(blocks) + 1),
            "blobGasUsedRatio": [0.0] * len(blocks),
        }
        if isinstance(percentiles, list) and percentiles:
            history["reward"] = [[quantity(TIP)] * len(percentiles) for _ in blocks]
        return history

    # -- execution

    def call(self, params: Params) -> str:
        """Execute a call in the state after a block."""
        if params.get(2):
            raise InvalidParamsError("eth_call: state overrides are not supported")
        return data(self.ledger.call(self.block(params.get(1)), _message(params.members(0, "call"))))

    def estimate_gas(self, params: Params) -> str:
        """Return the gas that a transaction needs."""
        return quantity(self.ledger.estimate(self.block(params.get(1)), _message(params.members(0, "transaction"))))

    def send_raw_transaction(self, params: Params) -> str:
        """Mine a signed transaction; return its hash."""
        return self._sent(Transaction.decode(parse_data(params.get(0), "transaction")))

    def send_transaction(self, params: Params) -> str:
        """Sign a transaction of a development account, or send it for an impersonated one; return its hash."""
        members = params.members(0, "transaction")
        sender = parse_address(members.get("from"), "from")
        unsigned = self._unsigned(members, sender)
        if key := self._keys.get(sender):
            return self._sent(unsigned.signed(key))
        if not self.impersonates_all and sender not in self.impersonated:
            raise InvalidTransactionError(
                f"No Signer available for {checksummed(sender)}: neither a development account nor impersonated"
            )
        return self._sent(unsigned.impersonating(sender))

    def _sent(self, transaction: Transaction) -> str:
        if self.ledger.find_receipt(transaction.hash):
            raise InvalidTransactionError("already known: this transaction has been mined")
        self.ledger.send(transaction)
        return data(transaction.hash)

    def _unsigned(self, members: Mapping[str, Any], sender: bytes) -> Transaction:
        message = _message(members)
        gas = message.gas if "gas" in members else self.ledger.estimate(self.ledger.head, message)
        nonce = self.ledger.account(self.ledger.head, sender).nonce
        if members.get("nonce") is not None:
            nonce = parse_quantity(members["nonce"], "nonce")
        legacy = members.get("gasPrice") is not None
        tip = message.max_priority_fee or TIP
        fee = message.max_fee or BASE_FEE * 2 + tip
        return Transaction(
            LEGACY if legacy else DYNAMIC_FEE,
            self.ledger.genesis.chain_id,
            nonce,
            fee if legacy else min(tip, fee),
            fee,
            gas,
            message.to,
            message.value,
            message.data,
            () if legacy else message.access_list,
        )

    # -- logs

    def logs(self, params: Params) -> list[dict[str, Any]]:
        """Return the logs of a range of blocks, or of one."""
        members = params.members(0, "filter")
        wanted = LogFilter.of(members)
        if members.get("blockHash") is not None:
            return wanted.of_block(self._block_of_hash(members["blockHash"]))
        first, last = self._range(members)
        if last - first >= MAX_LOG_BLOCKS:
            raise InvalidParamsError(f"a range of at most {MAX_LOG_BLOCKS} blocks expected, got {last - first + 1}")
        return [view for block in self.ledger.blocks[first : last + 1] for view in wanted.of_block(block)]

    def new_filter(self, params: Params) -> str:
        """Install a filter for logs."""
        members = params.members(0, "filter")
        first = None if members.get("fromBlock") in (None, *_TAGS) else self._number(members["fromBlock"])
        last = None if members.get("toBlock") in (None, *_TAGS) else self._number(members["toBlock"])
        return quantity(self.filters.add(LogFilter.of(members), first, last))

    def _range(self, members: Mapping[str, Any]) -> tuple[int, int]:
        first, last = self._number(members.get("fromBlock")), self._number(members.get("toBlock"))
        if first > last and first <= self.ledger.head.number:
            raise InvalidParamsError(f"fromBlock {first} is after toBlock {last}")
        return first, last

    def _number(self, tag: object) -> int:
        """Return the number of a block, which may not exist yet."""
        if tag is None or tag in _TAGS:
            return self.ledger.head.number
        return 0 if tag == "earliest" else parse_quantity(tag, "block")


def _message(members: Mapping[str, Any]) -> Message:
    """Read a call or a transaction; raise `InvalidParamsError`."""

    def number(name: str, default: int = 0) -> int:
        value = members.get(name)
        return default if value is None else parse_quantity(value, name)

    given = members.get("input") if members.get("input") is not None else members.get("data")
    to = members.get("to")
    price = number("gasPrice")
    return Message(
        sender=bytes(20) if members.get("from") is None else parse_address(members["from"], "from"),
        to=None if to in (None, "", "0x") else parse_address(to, "to"),
        data=b"" if given is None else parse_data(given, "data"),
        gas=min(number("gas", GAS_LIMIT), GAS_LIMIT),
        value=number("value"),
        max_fee=price or number("maxFeePerGas"),
        max_priority_fee=price or number("maxPriorityFeePerGas"),
        access_list=_access_list(members.get("accessList")),
    )


def _access_list(value: object) -> tuple[tuple[bytes, tuple[bytes, ...]], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise InvalidParamsError("accessList: a list of objects expected")
    return tuple(
        (
            parse_address(each.get("address"), "accessList"),
            tuple(parse_hash(slot, "accessList") for slot in each.get("storageKeys") or ()),
        )
        for each in value
    )
