"""The control API over HTTP: JSON in, JSON out, on a port of its own.

On a loopback address it is for programs on this machine; on any other address it demands a token (`control.token`).
A web page must not use it through a browser. Therefore a request with a body must have the content type JSON, and a
request with a foreign Origin is refused, and without a token one with a foreign Host, too. The OpenAPI document at
`/openapi.json` is made from the table of the routes.
"""

import asyncio
import functools
import ipaddress
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic import BaseModel, ValidationError
from yarl import URL

from dstack_emu.attest.strict_json import read_json
from dstack_emu.control.api import Control
from dstack_emu.control.journal_stream import JournalStream
from dstack_emu.control.metrics_route import METRICS, metrics_handler
from dstack_emu.control.route import JSON, Route
from dstack_emu.control.routes import ROUTES, openapi
from dstack_emu.control.schemas import ControlError
from dstack_emu.control.token import is_authorized, is_needed, make_token
from dstack_emu.deployment.config import TOKEN_FILE, TOKEN_VARIABLE
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.observability.spans import working_for
from dstack_emu.observability.w3c_trace import TRACEPARENT, TRACESTATE, read_trace
from dstack_emu.transport.aiohttp_server import JUDGES_PAGES
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.listen import Server, serve
from dstack_emu.transport.validation import describe

MAX_BODY: Final = 32 * 1024 * 1024

_PROTECTION: Final = MappingProxyType(
    {
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
)

_HEALTH: Final = "/health"
"""The path of the API that needs no token: it says only whether the stack is ready."""

_OF_TEXT: Final = MappingProxyType(
    {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "X-Content-Type-Options": "nosniff"}
)
"""Headers of an answer that a browser may show as a document: a picture has a style of its own, and nothing else."""

log = logging.getLogger("dstack_emu.control")


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages for a browser on the port of the API: what adds their routes, and which paths need no token.

    Those paths must say nothing of the stack. All other guards of the API hold for them, too.
    """

    add: Callable[[web.Application], None]
    is_public: Callable[[str], bool]


class ControlService:
    """The control API as a service of a deployment, with the pages that use it, if there are any."""

    names = ("control",)

    def __init__(self, control: Control, deployment: Deployment, pages: Pages | None = None) -> None:
        self._control, self._deployment, self._pages = control, deployment, pages
        self._readiness = Readiness()
        self.token: str | None = None
        """The token that it demands, None if none; known once it has started."""

    async def start(self, sock: socket.socket) -> Server:
        """Serve it on a bound socket; raise `StackError` if its token cannot be used."""
        if is_needed(sock):
            self.token = make_token(self._deployment.config.control_token, self._deployment.state)
        app = control_app(self._control, self._readiness, self.token, self._pages)
        app.router.add_get(METRICS, metrics_handler(self._deployment))
        server = await serve(app, sock)
        self._deployment.services["control"] = server.url
        return server

    async def keys_are_released(self) -> None:
        """Do nothing: it needs no keys."""

    def became_ready(self) -> None:
        """Take the snapshot that `reset` restores, and report from now on that the stack is ready."""
        self._control.became_ready()
        self._readiness.is_ready = True

    async def close(self) -> None:
        """Do nothing: there is only the server."""


@dataclass(slots=True)
class Readiness:
    """Whether the stack is ready, as `/health` reports it."""

    is_ready: bool = False


def control_app(
    control: Control, readiness: Readiness, token: str | None, pages: Pages | None = None
) -> web.Application:
    """Make the application; it demands the token unless that is None."""
    app = web.Application(middlewares=[_guard(token, pages)], client_max_size=MAX_BODY)
    app[JUDGES_PAGES] = True

    description: asyncio.Task[str] | None = None

    async def describe_api(_request: web.Request) -> web.Response:
        nonlocal description
        if description is None:  # made once, and in a thread: it takes as long as dozens of calls
            description = asyncio.create_task(asyncio.to_thread(lambda: json.dumps(openapi())))
        return web.Response(text=await asyncio.shield(description), content_type="application/json")

    async def alive(_request: web.Request) -> web.Response:
        status, said = (200, "ok") if readiness.is_ready else (503, "starting")
        return web.json_response({"status": said, "service": "dstack-emu-control"}, status=status)

    stream = JournalStream(control.journal)
    app.router.add_get("/openapi.json", describe_api)
    app.router.add_get(_HEALTH, alive)
    app.router.add_get("/journal/stream", stream.answer)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, _handler(control, route))
    if pages is not None:
        pages.add(app)
    app.on_shutdown.append(stream.end)
    app.on_response_prepare.append(_protect)
    return app


async def _protect(_request: web.Request, response: web.StreamResponse) -> None:
    """Say in each answer, unless it says more itself, that no page of another origin may load or frame it."""
    for name, value in _PROTECTION.items():
        response.headers.setdefault(name, value)


def _handler(control: Control, route: Route) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        body: Any = None
        if route.body is not None:
            content = await request.read()
            body = await run_aside(len(content), functools.partial(_body_of, route.body, content, route.validates))
        unknown = sorted(request.query.keys() - route.query)
        if unknown:
            known = ", ".join(route.query) or "none"
            raise ControlError(f"{unknown[0]!r:.60} is not a parameter of this call; known: {known}")
        answer = route.run(control, dict(request.match_info), dict(request.query), body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if route.media_type != JSON:
            return web.Response(text=answer, content_type=route.media_type, headers=_OF_TEXT)
        return web.json_response({} if answer is None else answer)

    return handle


def _body_of(schema: type[BaseModel], content: bytes, validates: bool) -> Any:
    """Parse a body, and validate it against the schema if `validates` is set; raise `ControlError`."""
    body = _parsed(content)
    if not validates:
        return body
    try:
        return schema.model_validate({} if body is None else body)
    except ValidationError as error:
        raise ControlError(describe(error, schema.model_fields)) from error


def _parsed(body: bytes) -> Any:
    if not body:
        return None
    try:
        return read_json(body)
    except ValueError as error:
        raise ControlError(f"the body is not JSON: {error}") from error


def _guard(token: str | None, pages: Pages | None) -> Middleware:
    """Make the middleware that refuses who may not call, and turns errors into answers."""

    def is_page(path: str) -> bool:
        return pages is not None and pages.is_public(path)

    def is_public(path: str) -> bool:
        return path == _HEALTH or is_page(path)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if token is None:
            return await _answer(request, handler, needs_local_host=True, can_be_linked=is_page(request.path))
        if not is_public(request.path) and not is_authorized(request.headers.get("Authorization"), token):
            return _unauthorized(request)
        # A page that reaches this by a name of its own (DNS rebinding) has no token, so the name does not matter.
        return await _answer(request, handler, needs_local_host=False, can_be_linked=is_page(request.path))

    return guard


def _unauthorized(request: web.Request) -> web.Response:
    """Answer a request without the token."""
    given = "Authorization" in request.headers
    challenge = 'Bearer realm="dstack-emu control"' + (', error="invalid_token"' if given else "")
    text = (
        f"a token is needed on this address, and {'another' if given else 'none'} was sent. It is in the file "
        f"{TOKEN_FILE} of the stack's state folder. Send it as `Authorization: Bearer TOKEN`; `dstack-emu ctl` "
        f"takes it from --token, {TOKEN_VARIABLE}, or --state DIR"
    )
    return web.json_response({"error": text}, status=401, headers={"WWW-Authenticate": challenge})


async def _answer(
    request: web.Request, handler: Handler, *, needs_local_host: bool, can_be_linked: bool
) -> web.StreamResponse:
    try:
        if needs_local_host:
            _require_local_host(request)
        _require_own_page(request, needs_local_host=needs_local_host, can_be_linked=can_be_linked)
        trace = read_trace(request.headers.getall(TRACEPARENT, []), request.headers.getall(TRACESTATE, []))
        with working_for(trace):
            return await handler(request)
    except ControlError as error:
        return web.json_response({"error": str(error)}, status=error.status)
    except web.HTTPRequestEntityTooLarge:
        text = f"the body: at most {MAX_BODY} bytes expected, got more"
        return web.json_response({"error": text}, status=413)
    except web.HTTPException as error:
        text = f"{request.method} {request.path}: {error.reason}; /openapi.json lists what there is"
        allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None  # RFC 9110: a 405 has it
        return web.json_response({"error": text}, status=error.status, headers=allowed)
    except Exception as error:  # the server's edge
        log.exception("%s %s failed", request.method, request.path)
        return web.json_response({"error": f"internal error: {type(error).__name__}"}, status=500)


def _require_local_host(request: web.Request) -> None:
    """Refuse a request that names this by a foreign name, as after DNS rebinding: raise `ControlError`."""
    host = request.headers.get("Host", "")
    if not _is_local(f"http://{host}"):
        raise ControlError(f"Host: localhost or an IP address expected, got {host!r:.100}", 403)


def _require_own_page(request: web.Request, *, needs_local_host: bool, can_be_linked: bool) -> None:
    """Refuse what a browser would send for a foreign page, except that it may link to a page: raise `ControlError`."""
    site = request.headers.get("Sec-Fetch-Site", "none")  # pages of other ports are `same-site`
    is_link = can_be_linked and request.method == "GET" and request.headers.get("Sec-Fetch-Dest") == "document"
    if site not in ("same-origin", "none") and not is_link:
        raise ControlError(f"Sec-Fetch-Site: pages of other hosts or ports may not use this; got {site!r:.40}", 403)
    origin = request.headers.get("Origin")
    if origin is not None and not (_is_own(origin, request) and (_is_local(origin) or not needs_local_host)):
        raise ControlError(f"Origin: pages of other hosts may not use this; got {origin!r:.100}", 403)
    has_body = request.method in ("POST", "PUT", "PATCH") and request.match_info.http_exception is None
    if has_body and request.content_type != "application/json":
        raise ControlError(f"Content-Type: application/json expected, got {request.content_type!r:.100}", 415)


def _is_own(origin: str, request: web.Request) -> bool:
    try:
        return URL(origin).host == request.url.host
    except ValueError:
        return False


def _is_local(url: str) -> bool:
    try:
        host = URL(url).host
    except ValueError:
        return False
    if host is None:
        return False
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
