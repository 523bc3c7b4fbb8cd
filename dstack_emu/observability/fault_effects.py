"""What a fault does to one call by HTTP: an answer that is late, wrong, cut off or none at all."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from dstack_emu.observability.fault_rules import FaultRule, InstalledRule
from dstack_emu.observability.http_call import HttpCall
from dstack_emu.transport.http import Response
from dstack_emu.transport.listen import reset

PIECES: Final = 20
"""In so many pieces a slow body comes, `seconds` between them."""

NOT_JSON: Final = b'{"\xff\x00 malformed by a fault'

Stale = Callable[[HttpCall], Awaitable[Response]]
"""Answers a request for collateral with a document that has expired."""


class DroppedError(ConnectionError):
    """The connection was dropped on purpose: there is nothing to answer on."""


async def apply_fault(rule: InstalledRule, fault: FaultRule, call: HttpCall, stale: Stale | None) -> Response:
    """Answer a call as a fault wants it; raise `DroppedError` if it gets no answer."""
    match fault.kind:
        case "delay":
            await until_lifted(rule, fault.seconds)
            return await call.proceed()
        case "status":
            text = f"made by fault {rule.id}" if fault.body is None else fault.body
            return Response.of(text, "text/plain", fault.status)
        case "reset":
            raise _dropped(call)
        case "hang":
            await rule.lifted.wait()
            raise _dropped(call)
        case "decision" if fault.allow is not None:
            return _decision(fault.allow, fault.reason)
        case "stale" if stale is not None:
            return await stale(call)
    answer = await call.proceed()
    return _damaged(rule, fault, call, answer, answer.body) if isinstance(answer.body, bytes) else answer


def _damaged(rule: InstalledRule, fault: FaultRule, call: HttpCall, answer: Response, body: bytes) -> Response:
    match fault.kind:
        case "decision":
            return _decision(b'"isAllowed":true' not in body.replace(b" ", b""), fault.reason)
        case "drop":
            return replace(answer, body=_cut_off(call, body), length=len(body))
        case "slow":
            return replace(answer, body=_slowly(rule, fault, body), length=len(body))
        case "truncate":
            return replace(answer, body=body[: len(body) // 2])
        case "malformed":
            return replace(answer, body=NOT_JSON)
        case "wrong-type":
            return replace(answer, body=wrong_types(body))
    return answer


def wrong_types(body: bytes) -> bytes:
    """Give each value of a JSON object another type; anything else becomes a JSON number."""
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


def _decision(allow: bool, reason: str) -> Response:
    decision = {"isAllowed": allow, "reason": "" if allow else reason, "gatewayAppId": "any" if allow else ""}
    return Response.of(json.dumps(decision).encode(), "application/json")


async def until_lifted(rule: InstalledRule, seconds: float) -> None:
    """Wait so long, or until the fault is lifted."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(rule.lifted.wait(), seconds)


async def _cut_off(call: HttpCall, body: bytes) -> AsyncIterator[bytes]:
    """Give half of a body that was promised whole, then drop the connection."""
    yield body[: len(body) // 2]
    raise _dropped(call)


async def _slowly(rule: InstalledRule, fault: FaultRule, body: bytes) -> AsyncIterator[bytes]:
    size = max(1, -(-len(body) // PIECES))
    for start in range(0, len(body), size):
        await until_lifted(rule, fault.seconds)
        yield body[start : start + size]


def _dropped(call: HttpCall) -> DroppedError:
    """Reset a call's connection, and return the error that ends the call."""
    if call.transport is not None:
        reset(call.transport)
    return DroppedError("a fault dropped the connection")
