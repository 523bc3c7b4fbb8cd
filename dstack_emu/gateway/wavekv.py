"""What another node of a cluster is answered: this emulator is one node, and takes nothing from others.

Calls are refused in upstream's order. One that upstream would take gets 503, as from a node that is not ready.
Source: dstack `gateway/src/web_routes/wavekv_sync.rs` at 312dc605.
"""

import zlib
from http import HTTPStatus
from typing import Any, Final

import msgpack

from dstack_emu.attest.app_info import AppInfo
from dstack_emu.attest.certificate import app_id_of, app_info_of, load_der
from dstack_emu.attest.errors import AttestError
from dstack_emu.gateway.gateway import Gateway
from dstack_emu.transport.http import Application, BodyError, BodyTooLargeError, Handler, Request, Response, status_page

MOUNT: Final = "/wavekv/sync/"
STORES: Final = ("persistent", "ephemeral")
MAX_INFLATED: Final = 16 * 1024 * 1024
"""The maximum size of a decompressed message in bytes."""


def add_wavekv(app: Application, gateway: Gateway) -> None:
    """Serve the paths of both stores, and refuse those of others."""

    async def sync(request: Request) -> Response:
        return status_page(await _status(gateway, request), request)

    def find(request: Request) -> Handler | None:
        name = request.path.removeprefix(MOUNT)
        return sync if request.method == "POST" and request.path.startswith(MOUNT) and "/" not in name else None

    app.add_finder(find)


async def _status(gateway: Gateway, request: Request) -> HTTPStatus:
    core = gateway.config.core
    if not core.debug.insecure_skip_attestation:
        app_id = _app_id(request.client_certificate)
        if app_id is None:
            return HTTPStatus.UNAUTHORIZED
        if app_id != gateway.context.app_id:
            return HTTPStatus.FORBIDDEN
    if not core.sync.enabled:
        return HTTPStatus.SERVICE_UNAVAILABLE
    try:
        sender = _sender(await request.read())
    except BodyTooLargeError:
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    except (BodyError, ValueError):
        return HTTPStatus.BAD_REQUEST
    if sender == 0:
        return HTTPStatus.BAD_REQUEST
    if request.path.removeprefix(MOUNT) not in STORES:
        return HTTPStatus.NOT_FOUND
    return HTTPStatus.SERVICE_UNAVAILABLE


def _app_id(certificate_der: bytes | None) -> bytes | None:
    if certificate_der is None:
        return None
    try:
        certificate = load_der(certificate_der)
        app_id = app_id_of(certificate)
        info: AppInfo | None = app_info_of(certificate) if app_id is None else None
    except AttestError:
        return None
    return info.app_id if info is not None else app_id


def _sender(body: bytes) -> int:
    """Return the number of the node that sent a message; raise `ValueError` for what is none."""
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        data = inflater.decompress(body, MAX_INFLATED)
    except zlib.error as error:
        raise ValueError(f"gzip expected: {error}") from error
    if not inflater.eof:
        raise ValueError(f"at most {MAX_INFLATED} bytes expected, whole")
    try:
        message: Any = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ValueError(f"MessagePack expected: {error}") from error
    sender = message.get("sender_id") if isinstance(message, dict) else message[0] if _is_full(message) else None
    if not isinstance(sender, int):
        raise ValueError("a message with the id of its sender expected")
    return sender


def _is_full(message: Any) -> bool:
    return isinstance(message, list) and bool(message)
