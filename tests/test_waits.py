"""What a process says when SIGUSR1 asks what it waits for, and who gives up waiting for a client or a server."""

import asyncio
import contextlib
import json
import re
import select
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import grpc.aio
import pytest
from aiohttp import web
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import kms_pb2
from dstack_emu.cli import waits
from dstack_emu.deployment import healthcheck
from dstack_emu.transport.aiohttp_server import AiohttpServer
from dstack_emu.transport.errors import TransportError
from dstack_emu.transport.grpc_client import call
from dstack_emu.transport.http.deadline import Deadlines
from dstack_emu.transport.listen import accept_on, bind_tcp
from tests.commands import run_inside
from tests.processes import Command, start

END = "end of what the process waits for"


@contextmanager
def silent_peer() -> Iterator[socket.socket]:
    """A server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def said(process: Command, errors: IO[str], *, until: str = "") -> str:
    """Ask a process what it waits for, again until it says so; return its last words."""
    text, asked = "", 0
    while not re.search(until, text):
        process.send_signal(signal.SIGUSR1)
        asked += 1
        while text.count(END) < asked:
            assert process.poll(0.02) is None, text
            text = Path(f"/proc/self/fd/{errors.fileno()}").read_text()
    return text[text.rindex("\nprocess ") :]


def target(folder: Path, port: int) -> Path:
    """A description of two KMS that accept connections by gRPC, and say nothing."""
    needed = ("auth-src", "auth-dst", "kms-src", "kms-dst")
    listeners = [f"kms-{side}-grpc{more}" for side in ("src", "dst") for more in ("", "-mtls")]
    description = {
        "services": dict.fromkeys(needed, f"http://user:password@127.0.0.1:{port}"),
        "policies": {side: str(folder / side) for side in ("src", "dst")},
        "grpc": dict.fromkeys(listeners, f"127.0.0.1:{port}"),
    }
    file = folder / "stack.json"
    file.write_text(json.dumps(description))
    return file


def test_runbook_says_whom_it_waits_for_and_goes_on(tmp_path: Path) -> None:
    with silent_peer() as server, tempfile.TemporaryFile("w+") as errors:
        port = server.getsockname()[1]
        process = start("runbook", "--against", str(target(tmp_path, port)), "--transport", "grpc", stderr=errors)
        try:
            server.accept()[0].close()  # it has begun
            text = said(process, errors, until=r"over gRPC[^$]*grpc_client\.py:\d+ call:")
            again = said(process, errors, until="open calls: 1")
        finally:
            process.end(signal.SIGINT)
    asked = r"asks kms\.Onboard/GetAttestationInfo over gRPC"
    assert re.search(rf"since \d+\.\d s: {asked} of 127\.0\.0\.1:{port}\n", text), text
    assert re.search(r"\n    dstack_emu/transport/grpc_client\.py:\d+ call: \S", text), text
    assert "password" not in text + again


def test_server_says_whom_it_answers_whom_it_asks_and_in_which_task() -> None:
    with silent_peer() as server, tempfile.TemporaryFile("w+") as errors:
        port = server.getsockname()[1]
        chain = f"http://user:password@127.0.0.1:{port}/v3/secret?key=secret"
        options = ("--listen", "127.0.0.1:0", "--eth-rpc-url", chain, "--kms-contract", "0x" + "00" * 20)
        process = start("auth", "eth", *options, "--json", stderr=errors)
        try:
            url = json.loads(process.stdout.readline())["url"]
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                text = said(process, errors, until=r"asks POST[^$]*client_connection\.py")
                host, number = client.getsockname()
        finally:
            process.end()
    assert re.search(rf"s: answers GET / at {url} for {host}:{number}\n", text), text
    assert re.search(rf"s: asks POST of http://127\.0\.0\.1:{port}\n", text), text
    assert "client_connection.py" in text, text
    assert not re.search("password|secret", text)


def test_exec_says_whom_its_stack_waits_for_before_there_is_a_command() -> None:
    with silent_peer() as server, tempfile.TemporaryFile("w+") as errors:
        port = server.getsockname()[1]
        process = start("exec", "--webhook", f"src=http://127.0.0.1:{port}", "--", "true", stderr=errors)
        try:
            server.accept()[0].close()  # it has begun
            text = said(process, errors, until=rf"asks \w+ of http://127\.0\.0\.1:{port}/")
            assert process.poll() is None, text
        finally:
            process.end()


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("ctl", "--url", "{url}", "health"), "asks GET of {url}/stack/health"),
        (("health", "--url", "{url}/"), "asks for the health of {url}/"),
    ],
)
def test_command_that_waits_in_its_main_thread_says_for_whom(words: tuple[str, ...], asked: str) -> None:
    with silent_peer() as server, tempfile.TemporaryFile("w+") as errors:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = start(*(word.format(url=url) for word in words), stderr=errors)
        try:
            kept, _ = server.accept()  # it has begun
            with kept:
                said(process, errors, until=rf"s: {re.escape(asked.format(url=url))}\n")
        finally:
            process.end()


def test_tail_ends_if_the_stream_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_emu.cli.commands.control_client.SILENCE", 0.1)
    with silent_peer() as server:
        page = b'{"position": 0, "records": []}'
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(page)

        def answer_once() -> None:
            client, _ = server.accept()
            with client:
                client.recv(65536)
                client.sendall(head + page)

        once = threading.Thread(target=answer_once)
        once.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        ended = run_inside("ctl", "--url", url, "tail")
        once.join()
    assert ended == (2, "", f"Error: {url}: no answer to GET /journal/stream?since=0 within 0.1 s\n")


def test_health_check_ends_if_an_answer_comes_a_byte_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthcheck, "TIMEOUT", 0.2)
    with silent_peer() as server:

        def drip() -> None:
            client, _ = server.accept()
            with client, contextlib.suppress(OSError):
                client.recv(65536)
                while not select.select([client], [], [], 0.02)[0]:  # until the client has gone
                    client.sendall(b"x")

        slow = threading.Thread(target=drip)
        slow.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        problem = healthcheck.check(url)
        slow.join()
    assert problem == f"{url}: timed out"


async def test_report_is_bounded_however_many_wait() -> None:
    async def deep(left: int) -> None:
        await (deep(left - 1) if left else asyncio.Event().wait())

    tasks = [asyncio.create_task(deep(depth), name="x" * 1000) for depth in range(150) for _ in range(3)]
    await asyncio.sleep(0)
    lines = waits.report().splitlines()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert f"tasks: {len(tasks) + 1}, in " in "\n".join(lines)
    assert len(lines) < waits.MAX_STACKS * (waits.MAX_FRAMES + 3)
    assert max(map(len, lines)) < 300


async def test_report_says_what_grpc_waits_for_in_places_without_a_line() -> None:
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await asyncio.sleep(0)
    text = waits.report()
    await server.stop(None)
    assert re.search(r"\n    aio/server\.pyx\.pxi _\w+\n", text), text


@pytest.mark.parametrize(
    ("sent", "awaited"),
    [
        (b"", "a request"),
        (b"POST / HTTP/1.1\r\nHost: x\r\n", "the rest of a head"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc", "the rest of a body"),
        (b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n", "the client to read"),
    ],
)
async def test_aiohttp_server_ends_a_client_that_it_waits_for(sent: bytes, awaited: str) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=await request.read() + bytes(1 << 26 if request.path == "/large" else 0))

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    server = AiohttpServer(app, 0.1, Deadlines(request=0.2, body=0.2, reading=0.2))
    await server.set_up()
    sock = bind_tcp("127.0.0.1", 0)
    listening = await accept_on(sock, server)
    client = socket.create_connection(sock.getsockname())
    with client:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(client, sent)
        async with asyncio.timeout(20):
            while not server.connections:  # noqa: ASYNC110 - aiohttp's server has no event for it
                await asyncio.sleep(0)
            while server.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    listening.close()
    await server.close()


async def test_aiohttp_server_does_not_wait_for_the_body_of_a_client_that_went_away() -> None:
    async def handle(_request: web.Request) -> web.Response:
        return web.Response(text="without the body")

    app = web.Application()
    app.router.add_post("/", handle)
    server = AiohttpServer(app, 0.1)
    await server.set_up()
    sock = bind_tcp("127.0.0.1", 0)
    listening = await accept_on(sock, server)
    before = asyncio.all_tasks()
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    assert b"200 OK" in await reader.readline()
    late = asyncio.all_tasks() - before
    (connection,) = server.connections
    writer.close()
    async with asyncio.timeout(20):
        while connection.transport is not None:  # noqa: ASYNC110 - aiohttp's server has no event for it
            await asyncio.sleep(0)
    for _ in range(20):  # turns of the loop, which take no time
        await asyncio.sleep(0)
    assert late
    assert all(task.done() for task in late)
    assert not server.connections
    listening.close()
    await server.close()


async def test_aiohttp_server_does_not_end_a_client_that_waits_for_it() -> None:
    lifted = asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        await lifted.wait()
        return web.Response(text="late")

    app = web.Application()
    app.router.add_get("/", handle)
    server = AiohttpServer(app, 0.1, Deadlines(request=0.02, body=0.02, reading=0.02))
    await server.set_up()
    sock = bind_tcp("127.0.0.1", 0)
    listening = await accept_on(sock, server)
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    asyncio.get_running_loop().call_later(0.2, lifted.set)  # ten deadlines later
    async with asyncio.timeout(20):
        assert (await reader.read()).endswith(b"late")
    writer.close()
    listening.close()
    await server.close()


@pytest.mark.parametrize(("secure", "awaited"), [(True, "TLS handshake"), (False, "answer to kms.KMS/GetMeta")])
async def test_call_by_grpc_says_whom_it_waited_for_and_how_long(secure: bool, awaited: str) -> None:
    with silent_peer() as server:
        peer = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(TransportError) as late:
            await call(peer, "kms.KMS/GetMeta", Empty(), kms_pb2.GetMetaResponse, seconds=0.2, secure=secure)
    assert str(late.value) == f"error sending request for url ({peer}): no {awaited} within 0.2 s"
