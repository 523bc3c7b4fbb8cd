"""pRPC over HTTP: puts the RPCs of a service table under a path of an aiohttp application.

One order for every call, as upstream: context (who asks; for a KMS that verifies the client certificate's
attestation), body, name, decode, handler, encode. What the caller may know is an HTTP 400 with the text of
the error, whatever went wrong; the rest is logged here and answered without details.

A call comes as aiohttp's request, or as a plain one that never was one (dstack_emu/transport/plain.py); they differ in
cost alone.

Not here: sockets (dstack_emu/transport/listen.py), encodings (dstack_emu/attest/prpc.py), and any service.

Source of truth: Dstack-TEE/dstack, branch next at 312dc605, dstack/ra-rpc/src/rocket_helper.rs, and recorded
answers of the real programs.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, Protocol, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.prpc import (
    BINARY_TYPE,
    JSON_TYPE,
    decode_binary,
    decode_json,
    decode_query,
    encode_binary,
    encode_json,
    error_body,
    trim_prefix,
    wants_json,
)
from dstack_emu.transport.plain import PlainAnswer, PlainRequest, plain_calls
from dstack_emu.transport.service import ServiceTable
from dstack_emu.transport.status import reason_phrase, status_line

C = TypeVar("C")

MAX_BODY: Final = 10 * 1024 * 1024
"""Bytes of a request body: so many are accepted, one more is not."""

_log = logging.getLogger(__name__)

Answered = Callable[[str, bool], None]
"""Hears of every call that was answered: what its path had behind the mount, and whether it was refused."""


class Asked(Protocol):
    """What is known of a call before it is read: where it went, and the connection that it came on."""

    @property
    def path(self) -> str: ...

    @property
    def transport(self) -> asyncio.Transport | None: ...


_MOUNTS: Final = web.AppKey("prpc_mounts", dict[str, Answered | None])
"""Where an application serves pRPC, and who hears of the calls there."""


class _CallError(Exception):
    """A call that reaches no handler; the text is for the caller."""


def add_prpc(
    app: web.Application,
    mount: str,
    table: ServiceTable[C],
    context: Callable[[Asked], Awaitable[C]],
    *,
    errors: tuple[type[Exception], ...],
    trim: bool = True,
    answered: Answered | None = None,
) -> None:
    """Serve `table` at POST and GET `<mount>/<Method>`; `mount` is empty or starts with a slash.

    `context` is awaited first, before the body is read. An exception of `errors`, or an AttestError, from it
    or from a handler becomes an HTTP 400 with its text; any other is logged with its traceback and answered by
    its type's name alone. Without `trim`, names that carry the table's prefix are unknown.

    The application's answer to what nobody serves becomes upstream's page: 404 also for a wrong verb, and 422
    for a mount without a method. A page of the owner's own at `<mount>/` goes before it.
    """
    prefix = table.prefix if trim else ""
    refusals: tuple[type[Exception], ...] = (_CallError, AttestError, *errors)

    async def answer(
        asked: Asked, verb: str, name: str, query: str, content_type: str | None, read: Callable[[], Awaitable[bytes]]
    ) -> PlainAnswer:
        as_json = wants_json(verb, query)
        try:
            ctx = await context(asked)
            body = b"" if verb == "GET" else await read()
            as_json = wants_json(verb, query, content_type)
            rpc = table.rpcs.get(name)
            if rpc is None:
                raise _CallError(f"Service not found: {name}")
            if verb == "GET":
                message = decode_query(rpc.request_type, query)
            elif as_json:
                message = decode_json(rpc.request_type, body)
            else:
                message = decode_binary(rpc.request_type, body)
            reply = await rpc.handler(ctx, message)
            given = _answer(200, encode_json(reply) if as_json else encode_binary(reply), as_json)
        except refusals as error:
            given = _answer(400, error_body(str(error), as_json), as_json)
        except Exception as error:
            _log.exception("%r failed", table.prefix + name)  # the name may be anything
            given = _answer(400, error_body(f"internal error: {type(error).__name__}", as_json), as_json)
        if answered is not None:
            answered(asked.path[len(mount) + 1 :], given.status != 200)
        return given

    async def call(request: web.Request) -> web.Response:
        verb = "GET" if request.method == "HEAD" else request.method
        name = trim_prefix(request.match_info["method"], prefix)
        query, content_type = request.rel_url.raw_query_string, request.headers.get("Content-Type")
        given = await answer(request, verb, name, query, content_type, lambda: _read_body(request))
        return given.response()

    plain = plain_calls(app)

    async def plain_call(request: PlainRequest) -> PlainAnswer:
        name = trim_prefix(request.path[len(mount) + 1 :], prefix)
        return await answer(request, "POST", name, request.query, request.content_type, request.read)

    if _MOUNTS not in app:
        app[_MOUNTS] = {}
        app.middlewares.append(_answer_unserved)
        plain.passable.add(_answer_unserved)  # a plain call has a method that is served
    app[_MOUNTS][mount] = answered
    # Slashes before the method count once, however many there are.
    path = mount + "/{_:/*}{method:[^/]+}"
    app.router.add_post(path, call)
    app.router.add_get(path, call)
    for name in table.rpcs:
        for spelling in (name, prefix + name):
            plain.handlers[f"{mount}/{spelling}"] = plain_call


def _answer(status: int, body: bytes, as_json: bool) -> PlainAnswer:
    return PlainAnswer(status, JSON_TYPE if as_json else BINARY_TYPE, body)


async def _read_body(request: web.Request) -> bytes:
    chunks = []
    size = 0
    try:
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > MAX_BODY:
                raise _CallError("failed to read data: payload too large")
            chunks.append(chunk)
    except (web.RequestPayloadError, ConnectionError) as error:
        raise _CallError("failed to read data: the body broke off") from error
    return b"".join(chunks)


@web.middleware
async def _answer_unserved(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.match_info.http_exception is None:
        return await handler(request)
    mounts = request.app[_MOUNTS]
    for mount, answered in mounts.items():
        if answered is not None and request.path.startswith(f"{mount}/"):
            answered(request.path[len(mount) + 1 :], True)
    at_mount = request.path[-1:] == "/" and request.path[:-1] in mounts and request.method in ("GET", "HEAD", "POST")
    return status_page(HTTPStatus.UNPROCESSABLE_ENTITY if at_mount else HTTPStatus.NOT_FOUND, request)


def status_page(status: HTTPStatus, request: web.Request) -> web.Response:
    """Answer by a status alone, as upstream's web server does: a page, or JSON where Accept prefers it."""
    reason = reason_phrase(status)
    if _prefers_json(request.headers.get("Accept", "")):
        error = {"code": status.value, "reason": reason, "description": status.description}
        body = json.dumps({"error": error}, indent=2).encode()
        return web.Response(status=status, reason=reason, body=body, content_type=JSON_TYPE)
    title = status_line(status)
    page = f"<!DOCTYPE html>\n<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"
    return web.Response(status=status, reason=reason, text=page, content_type="text/html")


def _prefers_json(accept: str) -> bool:
    """Whether JSON is the first choice of an Accept header: highest q, then no wildcard, then first named."""
    best, best_rank = "", (0.0, 0)
    for choice in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in choice.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            rank = (float(quality), -kind.count("*"))
        except ValueError:
            continue
        if rank > best_rank:
            best, best_rank = kind, rank
    return best == JSON_TYPE
