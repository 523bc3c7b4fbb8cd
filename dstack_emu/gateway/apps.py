"""The applications of a gateway's three HTTP listeners. Source: dstack `gateway/src/main.rs` at 312dc605."""

from collections.abc import Callable

from dstack_emu.attest.release import Release
from dstack_emu.gateway.admin import AdminService
from dstack_emu.gateway.admin_domains import DomainService
from dstack_emu.gateway.admin_table import admin_table
from dstack_emu.gateway.caller import Caller, caller_of
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.gateway import Gateway
from dstack_emu.gateway.metrics import metrics_text
from dstack_emu.gateway.page import dashboard
from dstack_emu.gateway.service import GatewayService, debug_table, gateway_table
from dstack_emu.gateway.wavekv import add_wavekv
from dstack_emu.transport.api_auth import ListenerAuth
from dstack_emu.transport.html import content_security_policy
from dstack_emu.transport.http import ROCKET_HEADERS, Application, Handler, Request, Response
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.prpc_server import RpcStatuses, add_prpc


def rpc_app(service: GatewayService, gateway: Gateway, verifier: AttestationVerifier) -> Application:
    """Make the application of the RPC listener."""

    async def caller(request: Request) -> Caller:
        return await caller_of(request.client_certificate, verifier)

    app = Application(headers=(*ROCKET_HEADERS, ("X-App-Version", _version(gateway.release))))
    statuses = RpcStatuses.of(gateway.release)
    add_prpc(app, "/prpc", gateway_table(service), caller, errors=(GatewayError,), statuses=statuses)
    app.add("GET", "/health", _health)
    add_wavekv(app, gateway)
    return app


def admin_app(gateway: Gateway, auth: ListenerAuth, end: Callable[[], None]) -> Application:
    """Make the application of the admin listener; `end` is called if an operator ends the gateway."""
    app = Application(headers=ROCKET_HEADERS, middlewares=[auth.middleware(gateway.log)])
    table = admin_table(AdminService(gateway, end), DomainService(gateway), gateway.release)
    app.add("GET", "/", _dashboard(gateway))
    if gateway.release.gateway_rotates_instances:
        app.add("GET", "/metrics", _metrics(gateway))
    for mount in ("/prpc", ""):
        add_prpc(app, mount, table, _anyone, errors=(GatewayError,), statuses=RpcStatuses.of(gateway.release))
    return app


def debug_app(service: GatewayService, gateway: Gateway) -> Application:
    """Make the application of the debug listener."""
    app = Application(headers=ROCKET_HEADERS)
    statuses = RpcStatuses.of(gateway.release)
    add_prpc(app, "/prpc", debug_table(service), _anyone, errors=(GatewayError,), statuses=statuses)
    app.add("GET", "/health", _health)
    return app


def _dashboard(gateway: Gateway) -> Handler:
    async def page(_request: Request) -> Response:
        return Response.of(dashboard(gateway), "text/html", Content_Security_Policy=content_security_policy())

    return page


def _metrics(gateway: Gateway) -> Handler:
    async def metrics(_request: Request) -> Response:
        return Response.of(metrics_text(gateway), "text/plain")

    return metrics


def _version(release: Release) -> str:
    return f"v{release.version} (git:{release.revision})"


async def _health(_request: Request) -> Response:
    return Response.of("OK", "text/plain")


async def _anyone(_request: Request) -> None:
    """Make no difference between callers."""
