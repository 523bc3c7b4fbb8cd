"""The verifier over HTTP: `POST /verify` and `GET /health`.

What is wrong with evidence is an answer (200), what is wrong with a request a page: 400 where it is no JSON, 422 where
it is another JSON, 413 where it is longer than upstream's web server reads, 404 for all else.
"""

import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from dstack_emu.transport.prpc_server import status_page
from dstack_emu.verifier.service import (
    InputError,
    RequestSyntaxError,
    RequestTypeError,
    VerificationRequest,
    VerificationResponse,
    Verifier,
)

MAX_BODY: Final = 1024 * 1024
"""Bytes of a request: what Rocket takes as JSON."""

log = logging.getLogger(__name__)


Observer = Callable[[VerificationResponse], None]
"""Told of each verdict."""


def verifier_app(verifier: Verifier, *, observer: Observer | None = None) -> web.Application:
    """Make the service's application; `observer` is told of each verdict before it is answered."""

    async def verify(request: web.Request) -> web.Response:
        body = await _read(request)
        if body is None:
            return status_page(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, request)
        try:
            question = VerificationRequest.parse(body)
        except RequestSyntaxError as error:
            log.info("no JSON: %s", error)
            return status_page(HTTPStatus.BAD_REQUEST, request)
        except RequestTypeError as error:
            log.info("no request: %s", error)
            return status_page(HTTPStatus.UNPROCESSABLE_ENTITY, request)
        try:
            response = await verifier.verify(question)
        except InputError as error:
            log.info("%s", error)
            response = VerificationResponse.internal_error(error.outer)
        if observer is not None:
            observer(response)
        return _json(response.to_document())

    async def health(request: web.Request) -> web.Response:
        return _json({"status": "ok", "service": "dstack-verifier"})

    app = web.Application(middlewares=[_answer_unserved])
    app.router.add_post("/verify", verify)
    app.router.add_get("/health", health)
    return app


@web.middleware
async def _answer_unserved(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.match_info.http_exception is None:
        return await handler(request)
    return status_page(HTTPStatus.NOT_FOUND, request)


async def _read(request: web.Request) -> bytes | None:
    """Read the body, or nothing where it is too long."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def _json(document: object) -> web.Response:
    return web.Response(body=json.dumps(document, separators=(",", ":")).encode(), content_type="application/json")
