"""A toy service in place of the real ones, and raw HTTP/1.1 to ask it with, so that aiohttp is not on both sides."""

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.errors import VerificationError
from dstack_emu.attest.proto import dstack_guest_pb2 as guest
from dstack_emu.attest.proto import kms_pb2 as kms
from dstack_emu.attest.proto.prpc_pb2 import PrpcError
from dstack_emu.transport.http import Application, Request
from dstack_emu.transport.listen import Server, bind_tcp, serve
from dstack_emu.transport.prpc_server import add_prpc
from dstack_emu.transport.service import Rpc, ServiceTable

# ---- A service that answers as much as the recorded codec rows need --------------------------------------


class ToyError(Exception):
    """Refusals of the toy, in the words of the program it stands for."""


@dataclass
class Toy:
    """Knows the names and limits of the real services, and none of their keys."""

    started: asyncio.Event = field(default_factory=asyncio.Event)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[str] = field(default_factory=list)

    async def bootstrap(self, _: Request, request: kms.BootstrapRequest) -> kms.BootstrapResponse:
        self.seen.append("bootstrap")
        name = request.domain
        if not name or len(name) > 253 or not name.isascii():
            raise ToyError("domain must be a non-empty ASCII DNS name of at most 253 bytes")
        if not all(re.fullmatch("[a-z0-9-]+", label) for label in name.split(".")):
            raise ToyError("domain contains an invalid DNS label")
        return kms.BootstrapResponse(ca_pubkey=name.encode())

    async def finish(self, _: Request, request: Empty) -> Empty:
        return Empty()

    async def public_key(self, _: Request, request: kms.AppId) -> kms.PublicKeyResponse:
        if len(request.app_id) != 20:
            raise ToyError("app_id must be 20 bytes")
        return kms.PublicKeyResponse(public_key=request.app_id, timestamp=1)

    async def app_key(self, _: Request, request: kms.GetAppKeyRequest) -> kms.AppKeyResponse:
        return kms.AppKeyResponse(os_image_hash=bytes(request.api_version))

    async def meta(self, _: Request, request: Empty) -> kms.GetMetaResponse:
        return kms.GetMetaResponse(ca_cert="é")

    async def get_key(self, _: Request, request: guest.GetKeyArgs) -> guest.GetKeyResponse:
        return guest.GetKeyResponse(key=request.path.encode().ljust(32, b"\x00"), signature_chain=[b"\x01", b"\x02"])

    async def tls_key(self, _: Request, request: guest.GetTlsKeyArgs) -> guest.GetTlsKeyResponse:
        return guest.GetTlsKeyResponse(key=request.subject, certificate_chain=request.alt_names)

    async def version(self, _: Request, request: Empty) -> guest.WorkerVersion:
        return guest.WorkerVersion(version="1")

    async def quote(self, _: Request, request: guest.RawQuoteArgs) -> guest.GetQuoteResponse:
        """Waits until the test lets it answer."""
        self.started.set()
        await self.may_answer.wait()
        return guest.GetQuoteResponse(report_data=request.report_data)

    async def broken(self, _: Request, request: Empty) -> Empty:
        raise ValueError("5f-secret-5f")

    async def unproven(self, _: Request, request: Empty) -> Empty:
        raise VerificationError("quote is é")

    def onboard(self) -> ServiceTable[Request]:
        return ServiceTable(
            "Onboard.",
            {
                "Bootstrap": Rpc("Bootstrap", kms.BootstrapRequest, kms.BootstrapResponse, self.bootstrap),
                "Finish": Rpc("Finish", Empty, Empty, self.finish),
            },
        )

    def kms(self) -> ServiceTable[Request]:
        return ServiceTable(
            "KMS.",
            {
                "GetAppEnvEncryptPubKey": Rpc(
                    "GetAppEnvEncryptPubKey", kms.AppId, kms.PublicKeyResponse, self.public_key
                ),
                "GetAppKey": Rpc("GetAppKey", kms.GetAppKeyRequest, kms.AppKeyResponse, self.app_key),
                "GetMeta": Rpc("GetMeta", Empty, kms.GetMetaResponse, self.meta),
            },
        )

    def guest(self) -> ServiceTable[Request]:
        return ServiceTable(
            "DstackGuest.",
            {
                "GetKey": Rpc("GetKey", guest.GetKeyArgs, guest.GetKeyResponse, self.get_key),
                "GetTlsKey": Rpc("GetTlsKey", guest.GetTlsKeyArgs, guest.GetTlsKeyResponse, self.tls_key),
                "GetQuote": Rpc("GetQuote", guest.RawQuoteArgs, guest.GetQuoteResponse, self.quote),
                "Version": Rpc("Version", Empty, guest.WorkerVersion, self.version),
                "Broken": Rpc("Broken", Empty, Empty, self.broken),
                "Unproven": Rpc("Unproven", Empty, Empty, self.unproven),
            },
        )


async def caller(request: Request) -> Request:
    return request


def application(toy: Toy, *mounts: str, context: Callable[[Request], Awaitable[Request]] = caller) -> Application:
    """The toy's services where upstream has them: `onboard` and `kms` at /prpc, `guest` at the root."""
    app = Application()
    for mount in mounts:
        table = {"onboard": toy.onboard, "kms": toy.kms, "guest": toy.guest}[mount]()
        at_root = mount == "guest"
        add_prpc(app, "" if at_root else "/prpc", table, context, errors=(ToyError,), trim=not at_root)
    return app


@contextlib.asynccontextmanager
async def served(
    app: Application | web.Application, sock: socket.socket | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    server = await serve(app, sock or bind_tcp("127.0.0.1", 0), tls)
    try:
        yield server
    finally:
        await server.close()


# ---- Raw HTTP/1.1, so that nothing of aiohttp stands on both sides ---------------------------------------


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]

    @property
    def error(self) -> str:
        if self.kind == "application/json":
            text = json.loads(self.body)["error"]
            assert isinstance(text, str)
            return text
        return PrpcError.FromString(self.body).message


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(server: Server, trust: ssl.SSLContext | None = None) -> Streams:
    return await connect_to(server.url, trust)


async def connect_to(
    url: str, trust: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if url.startswith("unix:"):
        return await asyncio.open_unix_connection(url.removeprefix("unix:"))
    host, _, port = url.partition("://")[2].rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port), ssl=trust)


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read one answer by its Content-Length, which every answer but 100 has to have."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in filter(None, head[1:]):
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    assert "transfer-encoding" not in headers
    status = int(head[0].split()[1])
    length = 0 if status == 100 else int(headers["content-length"])
    return Answer(status, headers, await reader.readexactly(length))


def raw(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, close: bool = False
) -> bytes:
    lines = {"Host": "x", "Content-Length": str(len(body)), **(headers or {})}
    if close:
        lines["Connection"] = "close"
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def exchange(server: Server, request: bytes) -> Answer:
    reader, writer = await connect(server)
    writer.write(request)
    try:
        return await read_answer(reader)
    finally:
        writer.close()


async def post(server: Server, path: str, body: bytes = b"", **headers: str) -> Answer:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await exchange(server, raw("POST", path, body, names))
