"""The VMM's HTTP server: RPCs, guest API, logs, a list of machines, OpenAPI; behind the credentials of vmm.toml.

Source: dstack `vmm/src/{main,main_routes}.rs` at 312dc605.
"""

import json
import re
from collections.abc import AsyncIterator
from http import HTTPStatus
from urllib.parse import parse_qs

from dstack_emu.attest.release import Release
from dstack_emu.transport.api_auth import Credentials, ListenerAuth
from dstack_emu.transport.html import content_security_policy
from dstack_emu.transport.http import Application, Handler, Request, Response, status_page
from dstack_emu.transport.prpc_server import RpcStatuses, add_prpc
from dstack_emu.vmm.config import AuthSection
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.guest_service import guest_table
from dstack_emu.vmm.logs import CHANNELS, DEFAULT_LINES
from dstack_emu.vmm.openapi import openapi
from dstack_emu.vmm.page import machines_page
from dstack_emu.vmm.service import VmmService, vmm_table
from dstack_emu.vmm.service_v05 import v05_table

_PAGES = (
    ("/", "The list of machines"),
    ("/logs", "A log of a machine"),
    ("/health", "Whether it answers"),
    ("/api-docs/openapi.json", "This document"),
)
_USIZE = re.compile(r"\+?0*[0-9]{1,20}", re.ASCII)
_TRUE = ("", "true", "on", "yes")
_FALSE = ("false", "off", "no")


def vmm_app(fleet: Fleet) -> Application:
    """Make the application; raise `ConfigError` if the htpasswd file cannot be used."""
    release = fleet.release
    headers = (("X-App-Version", f"v{release.version} (git:{release.revision})"), ("X-Accel-Buffering", "no"))
    auth = _auth(fleet.config.auth, release)
    guards = [auth.middleware(fleet.log)] if release.vmm_guards_every_route else []
    app = Application(headers=headers, middlewares=guards)
    logs = _logs(fleet)
    app.add("GET", "/logs", logs if release.vmm_guards_every_route else _for_bearers(auth, logs))
    app.add("GET", "/", _page(fleet))
    app.add("GET", "/health", _health)
    rpcs = vmm_table(VmmService(fleet))
    tables = {"/prpc": v05_table(rpcs) if release.vmm_v05_messages else rpcs, "/guest": guest_table(fleet)}
    for mount, table in tables.items():
        trims = mount == "/prpc"
        add_prpc(app, mount, table, _anyone, errors=(VmmError,), trim=trims, statuses=RpcStatuses.of(release))
    document = json.dumps(openapi(headers[0][1], tables, _PAGES), indent=2).encode()

    async def describe(_request: Request) -> Response:
        return Response.of(document, "application/json")

    app.add("GET", "/api-docs/openapi.json", describe)
    return app


def _auth(section: AuthSection, release: Release) -> ListenerAuth:
    """Return the credentials of the listener: enabled with none configured, it admits nobody."""
    users = section.htpasswd_file if release.vmm_guards_every_route else ""
    known = Credentials.of(section.tokens, users, "auth.htpasswd_file") if section.enabled else None
    return ListenerAuth("vmm", "dstack-vmm API", "X-Admin-Token", known, takes_query=True)


def _for_bearers(auth: ListenerAuth, handler: Handler) -> Handler:
    """Let a handler answer those alone who send a token as Bearer, as 0.5 does."""

    async def guarded(request: Request) -> Response:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        known = auth.credentials
        if known is None or (scheme == "Bearer" and known.admit_token(token)):
            return await handler(request)
        return status_page(HTTPStatus.UNAUTHORIZED, request)

    return guarded


async def _health(_request: Request) -> Response:
    return Response.of('{"status": "ok", "service": "dstack-emu-vmm"}', "application/json")


async def _anyone(_request: Request) -> None:
    """Make no difference between callers: the credentials were checked before."""


def _page(fleet: Fleet) -> Handler:
    async def page(_request: Request) -> Response:
        return Response.of(machines_page(fleet), "text/html", Content_Security_Policy=content_security_policy())

    return page


def _logs(fleet: Fleet) -> Handler:
    async def logs(request: Request) -> Response:
        query = {name: values[-1] for name, values in parse_qs(request.query, keep_blank_values=True).items()}
        try:
            follows, ansi = _boolean(query.get("follow")), _boolean(query.get("ansi"))
            lines = _count(query.get("lines", str(DEFAULT_LINES)))
        except ValueError:
            return status_page(HTTPStatus.NOT_FOUND, request)
        vm = fleet.vms.get(query.get("id", ""))
        has_status = fleet.release.vmm_log_errors_have_status
        if vm is None:
            return Response.of("VM not found", "text/plain", 404 if has_status else 200)
        channel = query.get("ch", "serial")
        if channel not in CHANNELS:
            return Response.of(f"Unknown channel {channel}", "text/plain", 400 if has_status else 200)
        body: bytes | AsyncIterator[bytes] = (
            vm.logs.follow(channel, lines, ansi=ansi) if follows else vm.logs.tail(channel, lines, ansi=ansi)
        )
        return Response(200, body, (("Content-Type", "text/plain; charset=utf-8"),))

    return logs


def _count(text: str) -> int:
    """Read a parameter as Rust reads a `usize`; raise `ValueError` for other texts."""
    if not _USIZE.fullmatch(text) or int(text) >= 1 << 64:
        raise ValueError(text)
    return int(text)


def _boolean(text: str | None) -> bool:
    """Read a parameter as Rocket reads a lenient boolean; raise `ValueError` for other words."""
    if text is None or text.lower() in _FALSE:
        return False
    if text.lower() in _TRUE:
        return True
    raise ValueError(text)
