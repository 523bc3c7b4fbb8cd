"""The ids that mean the gateway itself: `gateway` with its pages, and `health`, which is deprecated.

Source: `handle_this_node` and `handle_health_check` in `gateway/src/proxy/tls_terminate.rs` of dstack 312dc605.
"""

import json
from collections.abc import Awaitable, Mapping
from http import HTTPStatus
from typing import Any, Final, Protocol

from dstack_emu.gateway.errors import GatewayError
from dstack_emu.transport.http import Application, Handler, Request, Response
from dstack_emu.transport.http.protocol import HttpServer

GATEWAY: Final = "gateway"
HEALTH: Final = "health"

_PREFIX: Final = "/.dstack"
_INDEX: Final = {"type": "dstack gateway", "paths": ["/index", "/app-info", "/acme-info"]}


class ThisNode(Protocol):
    """What the gateway tells about itself, as JSON. Both raise `GatewayError` if it cannot be had."""

    async def app_info(self) -> Mapping[str, Any]:
        """Return what its guest agent's `Info` says."""
        ...

    async def acme_info(self) -> Mapping[str, Any]:
        """Return what its RPC `AcmeInfo` says."""
        ...


def special_pages(node: ThisNode) -> Mapping[str, HttpServer]:
    """Make the servers of the special ids."""
    return {GATEWAY: _server(_gateway_pages(node)), HEALTH: _server(_health)}


def _server(handler: Handler) -> HttpServer:
    app = Application()
    app.add_finder(lambda _: handler)
    return HttpServer(app)


def _gateway_pages(node: ThisNode) -> Handler:
    async def answer(request: Request) -> Response:
        if request.method != "GET":
            return Response(HTTPStatus.METHOD_NOT_ALLOWED)
        if request.path == "/health":
            return Response()
        path = request.path
        while path.startswith(_PREFIX):
            path = path.removeprefix(_PREFIX)
        match path:
            case "/index":
                return _json(_INDEX)
            case "/app-info":
                return await _told(node.app_info())
            case "/acme-info":
                return await _told(node.acme_info())
        return Response(HTTPStatus.NOT_FOUND)

    return answer


async def _health(request: Request) -> Response:
    is_known = request.method == "GET" and request.path == "/"
    return Response(HTTPStatus.OK if is_known else HTTPStatus.NOT_FOUND)


async def _told(content: Awaitable[Mapping[str, Any]]) -> Response:
    try:
        return _json(await content)
    except GatewayError as error:
        return Response.of(f"{error}\n", "text/plain", HTTPStatus.SERVICE_UNAVAILABLE)


def _json(content: Mapping[str, Any]) -> Response:
    body = json.dumps(content, separators=(",", ":")).encode()
    return Response(body=body, headers=(("Content-Type", "application/json"),))
