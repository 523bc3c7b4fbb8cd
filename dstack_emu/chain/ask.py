"""How contracts are asked: through a node in this process, or through one that runs elsewhere."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, TypeVar

from dstack_emu.chain.contracts import Ask, RpcError
from dstack_emu.chain.errors import ChainError, ExecutionRevertedError
from dstack_emu.chain.rpc import INTERNAL_ERROR, REVERTED, Rpc
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.urls import shown_origin, without_credentials

T = TypeVar("T")

JSON = {"Content-Type": "application/json"}


def local_ask(rpc: Rpc) -> Ask:
    """Ask a node in this process; the work is done in a thread."""

    async def ask(method: str, params: list[Any]) -> Any:
        return await asyncio.to_thread(_run, rpc, method, params)

    return ask


def immediate_ask(rpc: Rpc) -> Ask:
    """Ask a node in this process; the caller waits while the work is done, so `completed` works with it."""

    async def ask(method: str, params: list[Any]) -> Any:
        return _run(rpc, method, params)

    return ask


def completed(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that waits for nothing, such as an act through an `immediate_ask`."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise RuntimeError("a coroutine that waits for nothing expected")


def _run(rpc: Rpc, method: str, params: list[Any]) -> Any:
    try:
        return rpc.run(method, params)
    except ExecutionRevertedError as error:
        raise RpcError(REVERTED, str(error), error.data) from error
    except ChainError as error:
        raise RpcError(INTERNAL_ERROR, str(error)) from error


def remote_ask(client: HttpClient, url: str) -> Ask:
    """Ask a node by its URL, of which errors show scheme and host alone."""
    shown = shown_origin(url)
    numbers: Callable[[], int] = count(1).__next__

    async def ask(method: str, params: list[Any]) -> Any:
        number = numbers()
        request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        try:
            answer = await client.send("POST", url, json.dumps(request).encode(), JSON)
        except (NoAnswerError, AnswerTooLongError) as error:
            raise RpcError(INTERNAL_ERROR, f"no answer of {shown}: {without_credentials(str(error))}") from error
        return _result(answer.body, number, shown)

    return ask


def _result(body: bytes, number: int, url: str) -> Any:
    """Return the result of an answer; raise `RpcError` for an error, and for what is no answer."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or answer.get("id") != number:
        raise RpcError(INTERNAL_ERROR, f"{url}: a JSON-RPC answer expected, got {body[:80]!r}")
    if "error" not in answer:
        return answer.get("result")
    error = answer["error"] if isinstance(answer["error"], dict) else {}
    code = error.get("code")
    raise RpcError(
        code if isinstance(code, int) else INTERNAL_ERROR, str(error.get("message", "")), _data(error.get("data"))
    )


def _data(value: object) -> bytes:
    """Return what a contract reverted with, empty if the node does not say."""
    try:
        return bytes.fromhex(value[2:]) if isinstance(value, str) else b""
    except ValueError:
        return b""
