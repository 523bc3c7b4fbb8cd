"""The effects of fault rules on one HTTP call: its answer comes late, wrong or cut off, or does not come."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from dstack_emu.observability.fault_rules import KINDS_OF_CHAIN, FaultRule, InstalledRule
from dstack_emu.observability.http_call import HttpCall
from dstack_emu.transport.http import Response
from dstack_emu.transport.listen import reset

PIECES: Final = 20
"""The number of pieces in which a slow body is sent, `seconds` apart."""

NOT_JSON: Final = b'{"\xff\x00 malformed by a fault'

Stale = Callable[[HttpCall], Awaitable[Response]]
"""A handler that answers a request for collateral with an expired document."""


class DroppedError(ConnectionError):
    """A fault dropped the connection, so nothing can be answered."""


OwnFault = Callable[[FaultRule, HttpCall], Awaitable[Response]]
"""A handler that answers with a fault that the chain of a stack alone has."""


async def apply_fault(
    rule: InstalledRule, fault: FaultRule, call: HttpCall, stale: Stale | None, own: OwnFault | None = None
) -> Response:
    """Apply a fault to a call and return the answer; raise `DroppedError` if the fault drops the connection."""
    if own is not None and fault.kind in ("stale", *KINDS_OF_CHAIN):
        return await own(fault, call)
    match fault.kind:
        case "delay":
            await until_lifted(rule, fault.seconds)
            return await call.proceed()
        case "status":
            return Response.of(*(fault.content or (f"made by fault {rule.id}", "text/plain")), fault.status)
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
            return replace(answer, body=wrong_json_types(body))
    return answer


def wrong_json_types(body: bytes) -> bytes:
    """Return a JSON object whose values have other types than before; for anything else, the JSON number 0."""
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
    """Wait for some seconds, or until the fault is lifted if that is sooner."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(rule.lifted.wait(), seconds)


async def _cut_off(call: HttpCall, body: bytes) -> AsyncIterator[bytes]:
    """Yield the first half of a body whose full length was announced, then drop the connection."""
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
