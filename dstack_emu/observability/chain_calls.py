"""Journal and faults around the JSON-RPC of a chain: each call has the name of its method, and says what was answered.

A batch has the name `batch`. Connections of WebSockets are not recorded, and no fault applies to them.
"""

import asyncio
import json
from collections.abc import Collection
from typing import Any, Final, get_args

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from dstack_emu.attest.errors import FormatError
from dstack_emu.chain import abi
from dstack_emu.chain.contracts import BOOT_INFO
from dstack_emu.chain.faulty import FaultyNode, NodeFault
from dstack_emu.chain.history import function_name
from dstack_emu.observability.aiohttp_middleware import AiohttpCall, answered
from dstack_emu.observability.fault_effects import OwnFault
from dstack_emu.observability.fault_rules import FaultRule
from dstack_emu.observability.http_call import HttpCall
from dstack_emu.observability.middleware import HttpInstruments
from dstack_emu.observability.spans import CallSpan, current
from dstack_emu.transport.http import Response

BATCH: Final = "batch"
UNKNOWN: Final = "unknown"
"""What a request is called that names no method of the chain."""
MAX_SHOWN: Final = 200
"""Characters that the journal keeps of a result."""

_CALLING: Final = ("eth_call", "eth_estimateGas", "eth_sendTransaction")
"""The methods whose first parameter is a call."""
_RESULTS: Final = {
    abi.selector(signature): results
    for signature, results in (
        (f"isKmsAllowed({BOOT_INFO})", "(bool,string)"),
        (f"isAppAllowed({BOOT_INFO})", "(bool,string)"),
        ("gatewayAppId()", "(string)"),
    )
}
"""What the functions that a webhook calls return, as far as the journal has it decoded."""


def faults_of(node: FaultyNode) -> OwnFault:
    """Make the handler of a chain's own faults."""

    async def answer(fault: FaultRule, call: HttpCall) -> Response:
        return await (call.answer_with(fault, node) if isinstance(call, _ChainCall) else call.proceed())

    return answer


def chain_middleware(instruments: HttpInstruments, methods: Collection[str]) -> Middleware:
    """Make the middleware of a chain's server with these methods."""

    @web.middleware
    async def instrumented(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        call = _ChainCall(request, handler, await request.read(), methods)
        return await (answered(instruments, call) if instruments.concern(call.path) else handler(request))

    return instrumented


class _ChainCall(AiohttpCall):
    """A call to a chain; its path is the method."""

    __slots__ = ("_asked",)

    def __init__(self, request: web.Request, handler: Handler, body: bytes, methods: Collection[str]) -> None:
        super().__init__(request, handler)
        self._asked = _document(body)
        method = str(self._asked.get("method"))
        named = method if method in methods else UNKNOWN
        self.path = BATCH if body.lstrip()[:1] == b"[" else named

    async def answer_with(self, fault: FaultRule, node: FaultyNode) -> Response:
        """Answer as a node with a fault does; a batch, or what is no request, passes."""
        if not self._asked or fault.kind not in get_args(NodeFault):
            return await self.proceed()
        kind: NodeFault = fault.kind  # type: ignore[assignment]  # it is one, by the line above
        body = await asyncio.to_thread(node.answer, kind, fault.blocks, self._asked)
        self._record(body)
        return Response.of(body, "application/json")

    async def proceed(self) -> Response:
        """Call the handler, record what was asked and answered, and return the answer."""
        answer = await super().proceed()
        if isinstance(answer.body, bytes) and self.path != BATCH:
            self._record(answer.body)
        return answer

    def _record(self, body: bytes) -> None:
        span = current()
        if isinstance(span, CallSpan):
            span.annotate("chain", _described(self._asked, _document(body)))


def _document(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Return function, block and result of a call; of a refusal its message."""
    params = asked.get("params")
    call, block = (*params, None, None)[:2] if isinstance(params, list) else (None, None)
    said: dict[str, Any] = {}
    if asked.get("method") in _CALLING and isinstance(call, dict):
        said = {"function": _named(call), "block": block}
    if isinstance(error := answer.get("error"), dict):
        return {**said, "error": str(error.get("message"))[:MAX_SHOWN]}
    result = answer.get("result")
    if asked.get("method") == "eth_call" and (results := _RESULTS.get(_data(call)[:4])):
        return {**said, "result": _decoded(results, str(result))}
    return {**said, "result": result[:MAX_SHOWN]} if isinstance(result, str) else said


def _named(call: dict[str, Any]) -> str:
    """Return the function of dstack's contracts that is called, empty for any other."""
    return function_name(_data(call)) or ""


def _data(call: Any) -> bytes:
    """Return what a call sends, empty if that is no hex."""
    encoded = call.get("input") or call.get("data") if isinstance(call, dict) else None
    try:
        return bytes.fromhex(encoded.removeprefix("0x")) if isinstance(encoded, str) else b""
    except ValueError:
        return b""


def _decoded(results: str, encoded: str) -> Any:
    try:
        values = abi.decode(results, bytes.fromhex(encoded[2:]))
    except (FormatError, ValueError):
        return encoded[:MAX_SHOWN]
    return values if len(values) > 1 else values[0]
