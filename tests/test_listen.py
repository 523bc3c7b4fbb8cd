"""Sockets to listen on: how they are bound, what is refused by name, and how a server starts and closes."""

import asyncio
import contextlib
import json
import os
import re
import socket
from pathlib import Path

import pytest
from aiohttp import web

from dstack_emu.transport.http import Application, Request, Response
from dstack_emu.transport.listen import GRACE, ListenError, bind_tcp, bind_unix, serve
from tests.toy import Toy, ToyError, application, connect, post, raw, read_answer, served


def test_bind_tcp_of_a_taken_port_names_address_cause_and_setting() -> None:
    with bind_tcp("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            bind_tcp("127.0.0.1", port, setting="core.onboard.port")
    assert str(caught.value) == (f"cannot listen on 127.0.0.1:{port}: the address is in use (set by core.onboard.port)")
    assert caught.value.setting == "core.onboard.port"


@pytest.mark.parametrize(
    ("host", "port", "cause"),
    [
        ("192.0.2.1", 0, "192.0.2.1:0: this machine has no such address"),
        ("no host.invalid", 0, "no host.invalid:0: no such address"),
        ("127.0.0.1", 65536, "127.0.0.1:65536: the port is not in 0 to 65535"),
    ],
)
def test_bind_tcp_of_an_impossible_address_names_the_cause(host: str, port: int, cause: str) -> None:
    with pytest.raises(ListenError, match=re.escape(f"cannot listen on {cause}")):
        bind_tcp(host, port)


def test_bind_unix_replaces_a_socket_file_that_nobody_listens_on(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    bind_unix(path).close()
    assert path.is_socket()
    with bind_unix(path) as sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert sock.getsockname() == str(path)


def test_bind_unix_leaves_a_live_socket_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with bind_unix(path):
        with pytest.raises(ListenError, match=r"unix:.*/s\.sock: another process listens there \(set by X\)$"):
            bind_unix(path, setting="X")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_bind_unix_leaves_other_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("mine")
    with pytest.raises(ListenError, match="a file that is not a socket is there"):
        bind_unix(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "cause"),
    [("x" * 200, "the path is too long for a socket"), ("none/s.sock", "its folder does not exist")],
)
def test_bind_unix_of_an_impossible_path_names_the_cause(tmp_path: Path, name: str, cause: str) -> None:
    with pytest.raises(ListenError, match=cause):
        bind_unix(tmp_path / name)


async def test_a_bound_socket_takes_connections_before_it_is_served() -> None:
    sock = bind_tcp("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    writer.write(raw("POST", "/Version?json"))
    async with served(application(Toy(), "guest"), sock):
        assert (await read_answer(reader)).status == 200
        writer.close()


async def test_an_accepted_socket_has_its_options() -> None:
    found: list[int] = []

    async def look(request: Request) -> Response:
        accepted = request.transport.get_extra_info("socket")
        options = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_NODELAY))
        found.extend(accepted.getsockopt(*option) for option in options)
        return Response()

    app = Application()
    app.add("GET", "/", look)
    server = await serve(app, bind_tcp("127.0.0.1", 0))
    try:
        done = await asyncio.create_subprocess_exec("curl", "-sf", server.url)
        assert await done.wait() == 0
        assert all(found)
        assert len(found) == 2
    finally:
        await server.close()


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
async def test_the_url_of_a_server_is_one_to_connect_to(host: str, shown: str) -> None:
    try:
        sock = bind_tcp(host, 0)
    except ListenError:
        pytest.skip(f"this machine has no {host}")
    async with served(application(Toy(), "guest"), sock) as server:
        assert server.url == f"http://{shown}:{sock.getsockname()[1]}"
        assert (await post(server, "/Version?json")).status == 200


async def test_close_ends_idle_connections_at_once_and_removes_the_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    server = await serve(application(Toy(), "guest"), bind_unix(path))
    reader, writer = await connect(server)
    writer.write(raw("POST", "/Version?json"))
    await read_answer(reader)
    begun = asyncio.get_running_loop().time()
    await server.close()
    assert asyncio.get_running_loop().time() - begun < GRACE / 2
    assert await reader.read() == b""
    assert not path.exists()
    writer.close()


async def test_close_lets_a_call_in_progress_finish() -> None:
    toy = Toy()
    server = await serve(application(toy, "guest"), bind_tcp("127.0.0.1", 0))
    reader, writer = await connect(server)
    writer.write(raw("POST", "/GetQuote?json", b'{"report_data":"07"}'))
    await toy.started.wait()
    closing = asyncio.create_task(server.close())
    toy.may_answer.set()
    assert json.loads((await read_answer(reader)).body)["report_data"] == "07"
    await closing
    writer.close()


async def test_close_does_not_wait_for_a_call_that_never_ends() -> None:
    toy = Toy()
    server = await serve(application(toy, "guest"), bind_tcp("127.0.0.1", 0))
    reader, writer = await connect(server)
    writer.write(raw("POST", "/GetQuote?json"))
    await toy.started.wait()
    begun = asyncio.get_running_loop().time()
    await server.close()
    assert asyncio.get_running_loop().time() - begun < GRACE + 1
    assert await reader.read() == b""
    writer.close()


async def test_close_keeps_a_socket_file_that_another_server_put_there(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    first = await serve(application(Toy(), "guest"), bind_unix(path))
    os.rename(path, tmp_path / "moved")
    async with served(application(Toy(), "guest"), bind_unix(path)) as second:
        await first.close()
        assert (await post(second, "/Version?json")).status == 200


async def test_serve_closes_the_socket_where_the_application_does_not_start() -> None:
    async def fail(app: web.Application) -> None:
        raise ToyError("no")

    app = web.Application()
    app.on_startup.append(fail)
    sock = bind_tcp("127.0.0.1", 0)
    with pytest.raises(ToyError):
        await serve(app, sock)
    assert sock.fileno() == -1


async def test_server_that_is_cancelled_while_it_starts_leaves_nothing_in_the_loop() -> None:
    """The descriptor of its socket is soon another socket's, which the loop must be able to watch."""
    for steps in range(4):
        sock = bind_tcp("127.0.0.1", 0)
        starting = asyncio.create_task(serve(Application(), sock))
        for _ in range(steps):
            await asyncio.sleep(0)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).close()
        sock.close()
        server = await serve(Application(), bind_tcp("127.0.0.1", 0))
        reader, writer = await asyncio.open_connection(*server.url.removeprefix("http://").split(":"))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 404")
        writer.close()
        await server.close()
