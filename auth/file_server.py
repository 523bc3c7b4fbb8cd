"""dstack-auth's HTTP front: three routes, and the refusals of the web framework that upstream is written with.

The body is read as JSON whatever its content type is. A body that is not JSON is a 400, JSON of another shape a 422, a
body over the limit a 413, another path or method a 404: each is a page, or JSON if Accept asks for it. Two routes are
ours, `GET /health` and `GET /openapi.json`. Binds no socket, reads no environment and knows no command line.

Source: dstack next 312dc605, `crates/dstack-auth/src/main.rs`; Rocket's `serde::json` (statuses and limit).
"""

import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Final

from aiohttp import web

from dstack_emu.auth import openapi
from dstack_emu.auth.allowlist import normalize_id, parse_allowlist_boot_info
from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.errors import MalformedJsonError, MistypedBootInfoError
from dstack_emu.auth.file import FileAuth
from dstack_emu.transport.prpc_server import status_page

MAX_ALLOWLIST_BODY_SIZE: Final = 1024 * 1024
"""Bytes of a request body: so many are read, one more is refused."""

_TITLE: Final = "dstack-auth: boot authorization by an allowlist file"

_log = logging.getLogger("dstack_emu.auth.file")


def file_app(config_path: Path | str) -> web.Application:
    """Build dstack-auth over one allowlist file.

    Logs upstream's line for each decision to `auth.file`, and a warning for a file that cannot be used.
    """
    service = FileAuth(config_path)
    app = web.Application(client_max_size=MAX_ALLOWLIST_BODY_SIZE)
    app.add_routes(
        [
            _get("/", service.info()),
            _get("/health", {"status": "ok"}),
            _get("/openapi.json", openapi.allowlist_document(_TITLE)),
            web.post("/bootAuth/app", _boot_auth(service, is_kms=False)),
            web.post("/bootAuth/kms", _boot_auth(service, is_kms=True)),
            web.route("*", r"/{path:[\s\S]*}", _not_found),
        ]
    )
    return app


def _get(path: str, answer: dict[str, object]) -> web.RouteDef:
    async def handle(_request: web.Request) -> web.Response:
        return _json_response(answer)

    return web.get(path, handle)


async def _not_found(request: web.Request) -> web.Response:
    return status_page(HTTPStatus.NOT_FOUND, request)


def _boot_auth(service: FileAuth, *, is_kms: bool) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            boot_info = parse_allowlist_boot_info(await request.read())
        except (MalformedJsonError, web.RequestPayloadError):
            return status_page(HTTPStatus.BAD_REQUEST, request)
        except MistypedBootInfoError:
            return status_page(HTTPStatus.UNPROCESSABLE_ENTITY, request)
        except web.HTTPRequestEntityTooLarge:
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


def _subject(boot_info: ReceivedBootInfo, is_kms: bool) -> str:
    if is_kms:
        return f"mr={normalize_id(boot_info.mr_aggregated)}"
    return f"app={normalize_id(boot_info.app_id)} compose={normalize_id(boot_info.compose_hash)}"


def _boot_response(decision: PolicyDecision) -> web.Response:
    return _json_response(
        {
            "isAllowed": decision.is_allowed,
            "gatewayAppId": decision.gateway_app_id,
            "reason": decision.reason,
        }
    )


def _json_response(answer: dict[str, object]) -> web.Response:
    text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return web.Response(body=text.encode(), headers={"Content-Type": "application/json"})
