"""dstack-auth's HTTP server: three routes, and the refusals of the web framework that upstream is written with.

The body is read as JSON whatever its content type is. A body that is not JSON is a 400, JSON of another shape a 422, a
body over the limit a 413, another path or method a 404: each is a page, or JSON if Accept names it. Two routes are
ours, `GET /health` and `GET /openapi.json`. Binds no socket, reads no environment and knows no command line.

Source: dstack next 312dc605, `crates/dstack-auth/src/main.rs`; Rocket's `serde::json` (statuses and limit).
"""

import json
import logging
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Final

from dstack_emu.auth import openapi
from dstack_emu.auth.allowlist import normalize_id, parse_allowlist_boot_info
from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.errors import AuthConfigError, MalformedJsonError, MistypedBootInfoError, OversizedJsonError
from dstack_emu.auth.file import FileAuth
from dstack_emu.transport.http import (
    ROCKET_HEADERS,
    Application,
    BodyBrokenError,
    BodyTooLargeError,
    Handler,
    Request,
    Response,
    status_page,
)

MAX_ALLOWLIST_BODY_SIZE: Final = 1024 * 1024
"""Bytes of a request body: so many are read, one more is refused."""

_TITLE: Final = "dstack-auth: boot authorization by an allowlist file"

_log = logging.getLogger("dstack_emu.auth.file")


def file_app(config_path: Path | str) -> Application:
    """Build dstack-auth over one allowlist file.

    Logs upstream's line for each decision to `auth.file`, and a warning for a file that cannot be used.
    """
    service = FileAuth(config_path)
    with suppress(AuthConfigError):  # each request reports it
        service.allowlist()  # warns about keys that nothing reads before the first request comes
    app = Application(headers=ROCKET_HEADERS, max_body=MAX_ALLOWLIST_BODY_SIZE)
    app.add("GET", "/", _always(service.info()))
    app.add("GET", "/health", _always({"status": "ok"}))
    app.add("GET", "/openapi.json", _always(openapi.allowlist_document(_TITLE)))
    app.add("POST", "/bootAuth/app", _boot_auth(service, is_kms=False))
    app.add("POST", "/bootAuth/kms", _boot_auth(service, is_kms=True))
    return app


def _always(answer: dict[str, object]) -> Handler:
    async def handle(_request: Request) -> Response:
        return _json_response(answer)

    return handle


def _boot_auth(service: FileAuth, *, is_kms: bool) -> Handler:
    async def handle(request: Request) -> Response:
        try:
            boot_info = parse_allowlist_boot_info(await request.read())
        except (MalformedJsonError, BodyBrokenError):
            return status_page(HTTPStatus.BAD_REQUEST, request)
        except MistypedBootInfoError:
            return status_page(HTTPStatus.UNPROCESSABLE_ENTITY, request)
        except OversizedJsonError as error:
            return Response.of(f"Request body: {error}", "text/plain", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        except BodyTooLargeError:
            return status_page(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, request)
        decision = service.decide(boot_info, is_kms)
        _log_decision(boot_info, is_kms, decision)
        return _boot_response(decision)

    return handle


def _log_decision(boot_info: ReceivedBootInfo, is_kms: bool, decision: PolicyDecision) -> None:
    if decision.config_error:
        _log.warning("%s; denying all", decision.config_error)
    _log.info(
        "bootAuth/%s %s -> allowed=%s (%s)",
        "kms" if is_kms else "app",
        _subject(boot_info, is_kms),
        "true" if decision.is_allowed else "false",
        decision.reason,
    )
    if decision.refusal is not None:
        _log.info("denied by rule %s: %s", decision.rule, decision.refusal)


def _subject(boot_info: ReceivedBootInfo, is_kms: bool) -> str:
    if is_kms:
        return f"mr={normalize_id(boot_info.mr_aggregated)}"
    return f"app={normalize_id(boot_info.app_id)} compose={normalize_id(boot_info.compose_hash)}"


def _boot_response(decision: PolicyDecision) -> Response:
    return _json_response(
        {
            "isAllowed": decision.is_allowed,
            "gatewayAppId": decision.gateway_app_id,
            "reason": decision.reason,
        }
    )


def _json_response(answer: dict[str, object]) -> Response:
    text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return Response.of(text.encode(), "application/json")
