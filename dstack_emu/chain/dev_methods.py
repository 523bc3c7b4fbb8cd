"""The methods for tests that anvil and hardhat have: snapshots, time, mining, impersonation, balances.

Methods that these programs have and this chain does not are unknown, so that clients which probe for a program find
that it is another one.
"""

from collections.abc import Mapping
from typing import Any, Final

from dstack_emu.chain.errors import InvalidParamsError
from dstack_emu.chain.ledger import MAX_EMPTY_BLOCKS
from dstack_emu.chain.node import Method, Node
from dstack_emu.chain.quantities import Params, parse_number, quantity

MAX_BALANCE: Final = 2**255
"""Wei; so much below what an account can have that nothing sent to it exceeds that."""


class DevMethods:
    """The methods for tests of one node."""

    def __init__(self, node: Node) -> None:
        self.node, self.ledger = node, node.ledger

    def methods(self) -> Mapping[str, Method]:
        """Return the methods by their names."""
        return {
            "evm_snapshot": lambda _: quantity(self.ledger.snapshot()),
            "evm_revert": lambda params: self.ledger.revert(params.number(0, "snapshot")),
            "evm_mine": self.mine,
            "anvil_mine": self.mine_many,
            "hardhat_mine": self.mine_many,
            "evm_increaseTime": self.increase_time,
            "evm_setNextBlockTimestamp": self.set_next_block_timestamp,
            "evm_setTime": self.set_time,
            **self._of_both("impersonateAccount", self.impersonate),
            **self._of_both("stopImpersonatingAccount", self.stop_impersonating),
            "anvil_autoImpersonateAccount": self.impersonate_all,
            **self._of_both("setBalance", self.set_balance),
        }

    @staticmethod
    def _of_both(name: str, method: Method) -> dict[str, Method]:
        return {f"anvil_{name}": method, f"hardhat_{name}": method}

    def mine(self, params: Params) -> str:
        """Mine an empty block, at a time in Unix seconds if one is given."""
        moment = params.get(0)
        if isinstance(moment, dict):  # anvil's form
            moment = moment.get("timestamp")
        if moment is not None:
            self._set_next(parse_number(moment, "timestamp"))
        self.ledger.mine()
        return "0x0"

    def mine_many(self, params: Params) -> None:
        """Mine some empty blocks, some seconds apart."""
        count, interval = params.number(0, "blocks", 1), params.number(1, "interval", 1)
        if count > MAX_EMPTY_BLOCKS:
            raise InvalidParamsError(f"blocks: at most {MAX_EMPTY_BLOCKS} expected, got {count}")
        self.ledger.mine(count, max(interval, 1))

    def increase_time(self, params: Params) -> int:
        """Let the time of blocks be further ahead of the clock; return by how many seconds it now is."""
        seconds = params.number(0, "seconds")
        parse_number(self.ledger.head.timestamp + self.ledger.ahead + seconds, "seconds")
        return self.ledger.move_time(seconds)

    def set_next_block_timestamp(self, params: Params) -> None:
        """Set the time of the next block; those after it go on from there."""
        self._set_next(params.number(0, "timestamp"))

    def set_time(self, params: Params) -> int:
        """Set the time of the chain, which goes on from there; return by how many seconds it moved."""
        return self.ledger.set_time(params.number(0, "timestamp"))

    def _set_next(self, moment: int) -> None:
        latest = self.ledger.head.timestamp
        if moment <= latest:
            raise InvalidParamsError(
                f"timestamp: a time after that of the latest block, {latest}, expected, got {moment}"
            )
        self.ledger.next_timestamp = moment

    def impersonate(self, params: Params) -> None:
        """Let eth_sendTransaction send for an account of which nobody has the key."""
        self.node.impersonated.add(params.address())

    def stop_impersonating(self, params: Params) -> None:
        """End that."""
        self.node.impersonated.discard(params.address())

    def impersonate_all(self, params: Params) -> None:
        """Let eth_sendTransaction send for every account, or end that."""
        self.node.impersonates_all = params.get(0) is True

    def set_balance(self, params: Params) -> Any:
        """Set the balance of an account."""
        self.ledger.set_balance(params.address(), parse_number(params.get(1), "balance", MAX_BALANCE))
