"""The HTTP applications of a guest agent: for dstack.sock, for tappd.sock, and for one TCP port with all services.

Inside a CVM each service has its own listener. The TCP port serves all of them, for SDK clients that take one URL:
DstackGuest at `/`, Tappd and Worker at `/prpc`, and a small page at `/`. A release with the guest API v1 has it at
`/v1` and `/prpc/v1`, and the frozen services at `/v0` and `/prpc/v0` too; the path alone selects the version. Source of
the mounts: dstack `guest-agent/src/{server,http_routes}.rs` at 312dc605, docs/guest-api-v1.md at 147e39c8.
"""

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from dstack_emu.attest.errors import AttestError
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.agent_services import combined_table, dstack_table, tappd_table, worker_table
from dstack_emu.simulator.agent_v1 import GuestApiV1, guest_v1_table, worker_v1_table
from dstack_emu.simulator.errors import GpuUnavailableError, GuestError
from dstack_emu.transport.html import content_security_policy, facts, page
from dstack_emu.transport.http import ROCKET_HEADERS, Application, Request, Response
from dstack_emu.transport.prpc_server import RpcStatuses, add_prpc
from dstack_emu.transport.service import ServiceTable

ERRORS = (GuestError, AttestError)
ERROR_STATUSES: Final[Mapping[type[Exception], int]] = {GpuUnavailableError: HTTPStatus.NOT_IMPLEMENTED}


def dstack_app(agent: GuestAgent) -> Application:
    """Make the application of dstack.sock: DstackGuest at `/`; a service prefix is not removed there."""
    app = Application(headers=ROCKET_HEADERS)
    _add_guest(app, agent)
    return app


def tappd_app(agent: GuestAgent) -> Application:
    """Make the application of tappd.sock: Tappd at `/prpc`."""
    app = Application(headers=ROCKET_HEADERS)
    _add(app, agent, "/prpc", tappd_table(agent))
    return app


def tcp_app(agent: GuestAgent) -> Application:
    """Make the application of the TCP port: every service, and the page."""
    app = Application(headers=(*ROCKET_HEADERS, *_version_header(agent)))

    async def index(_request: Request) -> Response:
        return Response.of(await _page(agent), "text/html", Content_Security_Policy=content_security_policy())

    app.add("GET", "/", index)
    app.add("GET", "/health", _health)
    if agent.domain.release.guest_api_v1:
        _add(app, agent, "/prpc/v1", worker_v1_table(GuestApiV1(agent, time.time)), trim=False)
        _add(app, agent, "/prpc/v0", worker_table(agent))
    _add(app, agent, "/prpc", combined_table(agent))
    _add_guest(app, agent)
    return app


def _add_guest(app: Application, agent: GuestAgent) -> None:
    """Serve DstackGuest, in each version that the release has."""
    if agent.domain.release.guest_api_v1:
        _add(app, agent, "/v1", guest_v1_table(GuestApiV1(agent, time.time)), trim=False)
        _add(app, agent, "/v0", dstack_table(agent), trim=False)
    _add(app, agent, "", dstack_table(agent), trim=False)


def _add(app: Application, agent: GuestAgent, mount: str, table: ServiceTable[None], *, trim: bool = True) -> None:
    statuses = RpcStatuses.of(agent.domain.release, ERROR_STATUSES)
    add_prpc(app, mount, table, _anyone, errors=ERRORS, trim=trim, statuses=statuses)


def _version_header(agent: GuestAgent) -> tuple[tuple[str, str], ...]:
    """Return the header in which the external listener states its version.

    Agents of 0.6 have it, together with API v1; the stored sources of 0.5 do not set it.
    """
    release = agent.domain.release
    return (("X-App-Version", f"v{release.version} ({release.revision})"),) if release.guest_api_v1 else ()


async def _health(_request: Request) -> Response:
    return Response.of('{"status": "ok", "service": "dstack-emu-agent"}', "application/json")


async def _anyone(_request: Request) -> None:
    """Accept every caller: inside a CVM only the application reaches the listener."""


async def _page(agent: GuestAgent) -> str:
    info = await agent.public_info()
    members = (
        ("app id", info.app_id.hex()),
        ("instance id", info.instance_id.hex()),
        ("compose hash", info.compose_hash.hex()),
        ("device id", info.device_id.hex()),
        ("mr_aggregated", info.mr_aggregated.hex()),
        ("os_image_hash", info.os_image_hash.hex()),
        ("key provider", info.key_provider_info),
    )
    said = "<p>An EMULATED trust domain: it protects nothing.</p>\n"
    return page(f"{info.app_name} (EMULATED)", "dstack guest agent", said, facts(members))
