"""The admin listener: ClearImageCache for operators, behind a token.

A listener of its own, as in next; it does not start without a credential. Source: dstack
`kms/src/{admin_auth,admin_service,main_service}.rs` at 312dc605. The htpasswd file is not supported.
"""

import base64
import binascii
import contextlib
import hmac
from collections.abc import Mapping
from typing import Final

from dstack_emu.kms_emu.call_log import journaled
from dstack_emu.kms_emu.config import AdminSection
from dstack_emu.kms_emu.errors import KmsConfigError, KmsError
from dstack_emu.kms_emu.image_cache import ImageCache, admin_table
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.http import Application, Handler, Middleware, Request, Response
from dstack_emu.transport.prpc_server import RpcStatuses, add_prpc

REALM: Final = "dstack-kms admin"
TOKEN_HEADER: Final = "X-Admin-Token"  # noqa: S105 - a header's name
TOKEN_VARIABLES: Final = ("DSTACK_KMS_ADMIN_TOKEN", "ADMIN_API_TOKEN")


def admin_token(admin: AdminSection, environment: Mapping[str, str]) -> str | None:
    """Return the token that admits, or None if `insecure_no_auth` lets anyone in.

    Raises `KmsConfigError` if there is neither.
    """
    if admin.insecure_no_auth:
        return None
    if admin.htpasswd_file:
        raise KmsConfigError("core.admin.htpasswd_file is not supported by this emulator: set core.admin.auth_token")
    from_environment = next((environment[name] for name in TOKEN_VARIABLES if name in environment), "")
    token = (admin.auth_token or from_environment).strip()
    if not token:
        raise KmsConfigError(
            "admin API is enabled but neither auth_token nor htpasswd_file is configured; set core.admin.auth_token, "
            "DSTACK_KMS_ADMIN_TOKEN, ADMIN_API_TOKEN, core.admin.htpasswd_file, or insecure_no_auth = true "
            "(testing only)"
        )
    return token


def admin_app(cache: ImageCache, token: str | None, log: EventLog, statuses: RpcStatuses | None = None) -> Application:
    """Make the listener's application over one image cache."""
    app = Application(middlewares=[_require_token(token, log)])
    add_prpc(app, "/prpc", journaled(admin_table(cache), log), _admitted, errors=(KmsError,), statuses=statuses)
    return app


async def _admitted(_request: Request) -> None:
    """Make no difference between callers: they have shown the token."""


def _require_token(token: str | None, log: EventLog) -> Middleware:
    async def check(request: Request, handler: Handler) -> Response:
        if is_admitted(request.headers, token):
            return await handler(request)
        log.info("refused", listener="admin", reason="no valid credential", path=request.path)
        return Response(401, headers=(("WWW-Authenticate", f'Basic realm="{REALM}"'),))

    return check


def is_admitted(headers: Mapping[str, str], token: str | None) -> bool:
    """Return whether a token in a request's headers (of any case) is the right one, or none is required."""
    return token is None or any(hmac.compare_digest(given, token.encode()) for given in _given(headers))


def _given(headers: Mapping[str, str]) -> list[bytes]:
    """Return the tokens that headers carry: the one of its own, Bearer, or the user name of Basic."""
    given = [headers[TOKEN_HEADER]] if TOKEN_HEADER in headers else []
    scheme, _, value = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        given.append(value.strip())
    elif scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            given.append(base64.b64decode(value, validate=True).decode().partition(":")[0])
    return [token.encode(errors="surrogateescape") for token in given]  # a header may hold any bytes
