"""Serving over real sockets: order, flow, deadlines and the end of connections."""

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dstack_emu.transport.http import Application, BodyTooLargeError, Handler, Request, Response
from dstack_emu.transport.http.deadline import Deadlines
from dstack_emu.transport.http.protocol import HttpServer
from dstack_emu.transport.listen import GRACE, Server, bind_tcp, bind_unix, serve
from tests.identities import self_signed, server_tls
from tests.toy import Toy, application, connect, exchange, post, raw, read_answer, served

LIMIT = 60.0
"""Seconds after which a test counts as hanging."""


@pytest.fixture(params=["tcp", "unix"])
def sock(request: pytest.FixtureRequest, tmp_path: Path) -> socket.socket:
    return bind_tcp("127.0.0.1", 0) if request.param == "tcp" else bind_unix(tmp_path / "s.sock")


def answering(handler: Handler, **settings: object) -> Application:
    """An application whose one handler is at `/`, for POST and GET."""
    app = Application(**settings)  # type: ignore[arg-type]
    app.add("POST", "/", handler)
    app.add("GET", "/", handler)
    return app


async def all_of(server: Server, *pieces: bytes) -> bytes:
    """Send pieces, then the end of file; return what the server says until it closes."""
    reader, writer = await connect(server)
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
    async with asyncio.timeout(LIMIT):
        said = await reader.read()
    writer.close()
    return said


# ---- Answers ---------------------------------------------------------------------------------------------


async def test_an_answer_has_these_bytes() -> None:
    async def answer(_request: Request) -> Response:
        return Response.of(b"{}", "application/json", X_Own="1")

    async with served(answering(answer, headers=(("X-App-Version", "2"),))) as server:
        said = await all_of(server, raw("POST", "/"))
    assert re.sub(rb"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", b"Date: now", said) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Own: 1\r\nContent-Length: 2\r\nDate: now\r\n"
        b"Server: dstack-emu\r\nX-App-Version: 2\r\n\r\n{}"
    )


async def test_client_that_goes_away_before_the_answer_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    client = socket.socket()

    async def answer(_request: Request) -> Response:
        client.close()  # the answer meets nobody, and the connection is reset before it is ended
        return Response.of(b"{}", "application/json")

    async with served(answering(answer)) as server:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (urlsplit(server.url).hostname, urlsplit(server.url).port))
        await loop.sock_sendall(client, raw("POST", "/", b"abc", {"Content-Length": "9"}, close=True))
        async with asyncio.timeout(LIMIT):
            while client.fileno() != -1 or server.connections:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("version", "connection", "said"),
    [
        ("1.1", "", b""),
        ("1.1", "Connection: close\r\n", b"Connection: close\r\n"),
        ("1.0", "", b""),
        ("1.0", "Connection: keep-alive\r\n", b"Connection: keep-alive\r\n"),
    ],
)
async def test_an_answer_has_the_requests_version_and_says_whether_the_connection_ends(
    version: str, connection: str, said: bytes
) -> None:
    async with served(application(Toy(), "guest")) as server:
        answer = await all_of(server, f"GET /Version HTTP/{version}\r\n{connection}\r\n".encode())
    assert answer.startswith(f"HTTP/{version} 200 OK\r\n".encode())
    assert re.findall(rb"Connection: [^\n]+\n", answer) == ([said] if said else [])


async def test_head_is_answered_by_the_head_alone() -> None:
    async with served(application(Toy(), "guest")) as server:
        get = await all_of(server, raw("GET", "/Version"))
        head = await all_of(server, raw("HEAD", "/Version"))
    assert head.partition(b"\r\n\r\n")[2] == b""
    assert re.findall(rb"Content-Length: \d+", head) == re.findall(rb"Content-Length: \d+", get)


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_has_no_length(status: int) -> None:
    async def answer(_request: Request) -> Response:
        return Response(status)

    async with served(answering(answer)) as server:
        said = await all_of(server, raw("GET", "/"))
    assert b"Content-Length" not in said
    assert said.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("version", "length", "body"),
    [("1.1", None, b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"), ("1.0", None, b"abc"), ("1.1", 3, b"abc")],
)
async def test_an_answer_that_is_made_while_it_is_sent(version: str, length: int | None, body: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"a", b"", b"bc"):
            yield piece

    async def answer(_request: Request) -> Response:
        return Response(body=pieces(), length=length)

    async with served(answering(answer)) as server:
        said = await all_of(server, f"GET / HTTP/{version}\r\nConnection: keep-alive\r\n\r\n".encode())
    assert said.partition(b"\r\n\r\n")[2] == body
    assert (b"Transfer-Encoding: chunked\r\n" in said) == (body != b"abc")


async def test_an_answer_that_fails_while_it_is_sent_is_broken_off(caplog: pytest.LogCaptureFixture) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        raise ValueError("5f-secret-5f")

    async def answer(_request: Request) -> Response:
        return Response(body=pieces(), length=3)

    async with served(answering(answer)) as server:
        reader, writer = await connect(server)
        writer.write(raw("GET", "/"))
        async with asyncio.timeout(LIMIT):
            head = await reader.readuntil(b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() in (b"", b"a")
        writer.close()
    assert b"Content-Length: 3" in head
    assert "5f-secret-5f" in caplog.text


async def test_a_handler_that_raises_ends_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(_request: Request) -> Response:
        raise ValueError("5f-secret-5f")

    async with served(answering(answer, headers=(("X-App-Version", "1"),))) as server:
        said = await all_of(server, raw("POST", "/") + raw("POST", "/"))
    assert said.startswith(b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain; charset=utf-8\r\n")
    assert said.endswith(b"\r\n\r\n500 Internal Server Error\n\nServer got itself in trouble")
    assert b"X-App-Version: 1\r\nConnection: close\r\n" in said
    assert said.count(b"HTTP/1.1") == 1
    assert "5f-secret-5f" in caplog.text


async def test_middlewares_go_around_every_request_the_first_one_outermost() -> None:
    async def answer(_request: Request) -> Response:
        return Response(body=b"0")

    def marking(mark: bytes) -> object:
        async def around(request: Request, handler: Handler) -> Response:
            answered = await handler(request)
            assert isinstance(answered.body, bytes)
            return replace(answered, body=answered.body + mark)

        return around

    async with served(answering(answer, middlewares=[marking(b"2"), marking(b"1")])) as server:
        assert (await exchange(server, raw("GET", "/"))).body == b"012"
        assert (await exchange(server, raw("GET", "/nowhere"))).body.endswith(b"</html>\n12")


# ---- Requests that follow one another --------------------------------------------------------------------


async def test_requests_in_any_pieces_are_answered_in_order(sock: socket.socket) -> None:
    requests = b"".join(raw("POST", "/GetKey?json", b'{"path":"%s"}' % name) for name in (b"a", b"b", b"c"))
    async with served(application(Toy(), "guest"), sock) as server:
        for size in (1, 7, 100, len(requests)):
            pieces = [requests[at : at + size] for at in range(0, len(requests), size)]
            keys = re.findall(rb'"key":"(\w\w)', await all_of(server, *pieces))
            assert keys == [b"61", b"62", b"63"], size


async def test_a_body_that_looks_like_a_request_is_none() -> None:
    async with served(application(Toy(), "guest")) as server:
        inner = raw("POST", "/Broken?json")
        head, body = raw("POST", "/GetKey", inner).partition(inner)[:2]
        assert (await all_of(server, head, body)).count(b"HTTP/1.1 ") == 1


async def test_a_head_that_ends_in_a_request_is_one_request() -> None:
    async with served(application(Toy(), "guest")) as server:
        said = await all_of(server, b"POST /Version?json HTTP/1.1\r\nX-Begun: ", raw("POST", "/Broken?json"))
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"internal error" not in said


async def test_a_request_whose_body_is_cut_off_is_not_answered(sock: socket.socket) -> None:
    async with served(application(Toy(), "guest"), sock) as server:
        assert await all_of(server, raw("POST", "/Version", b"1")[:-1]) == b""


async def test_what_comes_during_a_call_is_answered_after_it(sock: socket.socket) -> None:
    toy = Toy()
    async with served(application(toy, "guest"), sock) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json", b'{"report_data":"01"}'))
        await toy.started.wait()
        for path in ("a", "b"):
            writer.write(raw("POST", "/GetKey?json", json.dumps({"path": path}).encode()))
        writer.write(raw("GET", "/Version"))
        writer.write_eof()
        async with asyncio.timeout(LIMIT):  # a whole other call: the server has had time to read
            assert (await post(server, "/Version?json")).status == 200
            toy.may_answer.set()
            answers = [await read_answer(reader) for _ in range(4)]
            assert await reader.read() == b""
        assert json.loads(answers[0].body)["report_data"] == "01"
        assert [json.loads(answer.body)["key"][:2] for answer in answers[1:3]] == ["61", "62"]
        assert json.loads(answers[3].body) == {"version": "1", "rev": ""}
        writer.close()


async def test_the_end_of_file_within_what_came_during_a_call_closes_after_its_answer(sock: socket.socket) -> None:
    toy = Toy()
    async with served(application(toy, "guest"), sock) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
        writer.write(b"POST /Vers")
        writer.write_eof()
        toy.may_answer.set()
        async with asyncio.timeout(LIMIT):
            assert (await read_answer(reader)).status == 200
            assert await reader.read() == b""
        writer.close()


async def test_what_is_no_http_during_a_call_is_refused_after_it(sock: socket.socket) -> None:
    toy = Toy()
    async with served(application(toy, "guest"), sock) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
        writer.write(b"\0\0\0\0")
        assert (await post(server, "/Version?json")).status == 200
        toy.may_answer.set()
        async with asyncio.timeout(LIMIT):
            assert [(await read_answer(reader)).status for _ in range(2)] == [200, 400]
            assert await reader.read() == b""
        writer.close()


async def test_a_client_that_goes_away_during_a_call_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy()
    async with served(application(toy, "guest")) as server:
        _, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
        writer.transport.abort()
        async with asyncio.timeout(LIMIT):
            for _ in range(2):  # by the second answer the server knows
                assert (await post(server, "/Version?json")).status == 200
                toy.may_answer.set()
    assert not caplog.records


async def test_a_tls_client_that_ends_before_the_last_answer_leaves_no_connection(tmp_path: Path) -> None:
    toy, identity = Toy(), self_signed(tmp_path, "server")
    trust = ssl.create_default_context(cafile=identity.cert_file)
    async with served(application(toy, "guest"), tls=server_tls(identity)) as server:
        reader, writer = await connect(server, trust)
        writer.write(raw("POST", "/GetQuote?json", close=True))
        await toy.started.wait()
        writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
        for _ in range(100):  # the server meets the end of file
            await asyncio.sleep(0)
        toy.may_answer.set()
        async with asyncio.timeout(LIMIT):
            assert await reader.read() == b""
            while server.connections:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0)
        writer.close()


# ---- Clients that send or read too little or too much ----------------------------------------------------


async def test_who_does_not_read_answers_is_not_read_from() -> None:
    """Or their answers would fill the server's memory."""
    calls: asyncio.Queue[bool] = asyncio.Queue()

    async def note(request: Request) -> Request:
        calls.put_nowait(True)
        return request

    request = raw("POST", "/GetTlsKey?json", json.dumps({"subject": "x" * 60_000}).encode())
    total, taken = 500, 0  # 30 MB of answers
    async with served(application(Toy(), "guest", context=note)) as server:
        _, writer = await connect(server)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(TimeoutError):
            while taken < total:
                writer.write(request)
                async with asyncio.timeout(2):
                    assert await calls.get()
                taken += 1
        assert 0 < taken < total
        writer.transport.abort()


@pytest.mark.parametrize("flood", [bytes(30_000_000), raw("POST", "/Version") * 400_000], ids=["zeros", "requests"])
async def test_what_comes_during_a_call_is_not_taken_without_end(flood: bytes) -> None:
    toy = Toy()
    async with served(application(toy, "guest")) as server:
        _, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
        writer.write(flood)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.5)
        assert writer.transport.get_write_buffer_size() > len(flood) // 3
        writer.transport.abort()
        toy.may_answer.set()


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_client_that_is_still_sending_gets_the_refusal_of_its_body(sock: socket.socket, chunked: bool) -> None:
    size = 5_000_000

    async def answer(request: Request) -> Response:
        with pytest.raises(BodyTooLargeError):
            await request.read()
        return Response(413)

    async with served(answering(answer, max_body=1000), sock) as server:
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, bytes(size)) if chunked else bytes(size)
        reader, writer = await connect(server)
        writer.write(f"POST / HTTP/1.1\r\n{framing}\r\n\r\n".encode() + body)
        async with asyncio.timeout(LIMIT):
            await writer.drain()
            answer_ = await read_answer(reader)
            assert await reader.read() == b""
        assert (answer_.status, answer_.headers["connection"]) == (413, "close")
        writer.close()


async def test_a_client_that_is_still_sending_a_long_head_gets_its_refusal(sock: socket.socket) -> None:
    async with served(application(Toy(), "guest"), sock) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/Version", headers={"X": "x" * 5_000_000}))
        async with asyncio.timeout(LIMIT):
            await writer.drain()
            answer = await read_answer(reader)
            assert await reader.read() == b""
        assert (answer.status, answer.headers["connection"], answer.body) == (431, "close", b"")
        writer.close()


async def test_a_handler_that_does_not_read_a_body_leaves_the_connection_usable() -> None:
    async with served(application(Toy(), "kms")) as server:
        reader, writer = await connect(server)
        for _ in range(2):
            writer.write(raw("POST", "/nowhere", bytes(100_000)))
            assert (await read_answer(reader)).status == 404
        writer.close()


async def test_a_handler_that_answers_before_the_body_has_come_leaves_the_connection_usable() -> None:
    called = asyncio.Event()

    async def answer(_request: Request) -> Response:
        called.set()
        return Response(400)

    async with served(answering(answer)) as server:
        reader, writer = await connect(server)
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
            async with asyncio.timeout(LIMIT):
                await called.wait()
            called.clear()
            writer.write(b"abc")
            answered = await read_answer(reader)
            assert (answered.status, answered.headers.get("connection")) == (400, None)
        writer.close()


async def test_continue_is_not_said_for_a_body_that_nobody_reads() -> None:
    async with served(application(Toy(), "kms")) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/nowhere", b"", {"Expect": "100-continue", "Content-Length": "3"}))
        answer = await read_answer(reader)
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        writer.close()


# ---- Deadlines -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def impatient(app: Application, **deadlines: float) -> AsyncIterator[tuple[str, int]]:
    """Serve with other deadlines; give the address."""
    server = HttpServer(app, grace=GRACE, deadlines=Deadlines(**deadlines))
    with bind_tcp("127.0.0.1", 0) as sock:
        listener = await asyncio.get_running_loop().create_server(server, sock=sock)
        yield sock.getsockname()
        listener.close()
        await server.close()


async def _ends(address: tuple[str, int], *sent: bytes) -> bytes:
    """What a server says, with its client sending no more than this, until it closes."""
    reader, writer = await asyncio.open_connection(*address)
    for piece in sent:
        writer.write(piece)
    async with asyncio.timeout(LIMIT):
        said = await reader.read()
    writer.close()
    return said


async def test_an_idle_connection_is_closed_in_time() -> None:
    async with impatient(application(Toy(), "guest"), request=0.5) as address:
        assert await _ends(address) == b""
        assert (await _ends(address, raw("POST", "/Version"))).count(b"HTTP/1.1 200 OK") == 1


async def test_a_head_that_does_not_end_in_time_is_refused() -> None:
    async with impatient(application(Toy(), "guest"), head=0.5, end=0.5) as address:
        said = await _ends(address, raw("POST", "/Version"), b"POST /Version HTTP/1.1\r\nHo")
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"408"]


async def test_a_head_that_comes_byte_by_byte_has_no_more_time() -> None:
    async with impatient(application(Toy(), "guest"), head=0.2, end=0.5) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"POST /Version HTTP/1.1\r\nX: ")
        answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(LIMIT):
            while not answer.done():
                writer.write(b"x")
                await asyncio.wait((answer,), timeout=0.02)
        assert (await answer).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        writer.close()


async def test_a_body_that_does_not_come_in_time_is_broken() -> None:
    async with impatient(application(Toy(), "guest"), body=0.05, end=0.5) as address:
        said = await _ends(address, raw("POST", "/Version?json", b"abc")[:-1])
    assert b'"failed to read data: the body broke off"' in said
    assert said.startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_a_client_that_does_not_read_in_time_is_cut_off() -> None:
    ended = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1_000_000)
        finally:
            ended.set()

    async def answer(_request: Request) -> Response:
        return Response(body=pieces())

    async with impatient(answering(answer), reading=0.05) as address:
        with socket.create_connection(address) as client:
            client.sendall(raw("GET", "/"))
            async with asyncio.timeout(LIMIT):
                await ended.wait()


# ---- The end of a server -----------------------------------------------------------------------------------


async def test_closing_ends_a_call_that_never_ends() -> None:
    toy = Toy()
    ended = asyncio.Event()

    async def watch(request: Request) -> Request:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: ended.set())
        return request

    async with served(application(toy, "guest", context=watch)) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
    assert ended.is_set()
    assert await reader.read() == b""
    writer.close()


async def test_closing_ends_idle_tls_connections_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity = self_signed(tmp_path, "server")
    trust = ssl.create_default_context(cafile=identity.cert_file)
    async with served(application(Toy(), "guest"), tls=server_tls(identity)) as server:
        reader, writer = await connect(server, trust)
        writer.write(raw("POST", "/Version?json"))
        assert (await read_answer(reader)).status == 200
    async with asyncio.timeout(LIMIT):
        assert await reader.read() == b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    assert not caplog.records


async def test_closing_answers_the_call_in_progress_and_none_after_it() -> None:
    toy = Toy()
    server = await serve(application(toy, "guest"), bind_tcp("127.0.0.1", 0))
    reader, writer = await connect(server)
    writer.write(raw("POST", "/GetQuote?json") + raw("POST", "/Version?json"))
    await toy.started.wait()
    closing = asyncio.create_task(server.close())
    await asyncio.sleep(0)
    toy.may_answer.set()
    async with asyncio.timeout(LIMIT):
        said = await reader.read()
    await closing
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close\r\n" in said
    writer.close()
