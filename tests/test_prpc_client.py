"""The pRPC client: every kind of address, what it refuses, and TLS with certificates on both sides."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.proto import dstack_guest_pb2 as guest
from dstack_emu.attest.proto import kms_pb2 as kms
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError
from dstack_emu.transport.http import Request
from dstack_emu.transport.listen import bind_tcp, bind_unix
from tests.identities import Identity, self_signed, server_tls
from tests.ports import refusing_port
from tests.toy import Toy, application, served


@pytest.fixture(params=["tcp", "unix"])
def sock(request: pytest.FixtureRequest, tmp_path: Path) -> socket.socket:
    return bind_tcp("127.0.0.1", 0) if request.param == "tcp" else bind_unix(tmp_path / "s.sock")


@pytest.mark.parametrize("bare", [True, False])
async def test_client_calls_over_each_kind_of_address(sock: socket.socket, bare: bool) -> None:
    async with served(application(Toy(), "guest", "kms"), sock) as server:
        address = server.url.removeprefix("unix:") if bare else server.url
        async with PrpcClient(address, timeout=5) as client:
            key = await client.call("GetKey", guest.GetKeyArgs(path="é"), guest.GetKeyResponse)
            assert key.key.rstrip(b"\x00").decode() == "é"
            meta = await client.call("prpc/KMS.GetMeta", Empty(), kms.GetMetaResponse)
            assert meta.ca_cert == "é"


async def test_client_calls_below_the_path_of_its_address() -> None:
    async with (
        served(application(Toy(), "onboard")) as server,
        PrpcClient(server.url + "/prpc/", timeout=5) as c,
    ):
        assert await c.call("Finish", Empty(), Empty) == Empty()


async def test_client_sends_null_for_empty_and_no_content_type() -> None:
    requests = []

    async def record(request: web.Request) -> web.Response:
        requests.append((request.method, request.path_qs, await request.read(), dict(request.headers)))
        return web.Response(body=b'{"version":"2"}')

    app = web.Application()
    app.router.add_route("*", "/{any}", record)
    async with served(app) as server, PrpcClient(server.url, timeout=5) as client:
        assert (await client.call("Version", Empty(), guest.WorkerVersion)).version == "2"
    ((method, path, body, headers),) = requests
    assert (method, path, body) == ("POST", "/Version?json", b"null")
    assert "Content-Type" not in headers


async def test_client_raises_the_services_error_with_status_and_body() -> None:
    async with served(application(Toy(), "kms")) as server, PrpcClient(server.url, timeout=5) as client:
        with pytest.raises(RpcError, match=r"^app_id must be 20 bytes$") as caught:
            await client.call("prpc/GetAppEnvEncryptPubKey", kms.AppId(), kms.PublicKeyResponse)
        assert (caught.value.status, caught.value.text) == (400, "app_id must be 20 bytes")
        assert caught.value.body == '{\n  "error": "app_id must be 20 bytes"\n}'
        with pytest.raises(RpcError) as other:
            await client.call("nowhere", Empty(), Empty)
        assert other.value.status == 404


def answering(answer: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    return handle


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"", "connection closed before the answer"),
        (b"SSH-2.0-x\r\n\r\n", "the answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnull", "connection closed within the answer"),
        (
            b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(10 * 1024 * 1024 + 1),
            "the answer is longer than 10485760 bytes",
        ),
    ],
)
async def test_client_names_why_there_is_no_answer(answer: bytes, cause: str) -> None:
    listener = await asyncio.start_server(answering(answer), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener, PrpcClient(url, timeout=5) as client:
        with pytest.raises(TransportError) as caught:
            await client.call("Version", Empty(), guest.WorkerVersion)
        await client.close()
    assert str(caught.value) == f"error sending request for url ({url}/Version?json): {cause}"
    assert (caught.value.url, caught.value.cause) == (f"{url}/Version?json", cause)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "invalid type: null, expected message WorkerVersion"),
        (b"<html>", "invalid JSON: Expecting value at line 1 column 1"),
    ],
)
async def test_client_refuses_an_answer_that_is_not_the_message(body: bytes, error: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    listener = await asyncio.start_server(answering(head + body), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener, PrpcClient(url, timeout=5) as client:
        with pytest.raises(FormatError) as caught:
            await client.call("Version", Empty(), guest.WorkerVersion)
        await client.close()
    assert str(caught.value) == error


async def test_client_names_a_refused_connection_and_a_missing_socket(tmp_path: Path) -> None:
    with refusing_port() as port:
        for address, cause in [
            (f"http://127.0.0.1:{port}", "Connection refused"),
            (f"unix:{tmp_path}/none.sock", "No such file or directory"),
        ]:
            async with PrpcClient(address, timeout=5) as client:
                with pytest.raises(TransportError) as caught:
                    await client.call("Version", Empty(), guest.WorkerVersion)
            assert caught.value.cause == cause
        assert address in str(caught.value)


async def test_client_gives_up_after_its_timeout() -> None:
    toy = Toy()
    async with served(application(toy, "guest")) as server, PrpcClient(server.url, timeout=0.05) as client:
        with pytest.raises(TransportError) as caught:
            await client.call("GetQuote", guest.RawQuoteArgs(), guest.GetQuoteResponse)
        assert caught.value.cause == "no answer within 0.05 s"
        toy.may_answer.set()


@pytest.mark.parametrize("address", ["not a url", "ftp://host", "localhost:80"])
def test_client_refuses_an_address_it_cannot_call(address: str) -> None:
    with pytest.raises(TransportError, match=r"neither an http\(s\) URL nor a socket path"):
        PrpcClient(address, timeout=5)


async def test_client_names_a_url_without_a_host() -> None:
    async with PrpcClient("http://", timeout=5) as client:
        with pytest.raises(TransportError, match="not a URL"):
            await client.call("Version", Empty(), Empty)


# ---- TLS -------------------------------------------------------------------------------------------------


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return self_signed(tmp_path, "server")


async def test_client_shows_the_servers_certificate_on_every_call_before_the_status(
    identity: Identity,
) -> None:
    shown: list[bytes | None] = []

    async def check(der: bytes | None) -> None:
        shown.append(der)
        if len(shown) == 3:
            raise VerificationError("not attested")

    trust = ssl.create_default_context(cafile=identity.cert_file)
    async with served(application(Toy(), "kms"), tls=server_tls(identity)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        async with PrpcClient(server.url + "/prpc", timeout=5, ssl=trust, check_server=check) as client:
            assert (await client.call("GetMeta", Empty(), kms.GetMetaResponse)).ca_cert == "é"
            with pytest.raises(RpcError):
                await client.call("Nope", Empty(), Empty)
            with pytest.raises(VerificationError, match="not attested"):
                await client.call("Nope", Empty(), Empty)
    assert shown == [identity.der] * 3


async def test_client_shows_no_certificate_without_tls() -> None:
    shown: list[bytes | None] = []

    async def check(der: bytes | None) -> None:
        shown.append(der)

    async with (
        served(application(Toy(), "guest")) as server,
        PrpcClient(server.url, timeout=5, check_server=check) as client,
    ):
        await client.call("Version", Empty(), guest.WorkerVersion)
    assert shown == [None]


async def test_client_names_tls_where_the_server_is_not_trusted(identity: Identity) -> None:
    async with (
        served(application(Toy(), "kms"), tls=server_tls(identity)) as server,
        PrpcClient(server.url, timeout=5) as client,
    ):
        with pytest.raises(TransportError) as caught:
            await client.call("prpc/GetMeta", Empty(), kms.GetMetaResponse)
    assert caught.value.cause.startswith("TLS: ")
    assert "_ssl.c" not in caught.value.cause  # the line in the source of Python, which another version has elsewhere
    assert "self-signed certificate" in caught.value.cause


async def test_client_names_tls_where_its_own_certificate_is_refused(identity: Identity, tmp_path: Path) -> None:
    other = self_signed(tmp_path, "other")
    context = ssl.create_default_context(cafile=identity.cert_file)
    context.load_cert_chain(other.cert_file, other.key_file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 the client is through before it is refused
    tls = server_tls(identity, client_ca=self_signed(tmp_path, "ca"))
    async with (
        served(application(Toy(), "kms"), tls=tls) as server,
        PrpcClient(server.url, timeout=5, ssl=context) as client,
    ):
        with pytest.raises(TransportError) as caught:
            await client.call("prpc/GetMeta", Empty(), kms.GetMetaResponse)
    # The alert may come, or the connection end before it: that is up to asyncio and the system.
    assert caught.value.cause.startswith("TLS: ") or caught.value.cause == "Connection reset by peer"


async def test_the_context_sees_the_clients_certificate(identity: Identity, tmp_path: Path) -> None:
    mine = self_signed(tmp_path, "client")
    seen = []

    async def note(asked: Request) -> Request:
        seen.append(asked.client_certificate)
        return asked

    context = ssl.create_default_context(cafile=identity.cert_file)
    context.load_cert_chain(mine.cert_file, mine.key_file)
    app = application(Toy(), "kms", context=note)
    async with (
        served(app, tls=server_tls(identity, client_ca=mine)) as server,
        PrpcClient(server.url, timeout=5, ssl=context) as client,
    ):
        await client.call("prpc/GetMeta", Empty(), kms.GetMetaResponse)
    assert seen == [mine.der]
