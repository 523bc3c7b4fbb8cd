"""JSON-RPC 2.0: requests and batches, and a number for each kind of error.

Source: jsonrpc.org/specification; geth's and anvil's numbers for what a call failed with.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from dstack_emu.chain.errors import (
    ChainError,
    ExecutionFailedError,
    ExecutionRevertedError,
    InvalidParamsError,
    InvalidTransactionError,
    StoreError,
    UnknownMethodError,
    UnknownStateError,
)
from dstack_emu.chain.node import Method
from dstack_emu.chain.quantities import Params, data

T = TypeVar("T")

MAX_BATCH: Final = 1_000
"""Requests in one batch."""
PARSE_ERROR, INVALID_REQUEST, INTERNAL_ERROR = -32700, -32600, -32603
REVERTED: Final = 3

_CODES: Final[Mapping[type[ChainError], int]] = {
    UnknownMethodError: -32601,
    InvalidParamsError: -32602,
    InvalidTransactionError: -32003,
    UnknownStateError: -32001,
    ExecutionRevertedError: REVERTED,
    ExecutionFailedError: -32015,
    StoreError: INTERNAL_ERROR,
}

_log = logging.getLogger("dstack_emu.chain")


class Rpc:
    """Answers requests by a table of methods, from any thread: a method is not run while another one is.

    `also` makes one with more methods, which waits for the same others.
    """

    def __init__(self, methods: Mapping[str, Method], turn: "threading.Lock | None" = None) -> None:
        self._methods = methods
        self._turn = turn or threading.Lock()

    @property
    def names(self) -> frozenset[str]:
        """The names of its methods."""
        return frozenset(self._methods)

    def also(self, methods: Mapping[str, Method]) -> "Rpc":
        """Return one with these methods, too."""
        return Rpc({**self._methods, **methods}, self._turn)

    def answer(self, body: bytes) -> bytes | None:
        """Answer a request or a batch; return None if none of them wants an answer."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return _encoded(failure(None, PARSE_ERROR, "Parse error: JSON expected"))
        if not isinstance(request, list):
            reply = self.reply(request)
            return None if reply is None else _encoded(reply)
        if not 0 < len(request) <= MAX_BATCH:
            return _encoded(failure(None, INVALID_REQUEST, f"a batch of 1 to {MAX_BATCH} requests expected"))
        replies = [reply for each in request if (reply := self.reply(each)) is not None]
        return _encoded(replies) if replies else None

    def reply(self, request: object) -> dict[str, Any] | None:
        """Answer one request; return None for a notification, which has no id."""
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return failure(None, INVALID_REQUEST, "Invalid request: an object with the member method expected")
        answer = self._answer(request)
        return None if "id" not in request else {"jsonrpc": "2.0", "id": request["id"], **answer}

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": self.run(request["method"], request.get("params"))}
        except ChainError as error:
            _log.info("%s: %s", request["method"], error)
            return {"error": _error(error)}
        except Exception:  # the edge of the server
            _log.exception("%s failed", request["method"])
            return {"error": {"code": INTERNAL_ERROR, "message": "Internal error: see the log of the chain"}}

    def run(self, method: str, params: object) -> Any:
        """Run a method; raise `ChainError`."""
        found = self._methods.get(method)
        if found is None:
            raise UnknownMethodError(f"Method not found: the method {method[:80]} does not exist or is not available")
        return self.exclusively(lambda: found(Params.of(params)))

    def exclusively(self, work: Callable[[], T]) -> T:
        """Do something while no method runs."""
        with self._turn:
            return work()


def failure(identity: object, code: int, message: str) -> dict[str, Any]:
    """Return an answer that is an error."""
    return {"jsonrpc": "2.0", "id": identity, "error": {"code": code, "message": message}}


def _error(error: ChainError) -> dict[str, Any]:
    described = {"code": _CODES[type(error)], "message": str(error)}
    return {**described, "data": data(error.data)} if isinstance(error, ExecutionRevertedError) else described


def _encoded(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
