"""The gRPC server itself, over a table of this file's own: what it does with errors, interceptors and tables."""

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.errors import FormatError, UnverifiableError, VerificationError
from dstack_emu.attest.proto import dstack_guest_pb2 as pb
from dstack_emu.transport.grpc_server import (
    MAX_DETAILS,
    GrpcPeer,
    GrpcService,
    Listener,
    Statuses,
    anyone,
    details,
    serve_grpc,
)
from dstack_emu.transport.listen import ListenError, bind_tcp, reserve_unix
from dstack_emu.transport.service import Rpc, ServiceTable
from tests.http2 import ACK, DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, frame, header_block

WORKER = "dstack_guest.Worker"
Handler = Callable[[Any, Any], Awaitable[Any]]


class ColdError(Exception):
    """What a service may refuse with."""


class FrozenError(ColdError):
    """A kind of it."""


def worker(version: Handler, context: Callable[[GrpcPeer], Awaitable[Any]] = anyone) -> GrpcService[Any]:
    """Service Worker with one interesting RPC."""

    async def info(context: Any, request: Empty) -> pb.AppInfo:
        return pb.AppInfo(app_name="x")

    async def attest(context: Any, request: pb.GetAttestationForAppKeyRequest) -> pb.GetQuoteResponse:
        return pb.GetQuoteResponse(quote=request.algorithm.encode())

    rpcs = (
        Rpc("Version", Empty, pb.WorkerVersion, version),
        Rpc("Info", Empty, pb.AppInfo, info),
        Rpc("GetAttestationForAppKey", pb.GetAttestationForAppKeyRequest, pb.GetQuoteResponse, attest),
    )
    return GrpcService(WORKER, ServiceTable.of("Worker.", *rpcs), context)


@asynccontextmanager
async def served(service: GrpcService[Any], **options: Any) -> AsyncIterator[Any]:
    """Serve one service on a free port, and connect to it."""
    statuses: Statuses = {ColdError: grpc.StatusCode.ABORTED}
    sock = bind_tcp("127.0.0.1", 0)
    port = sock.getsockname()[1]
    server = await serve_grpc((service,), Listener(sock), statuses=statuses, **options)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel.unary_unary(f"/{WORKER}/Version", response_deserializer=pb.WorkerVersion.FromString)
    finally:
        await server.close()


def raising(error: Exception) -> Handler:
    async def handle(context: Any, request: Empty) -> pb.WorkerVersion:
        raise error

    return handle


async def answering(context: Any, request: Empty) -> pb.WorkerVersion:
    return pb.WorkerVersion(version=str(context))


async def test_client_that_lets_no_byte_of_its_answer_in_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_emu.transport.grpc_server.READING", 0.2)
    sock = bind_tcp("127.0.0.1", 0)
    server = await serve_grpc((worker(answering),), Listener(sock), statuses={})
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    no_window = struct.pack(">HI", 4, 0)
    writer.write(PREFACE + frame(SETTINGS, 0, no_window) + frame(SETTINGS, 0, b"", ACK))
    writer.write(frame(HEADERS, 1, header_block(f"/{WORKER}/Version"), END_HEADERS))
    writer.write(frame(DATA, 1, bytes(5), END_STREAM))
    kinds = []
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(9)
                kinds.append(head[3])
                await reader.readexactly(int.from_bytes(head[:3], "big"))
    assert (HEADERS in kinds, DATA in kinds) == (True, False), "the answer has begun"
    writer.close()
    await server.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ColdError("brr"), "ABORTED"),
        (FrozenError("brr"), "ABORTED"),
        (FormatError("brr"), "INVALID_ARGUMENT"),
        (VerificationError("brr"), "UNAUTHENTICATED"),
        (UnverifiableError("brr"), "UNAVAILABLE"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
async def test_refusal_has_its_own_status_and_text(error: Exception, code: str) -> None:
    told: list[tuple[str, bool]] = []
    async with served(worker(raising(error)), answered=lambda *of: told.append(of)) as call:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(b"")
    assert (refusal.value.code().name, refusal.value.details()) == (code, "brr")
    assert told == [("Worker.Version", True)]


async def test_unexpected_error_is_logged_and_told_by_its_type_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with served(worker(raising(RuntimeError("a secret")))) as call:
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(b"")
    assert (refusal.value.code().name, refusal.value.details()) == ("INTERNAL", "internal error: RuntimeError")
    assert "a secret" in caplog.text


async def test_refusal_of_the_context_comes_before_the_message_is_read() -> None:
    async def stranger(peer: GrpcPeer) -> str:
        raise ColdError("who are you?")

    async with served(worker(answering, stranger)) as call:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(b"\xff no message")
    assert refusal.value.details() == "who are you?"


async def test_context_has_the_metadata_and_no_certificate_without_tls() -> None:
    async def who(peer: GrpcPeer) -> tuple[bytes | None, str]:
        return peer.certificate, peer.metadata["x-name"]

    async with served(worker(answering, who)) as call:
        answer = await call(b"", metadata=(("x-name", "me"),))
    assert answer.version == "(None, 'me')"


async def test_interceptors_see_every_call() -> None:
    seen: list[str] = []

    class Noting(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            seen.append(details.method)
            return await continuation(details)

    async with served(worker(answering), interceptors=[Noting()]) as call:
        assert (await call(b"")).version == "None"
    assert seen == [f"/{WORKER}/Version"]


async def test_table_that_is_not_the_proto_files_is_an_error() -> None:
    service = worker(answering)
    rpcs = {**service.table.rpcs, "Version": Rpc("Version", Empty, pb.AppInfo, answering)}
    with pytest.raises(TypeError, match=r"^dstack_guest\.Worker\.Version: the table has other types than the"):
        async with served(GrpcService(WORKER, ServiceTable("Worker.", rpcs), anyone)):
            pass


async def test_call_in_progress_is_answered_while_the_server_closes(tmp_path: Path) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(context: Any, request: Empty) -> pb.WorkerVersion:
        begun.set()
        await go_on.wait()
        return pb.WorkerVersion(version="done")

    path = reserve_unix(tmp_path / "grpc.sock")
    server = await serve_grpc((worker(slow),), statuses={}, path=path)
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = channel.unary_unary(f"/{WORKER}/Version", response_deserializer=pb.WorkerVersion.FromString)
        answer = asyncio.ensure_future(_result(call(b"")))
        await begun.wait()
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0)
        go_on.set()
        assert (await answer).version == "done"
        await closing
    assert not (tmp_path / "grpc.sock").exists()


async def _result(call: Any) -> pb.WorkerVersion:
    answer: pb.WorkerVersion = await call
    return answer


async def test_socket_file_that_somebody_serves_is_left_alone(tmp_path: Path) -> None:
    path = reserve_unix(tmp_path / "grpc.sock")
    server = await serve_grpc((worker(answering),), statuses={}, path=path)
    try:
        with pytest.raises(ListenError, match=r": another process listens there \(set by --grpc-sock\)$"):
            reserve_unix(path, setting="--grpc-sock")
    finally:
        await server.close()


@pytest.mark.parametrize("letter", ["x", "%", "ü", "✓", "𝄞", "\n"])
def test_details_are_cut_between_letters_and_within_the_limit(letter: str) -> None:
    wire = 1 if letter == "x" else 3 * len(letter.encode())
    fits = letter * (MAX_DETAILS // wire)
    assert details(fits) == fits
    longer = fits + letter
    assert details(longer) == f"{fits}… ({len(longer.encode())} bytes, cut)"


def test_details_take_what_is_no_text() -> None:
    assert details("a \udc80 b") == "a ? b"
