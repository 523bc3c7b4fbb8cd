"""What a fresh KMS serves over plain HTTP: the setup page, `/finish`, `/health`, and the Onboard RPCs.

Source: dstack `kms/src/main.rs` (`run_onboard_service`) at 312dc605.
"""

from collections.abc import Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.service import OnboardService, onboard_table
from dstack_emu.kms_emu.setup_page import content_security_policy, setup_page
from dstack_emu.transport.prpc_server import Asked, add_prpc


def onboard_app(
    service: OnboardService, *, site_name: str, finish: Callable[[], None], middlewares: Sequence[Middleware] = ()
) -> web.Application:
    """Make the application of the onboard phase; `finish` is called when `/finish` is requested."""
    app = web.Application(middlewares=middlewares)

    async def index(_request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": content_security_policy()}
        return web.Response(text=setup_page(site_name), content_type="text/html", headers=headers)

    async def finish_onboarding(_request: web.Request) -> web.Response:
        finish()
        return web.Response(text="OK")

    app.router.add_get("/", index)
    app.router.add_get("/finish", finish_onboarding)
    app.router.add_get("/health", health)
    add_prpc(app, "/prpc", onboard_table(service), _anyone, errors=(KmsError,))
    return app


async def health(_request: web.Request) -> web.Response:
    """Answer that the KMS is there, in both phases."""
    return web.Response(text="OK")


async def _anyone(_asked: Asked) -> None:
    """Make no difference between callers: nobody shows a certificate over plain HTTP."""
