"""The verifier over HTTP: `POST /verify` and `GET /health`.

What is wrong with evidence is an answer (200), what is wrong with a request a page: 400 where it is no JSON, 422 where
it is another JSON, 413 where it is longer than upstream's web server reads, 404 for all else.
"""

import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.http import (
    ROCKET_HEADERS,
    Application,
    BodyBrokenError,
    BodyError,
    BodyTooLargeError,
    Request,
    Response,
    status_page,
)
from dstack_emu.verifier.service import (
    InputError,
    RequestSyntaxError,
    RequestTooLargeError,
    RequestTypeError,
    VerificationRequest,
    VerificationResponse,
    Verifier,
)

MAX_BODY: Final = 1024 * 1024
"""The maximum length of a request in bytes, which is Rocket's limit for JSON."""

log = logging.getLogger(__name__)


VerdictObserver = Callable[[VerificationResponse], None]
"""Is called with each verdict."""


def verifier_app(verifier: Verifier, *, observer: VerdictObserver | None = None) -> Application:
    """Make the service's application; `observer` is called with each verdict before it is answered."""

    async def verify(request: Request) -> Response:
        try:
            body = await request.read()
            parsed = await run_aside(len(body), lambda: VerificationRequest.parse(body))
        except RequestTooLargeError as error:
            log.info("%s: %s", type(error).__name__, error)
            return Response.of(f"Request body: {error}", "text/plain", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        except (BodyError, RequestSyntaxError, RequestTypeError) as error:
            log.info("%s: %s", type(error).__name__, error)
            return status_page(_STATUSES[type(error)], request)
        try:
            response = await verifier.verify(parsed)
        except InputError as error:
            log.info("%s", error)
            response = VerificationResponse.internal_error(error.outer)
        if observer is not None:
            observer(response)
        return _json(response.to_document())

    app = Application(headers=ROCKET_HEADERS, max_body=MAX_BODY)
    app.add("POST", "/verify", verify)
    app.add("GET", "/health", _health)
    return app


_STATUSES: Final[dict[type[Exception], HTTPStatus]] = {
    BodyTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    BodyBrokenError: HTTPStatus.BAD_REQUEST,
    RequestSyntaxError: HTTPStatus.BAD_REQUEST,
    RequestTypeError: HTTPStatus.UNPROCESSABLE_ENTITY,
}
"""The answer to an invalid request."""


async def _health(_request: Request) -> Response:
    return _json({"status": "ok", "service": "dstack-verifier"})


def _json(document: object) -> Response:
    return Response.of(json.dumps(document, separators=(",", ":")).encode(), "application/json")
