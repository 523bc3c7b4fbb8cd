"""The admin listener: ClearImageCache for operators, behind a token.

A listener of its own, as in next; it does not start without a credential. Source: dstack
`kms/src/{admin_auth,admin_service,main_service}.rs` at 312dc605. The htpasswd file is not supported.
"""

import base64
import binascii
import contextlib
import hmac
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import hexdigits
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from google.protobuf.empty_pb2 import Empty

from attest.proto import kms_pb2 as pb
from kms_emu.config import Admin
from kms_emu.errors import ConfigError, InvalidRequestError, KmsError, context
from transport.prpc_server import add_prpc
from transport.service import Rpc, ServiceTable, without_context

REALM: Final = "dstack-kms admin"
TOKEN_HEADER: Final = "X-Admin-Token"  # noqa: S105 - a header's name
TOKEN_VARIABLES: Final = ("DSTACK_KMS_ADMIN_TOKEN", "ADMIN_API_TOKEN")


def admin_token(admin: Admin, environment: Mapping[str, str]) -> str | None:
    """The token that admits, or None where `insecure_no_auth` lets anyone in.

    Raises `ConfigError` where there is neither.
    """
    if admin.insecure_no_auth:
        return None
    if admin.htpasswd_file:
        raise ConfigError("core.admin.htpasswd_file is not supported by this emulator: set core.admin.auth_token")
    from_environment = next((environment[name] for name in TOKEN_VARIABLES if name in environment), "")
    token = (admin.auth_token or from_environment).strip()
    if not token:
        raise ConfigError(
            "admin API is enabled but neither auth_token nor htpasswd_file is configured; set core.admin.auth_token, "
            "DSTACK_KMS_ADMIN_TOKEN, ADMIN_API_TOKEN, core.admin.htpasswd_file, or insecure_no_auth = true "
            "(testing only)"
        )
    return token


def admin_app(cache_dir: Path, token: str | None) -> web.Application:
    """Make the listener's application over one image cache."""

    async def clear_image_cache(request: pb.ClearImageCacheRequest) -> Empty:
        for folder, key, name in (
            ("images", request.image_hash, "image"),
            ("measurements", request.config_hash, "measurement"),
        ):
            with context(f"failed to clear {name} cache"):
                _remove(cache_dir / folder, key)
        return Empty()

    async def anyone(request: web.Request) -> None:
        return None

    app = web.Application(middlewares=[_require_token(token)])
    rpc = Rpc("ClearImageCache", pb.ClearImageCacheRequest, Empty, without_context(clear_image_cache))
    add_prpc(app, "/prpc", ServiceTable("Admin.", {rpc.name: rpc}), anyone, errors=(KmsError,))
    return app


def _require_token(token: str | None) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if token is None or any(hmac.compare_digest(given.encode(), token.encode()) for given in _given(request)):
            return await handler(request)
        return web.Response(status=401, headers={"WWW-Authenticate": f'Basic realm="{REALM}"'})

    return check


def _given(request: web.Request) -> list[str]:
    """The tokens a request carries: the header of its own, Bearer, or the user name of Basic."""
    given = [request.headers[TOKEN_HEADER]] if TOKEN_HEADER in request.headers else []
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        given.append(value.strip())
    elif scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            given.append(base64.b64decode(value, validate=True).decode().partition(":")[0])
    return given


def _remove(folder: Path, key: str) -> None:
    """Remove one entry named in hex, all of them (`all`), or nothing (empty); no other name reaches the file system."""
    if not key:
        return
    if key != "all" and not all(c in hexdigits for c in key):
        raise InvalidRequestError("invalid cache key")
    path = folder if key == "all" else folder / key
    try:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    except OSError as error:
        raise KmsError(f"cannot remove {path}: {error.strerror}") from error
