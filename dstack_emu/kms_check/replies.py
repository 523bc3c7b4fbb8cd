"""Answers of a webhook that are no decision: none of them may count as permission."""

import gzip
import json
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from dstack_emu.kms_check.webhook import ALLOW, DENY, Reply, answer_json
from dstack_emu.transport.http import Request, Response
from dstack_emu.transport.listen import reset

_MIB: Final = 1 << 20
_ALLOWING: Final = json.dumps(ALLOW).encode()


def answer(status: int, body: bytes = b"", **headers: str) -> Reply:
    """Answer with a status and a body."""

    async def reply(request: Request) -> Response:
        return Response.of(body, "application/json", status, **headers)

    return reply


def document(value: object) -> Reply:
    """Answer 200 with JSON."""
    return answer(200, json.dumps(value).encode())


def changed(**members: Any) -> Reply:
    """Answer 200 with a permission of which some members are different."""
    return document({**ALLOW, **members})


def without(member: str) -> Reply:
    """Answer 200 with a permission that lacks a member."""
    return document({name: value for name, value in ALLOW.items() if name != member})


async def _reset(request: Request) -> Response:
    reset(request.transport)
    return Response()


async def _close(request: Request) -> Response:
    request.transport.close()
    return Response()


async def _cut_off(request: Request) -> Response:
    async def half() -> AsyncIterator[bytes]:
        yield _ALLOWING[: len(_ALLOWING) // 2]
        raise ConnectionError("cut off on purpose")

    return Response(200, half(), (("Content-Type", "application/json"),), len(_ALLOWING))


async def _no_http(request: Request) -> Response:
    request.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    request.transport.close()
    return Response()


async def _denies_then_allows(request: Request) -> Response:
    """Deny, and send a permission after it on the same connection: no later request may use that as its answer."""
    denial = json.dumps(DENY).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(denial)
    request.transport.write(head + denial)
    return answer_json(ALLOW)


NO_DECISION: Final[Mapping[str, tuple[Reply, str]]] = MappingProxyType(
    {
        "500": (answer(500, b"oops"), "returned 500 Internal Server Error: oops"),
        "500-allows": (answer(500, _ALLOWING), "returned 500 Internal Server Error: "),
        "503-allows": (answer(503, _ALLOWING), "returned 503 Service Unavailable: "),
        "404": (answer(404, b"404 Not Found"), "returned 404 Not Found: "),
        "401-allows": (answer(401, _ALLOWING), "returned 401 Unauthorized: "),
        "302": (answer(302, Location="/"), ""),
        "307": (answer(307, Location="/"), ""),
        "204": (answer(204), "failed to decode response from "),
        "empty": (answer(200), "failed to decode response from "),
        "html": (answer(200, b"<html>hi</html>"), "failed to decode response from "),
        "half": (answer(200, _ALLOWING[:-1]), "failed to decode response from "),
        "trailing": (answer(200, _ALLOWING + b"}"), "failed to decode response from "),
        "utf-16": (answer(200, json.dumps(ALLOW).encode("utf-16")), "failed to decode response from "),
        "null": (document(None), "failed to decode response from "),
        "true": (document(True), "failed to decode response from "),
        "list": (document([]), "failed to decode response from "),
        "nested": (answer(200, b"[" * 100_000), "failed to decode response from "),
        "huge": (answer(200, _ALLOWING + b" " * (2 * _MIB) + b"x"), ""),
        "garbled-gzip": (answer(200, gzip.compress(_ALLOWING)[:-9], Content_Encoding="gzip"), ""),
        "no-isAllowed": (without("isAllowed"), "missing field `isAllowed`"),
        "no-reason": (without("reason"), "missing field `reason`"),
        "no-gatewayAppId": (without("gatewayAppId"), "missing field `gatewayAppId`"),
        "isAllowed-text": (changed(isAllowed="true"), "failed to decode response from "),
        "isAllowed-number": (changed(isAllowed=1), "failed to decode response from "),
        "isAllowed-list": (changed(isAllowed=[True]), "failed to decode response from "),
        "isAllowed-null": (changed(isAllowed=None), "failed to decode response from "),
        "isAllowed-twice": (answer(200, b'{"isAllowed":false,' + _ALLOWING[1:]), "duplicate field `isAllowed`"),
        "is_allowed": (document({"is_allowed": True, "reason": "", "gatewayAppId": ""}), "missing field `isAllowed`"),
        "reason-null": (changed(reason=None), "failed to decode response from "),
        "gatewayAppId-number": (changed(gatewayAppId=1), "failed to decode response from "),
        "closed": (_close, "error sending request for url "),
        "reset": (_reset, "error sending request for url "),
        "cut-off": (_cut_off, ""),
        "no-http": (_no_http, "error sending request for url "),
    }
)
"""Answers by name, each with a part of upstream's refusal; empty if a KMS may say anything."""

DENIALS: Final[Mapping[str, tuple[Reply, str]]] = MappingProxyType(
    {
        "denied": (document(DENY), str(DENY["reason"])),
        "denied-without-reason": (document({**DENY, "reason": ""}), ""),
        "denied-then-allowed-late": (_denies_then_allows, str(DENY["reason"])),
    }
)
"""Answers that are decisions, and deny."""
