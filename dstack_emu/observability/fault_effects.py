"""What a fault does to one call of an aiohttp application: an answer that is late, wrong, cut off or none at all."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from dstack_emu.observability.fault_rules import FaultRule, InstalledRule
from dstack_emu.transport.listen import reset

PIECES: Final = 20
"""In so many pieces a slow body comes, `seconds` between them."""

NOT_JSON: Final = b'{"\xff\x00 malformed by a fault'

Stale = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]
"""Answers a request for collateral with a document that has expired."""


class DroppedError(ConnectionError):
    """The connection was dropped on purpose: there is nothing to answer on."""


async def apply_fault(
    rule: InstalledRule, fault: FaultRule, request: web.Request, handler: Handler, stale: Stale | None
) -> web.StreamResponse:
    """Answer a call as a fault wants it; raise `DroppedError` where it gets no answer."""
    match fault.kind:
        case "delay":
            await until_lifted(rule, fault.seconds)
            return await handler(request)
        case "status":
            text = f"made by fault {rule.id}" if fault.body is None else fault.body
            return web.Response(status=fault.status, text=text)
        case "reset":
            _reset(request)
            raise DroppedError
        case "hang":
            await rule.lifted.wait()
            _reset(request)
            raise DroppedError
        case "decision" if fault.allow is not None:
            return _decision(fault.allow, fault.reason)
        case "stale" if stale is not None:
            return await stale(request, handler)
    answer = await handler(request)
    body = answer.body if isinstance(answer, web.Response) else None
    if not isinstance(body, bytes | bytearray):
        return answer  # nothing whose bytes could be wrong
    body = bytes(body)
    match fault.kind:
        case "decision":
            return _decision(b'"isAllowed":true' not in body.replace(b" ", b""), fault.reason)
        case "drop":
            await _begin(request, answer, body)
            _reset(request)
            raise DroppedError
        case "slow":
            return await _slowly(rule, fault, request, answer, body)
        case "truncate":
            return _with_body(answer, body[: len(body) // 2])
        case "malformed":
            return _with_body(answer, NOT_JSON)
        case "wrong-type":
            return _with_body(answer, wrong_types(body))
    return answer


def wrong_types(body: bytes) -> bytes:
    """A JSON object with each value of another type; anything else becomes a JSON number."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return b"0"
    return json.dumps({key: _other_type(value) for key, value in document.items()}).encode()


def _other_type(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return {"text": value}
    return "" if isinstance(value, list) else [value]


def _decision(allow: bool, reason: str) -> web.Response:
    return web.json_response(
        {"isAllowed": allow, "reason": "" if allow else reason, "gatewayAppId": "any" if allow else ""}
    )


async def until_lifted(rule: InstalledRule, seconds: float) -> None:
    """Wait so long, or until the fault is lifted."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(rule.lifted.wait(), seconds)


def _with_body(answer: web.StreamResponse, body: bytes) -> web.Response:
    kept = {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}
    return web.Response(status=answer.status, body=body, headers=kept)


async def _begin(request: web.Request, answer: web.StreamResponse, body: bytes) -> None:
    """Send the head, which promises the whole body, and the first half of that."""
    begun = _stream(answer, body)
    await begun.prepare(request)
    await begun.write(body[: len(body) // 2])


async def _slowly(
    rule: InstalledRule, fault: FaultRule, request: web.Request, answer: web.StreamResponse, body: bytes
) -> web.StreamResponse:
    begun = _stream(answer, body)
    await begun.prepare(request)
    size = max(1, -(-len(body) // PIECES))
    for start in range(0, len(body), size):
        await until_lifted(rule, fault.seconds)
        await begun.write(body[start : start + size])
    await begun.write_eof()
    return begun


def _stream(answer: web.StreamResponse, body: bytes) -> web.StreamResponse:
    begun = web.StreamResponse(status=answer.status, headers=answer.headers)
    begun.content_length = len(body)
    return begun


def _reset(request: web.Request) -> None:
    if request.transport is not None:
        reset(request.transport)
