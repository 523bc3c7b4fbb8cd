"""What a fresh KMS serves over plain HTTP: the setup page, `/finish`, `/health`, and the Onboard RPCs.

Source: dstack `kms/src/main.rs` (`run_onboard_service`) at 312dc605.
"""

from collections.abc import Callable, Sequence

from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.onboard_service import OnboardService, onboard_table
from dstack_emu.kms_emu.pages import setup_page, setup_policy
from dstack_emu.transport.http import ROCKET_HEADERS, Application, Middleware, Request, Response
from dstack_emu.transport.prpc_server import RpcStatuses, add_prpc


def onboard_app(
    service: OnboardService,
    *,
    site_name: str,
    finish: Callable[[], None],
    takes_source_token: bool = False,
    middlewares: Sequence[Middleware] = (),
    statuses: RpcStatuses | None = None,
) -> Application:
    """Make the application of the onboard phase; `finish` is called when `/finish` is requested.

    `takes_source_token` says whether the page has a field for it.
    """
    app = Application(headers=ROCKET_HEADERS, middlewares=middlewares)

    async def index(_request: Request) -> Response:
        page = setup_page(site_name, takes_source_token=takes_source_token)
        return Response.of(page, "text/html", Content_Security_Policy=setup_policy())

    async def finish_onboarding(_request: Request) -> Response:
        finish()
        return Response.of("OK", "text/plain")

    app.add("GET", "/", index)
    app.add("GET", "/finish", finish_onboarding)
    app.add("GET", "/health", health)
    add_prpc(app, "/prpc", onboard_table(service), _anyone, errors=(KmsError,), statuses=statuses)
    return app


async def health(_request: Request) -> Response:
    """Answer that the KMS is there, in both phases."""
    return Response.of("OK", "text/plain")


async def _anyone(_request: Request) -> None:
    """Make no difference between callers: nobody shows a certificate over plain HTTP."""
