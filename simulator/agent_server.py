"""The HTTP applications of a guest agent: for dstack.sock, for tappd.sock, and for one TCP port with all services.

Inside a CVM each service has its own listener. The TCP port serves all of them, for SDK clients that take one URL:
DstackGuest at `/`, Tappd and Worker at `/prpc`, and a small page at `/`. Source of the mounts: dstack
`guest-agent/src/{server,http_routes}.rs` at 312dc605.
"""

from html import escape

from dstack_emu.attest.errors import AttestError
from dstack_emu.simulator.agent import GuestAgent, combined_table, dstack_table, tappd_table
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.http import Application, Request, Response
from dstack_emu.transport.prpc_server import add_prpc

ERRORS = (GuestError, AttestError)


def dstack_app(agent: GuestAgent) -> Application:
    """Make the application of dstack.sock: DstackGuest at `/`; a service prefix is not removed there."""
    app = Application()
    add_prpc(app, "", dstack_table(agent), _anyone, errors=ERRORS, trim=False)
    return app


def tappd_app(agent: GuestAgent) -> Application:
    """Make the application of tappd.sock: Tappd at `/prpc`."""
    app = Application()
    add_prpc(app, "/prpc", tappd_table(agent), _anyone, errors=ERRORS)
    return app


def tcp_app(agent: GuestAgent) -> Application:
    """Make the application of the TCP port: every service, and the page."""
    app = Application()

    async def index(_request: Request) -> Response:
        return Response.of(await _page(agent), "text/html")

    app.add("GET", "/", index)
    app.add("GET", "/health", _health)
    add_prpc(app, "/prpc", combined_table(agent), _anyone, errors=ERRORS)
    add_prpc(app, "", dstack_table(agent), _anyone, errors=ERRORS, trim=False)
    return app


async def _health(_request: Request) -> Response:
    return Response.of('{"status": "ok", "service": "dstack-emu-agent"}', "application/json")


async def _anyone(_request: Request) -> None:
    """Accept every caller: inside a CVM only the application reaches the listener."""


async def _page(agent: GuestAgent) -> str:
    info = await agent.public_info()
    rows = "".join(
        f"<tr><th>{name}</th><td><code>{escape(value)}</code></td></tr>"
        for name, value in (
            ("app id", info.app_id.hex()),
            ("instance id", info.instance_id.hex()),
            ("compose hash", info.compose_hash.hex()),
            ("device id", info.device_id.hex()),
            ("mr_aggregated", info.mr_aggregated.hex()),
            ("os_image_hash", info.os_image_hash.hex()),
            ("key provider", info.key_provider_info),
        )
    )
    name = escape(info.app_name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name} (EMULATED)</title></head>\n'
        f"<body><h1>{name}</h1><p>An EMULATED trust domain: it protects nothing.</p>\n"
        f"<table>{rows}</table></body></html>\n"
    )
