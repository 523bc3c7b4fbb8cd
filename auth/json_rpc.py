"""A client of an Ethereum node: JSON-RPC 2.0 over HTTP, one request at a time, each over a connection of its own.

It believes an answer only if it is whole: a successful status, one JSON object of that protocol with the id of this
request, and a result of the expected form. It follows no redirect and repeats no request.

Not here: what is called, and what the results mean. Source: the JSON-RPC 2.0 specification; the Ethereum JSON-RPC
specification (quantities and data).
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from dstack_emu.attest.strict_json import StrictJson
from dstack_emu.auth.errors import ChainError
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.status import status_line
from dstack_emu.transport.urls import shown_origin, without_credentials

MAX_RPC_ANSWER: Final = 256 * 1024
"""The maximum length of an answer in bytes, uncompressed: a reason and its gateway take a few hundred."""
MAX_RPC_VALUES: Final = 1024
"""The maximum number of JSON values of an answer."""
MAX_SHOWN_MESSAGE: Final = 1000
"""Characters of a node's error that are kept."""

_QUANTITY: Final = re.compile(r"0x(?:0|[1-9a-fA-F][0-9a-fA-F]{0,15})")
_DATA: Final = re.compile(r"0x(?:[0-9a-fA-F]{2})*")

Headers = Callable[[], Mapping[str, str]]
"""Returns the headers of the next request."""


class JsonRpcClient:
    """Calls the methods of one node. Close it.

    `timeout` is for each call, in seconds. `headers` are added to each request.
    """

    def __init__(self, url: str, *, timeout: float, headers: Headers | None = None) -> None:
        self._headers = headers
        self._url = url
        self._client = HttpClient(timeout=timeout, max_answer=MAX_RPC_ANSWER, shown=shown_origin)
        self._ids = itertools.count(1)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def quantity(self, method: str) -> int:
        """Call a method without parameters that returns a number below 2^64; raise `ChainError`."""
        result = await self._call(method, [])
        if not isinstance(result, str) or not _QUANTITY.fullmatch(result):
            raise ChainError(f"{method}: a quantity expected, 0x and hex without leading zeros, got {_shown(result)}")
        return int(result, 16)

    async def eth_call(self, to: str, data: bytes, block: str) -> bytes:
        """Execute a contract's method in the state of a block (`latest` or a quantity); raise `ChainError`."""
        result = await self._call("eth_call", [{"data": f"0x{data.hex()}", "to": to}, block])
        if not isinstance(result, str) or not _DATA.fullmatch(result):
            raise ChainError(f"eth_call: data expected, 0x and hex of whole bytes, got {_shown(result)}")
        return bytes.fromhex(result[2:])

    async def _call(self, method: str, params: Sequence[object]) -> object:
        number = next(self._ids)
        request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        headers = {"Content-Type": "application/json", **(self._headers() if self._headers else {})}
        try:
            answer = await self._client.send("POST", self._url, json.dumps(request).encode(), headers)
        except (NoAnswerError, AnswerTooLongError) as error:
            raise ChainError(f"{method}: {without_credentials(str(error))}") from error
        if not 200 <= answer.status < 300:
            raise ChainError(f"{method}: the node answered HTTP status {status_line(answer.status)}")
        return _result(method, number, answer.body)


def _result(method: str, number: int, body: bytes) -> object:
    document = _parse(method, body)
    if document.get("jsonrpc") != "2.0":
        raise ChainError(f'{method}: "jsonrpc": "2.0" expected, got {_shown(document.get("jsonrpc"))}')
    got = document.get("id")
    if type(got) is not int or got != number:
        raise ChainError(f"{method}: an answer to request {number} expected, got one to {_shown(got)}")
    if document.get("error") is not None:
        raise _refusal(method, document["error"])
    if "result" not in document:
        raise ChainError(f"{method}: the answer has neither result nor error")
    return document["result"]


def _parse(method: str, body: bytes) -> dict[str, Any]:
    try:
        document = _JSON.parse(body.decode(), MAX_RPC_VALUES)
    except ValueError as error:
        raise ChainError(f"{method}: the answer is not JSON: {error!s:.200}") from error
    if not isinstance(document, dict):
        raise ChainError(f"{method}: one JSON object expected, got {_shown(document)}")
    return document


def _refusal(method: str, error: object) -> ChainError:
    """Return the node's error: its message alone, as a chain's operator sees it."""
    message = error.get("message") if isinstance(error, dict) else None
    if isinstance(message, str) and message:
        return ChainError(f"{message:.{MAX_SHOWN_MESSAGE}}")
    return ChainError(f"{method}: an error with a message expected, got {_shown(error)}")


def _shown(value: object) -> str:
    return f"{json.dumps(value):.80}"


_JSON: Final = StrictJson()
