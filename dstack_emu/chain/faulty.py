"""What nodes do wrong: they lag behind, have dropped old states, replace blocks, or are of another chain."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

from dstack_emu.chain.ledger import Ledger
from dstack_emu.chain.quantities import quantity
from dstack_emu.chain.rpc import Rpc

NodeFault = Literal["stale", "pruned", "reorg", "wrong-chain-id"]

_PLACE_OF_BLOCK: Final[Mapping[str, int]] = MappingProxyType(
    {
        "eth_call": 1,
        "eth_getBalance": 1,
        "eth_getCode": 1,
        "eth_getTransactionCount": 1,
        "eth_getStorageAt": 2,
        "eth_getBlockByNumber": 0,
    }
)
"""Which parameter is the block."""
_MISSING: Final = -32000
"""geth's number for a state that it has not."""


class FaultyNode:
    """Answers requests as a node with a fault does."""

    def __init__(self, rpc: Rpc, ledger: Ledger) -> None:
        self._rpc, self._ledger = rpc, ledger

    def answer(self, fault: NodeFault, blocks: int | None, request: dict[str, Any]) -> bytes:
        """Answer one request. `blocks` is how far it lags behind, what is pruned, or what is replaced.

        By default that is 1; a node prunes every state that is named by its number.
        """
        match fault:
            case "reorg":
                count = min(1 if blocks is None else blocks, self._ledger.head.number)
                self._rpc.exclusively(lambda: self._ledger.reorganise(count) if count else None)
                return self._passed(request)
            case "wrong-chain-id":
                return self._of_another_chain(request)
            case "pruned":
                number = self._number(request)
                oldest = self._ledger.head.number - (0 if blocks is None else blocks)
                return self._passed(request) if number is None or number > oldest else _missing(request, number)
        return self._late(request, max(self._ledger.head.number - (1 if blocks is None else blocks), 0))

    def _late(self, request: dict[str, Any], head: int) -> bytes:
        """Answer as if `head` were the latest block."""
        if request.get("method") == "eth_blockNumber":
            return _encoded(request, result=quantity(head))
        number, place = self._number(request), _PLACE_OF_BLOCK.get(str(request.get("method")))
        if number is not None and number > head:
            return _missing(request, number)
        if place is None or number is not None:
            return self._passed(request)
        params = list(request.get("params") or ())
        params[place : place + 1] = [quantity(head)]
        return self._passed({**request, "params": params})

    def _of_another_chain(self, request: dict[str, Any]) -> bytes:
        other = self._ledger.genesis.chain_id + 1
        answers = {"eth_chainId": quantity(other), "net_version": str(other)}
        method = str(request.get("method"))
        return _encoded(request, result=answers[method]) if method in answers else self._passed(request)

    def _passed(self, request: dict[str, Any]) -> bytes:
        return self._rpc.answer(json.dumps(request).encode()) or b""

    @staticmethod
    def _number(request: dict[str, Any]) -> int | None:
        """Return the number of the block that a request names, None if it names none or a tag."""
        place, params = _PLACE_OF_BLOCK.get(str(request.get("method"))), request.get("params")
        named = params[place] if place is not None and isinstance(params, list) and len(params) > place else None
        try:
            return int(named, 16) if isinstance(named, str) and named.startswith("0x") else None
        except ValueError:
            return None


def _missing(request: dict[str, Any], number: int) -> bytes:
    message = f"missing trie node: the state of block {number} is not available"
    return _encoded(request, error={"code": _MISSING, "message": message})


def _encoded(request: dict[str, Any], **answer: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request.get("id"), **answer}).encode()
