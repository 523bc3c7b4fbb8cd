"""Plain requests, which are answered past aiohttp, against aiohttp's own answers to the very same bytes.

Two servers of one application stand side by side; before the second there is a middleware that does nothing, and so
aiohttp answers every request there. What a client reads of both is held against each other, up to the end of file.
"""

import asyncio
import contextlib
import json
import re
import socket
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstack_emu.auth.server import simple_app
from dstack_emu.transport.listen import Server, bind_unix
from dstack_emu.transport.plain import PlainRequest, add_headers, plain_calls
from dstack_emu.transport.prpc_server import Asked
from tests.toy import Toy, application, connect, raw, read_answer, served


@web.middleware
async def _pass(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await handler(request)


@dataclass
class Sides:
    """The two servers, and for each call whether it was a plain one, or no call at all."""

    plain: Server
    aiohttp: Server
    calls: list[bool] = field(default_factory=list)

    async def ask(self, *pieces: bytes) -> bytes:
        """Send the same to both, and end sending; return what both answer, once it is known to be the same."""
        del self.calls[:]
        answers = [await _all(server, pieces) for server in (self.plain, self.aiohttp)]
        assert answers[0] == answers[1]
        return answers[0]


async def _all(server: Server, pieces: tuple[bytes, ...]) -> bytes:
    """What a server says until it closes, without its date."""
    loop, said = asyncio.get_running_loop(), bytearray()
    with socket.socket(socket.AF_UNIX) as sock:  # which gives what was said even where the server did not read all
        sock.setblocking(False)
        await loop.sock_connect(sock, server.url.removeprefix("unix:"))
        with contextlib.suppress(OSError):  # it may have closed by now
            for piece in pieces:
                await loop.sock_sendall(sock, piece)
                for _ in range(8):  # the server, in this very loop, reads what there is
                    await asyncio.sleep(0)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(10):
                while data := await loop.sock_recv(sock, 65536):
                    said += data
    return re.sub(rb"Date: [^\r]+", b"Date:", bytes(said))


@contextlib.asynccontextmanager
async def both_sides() -> AsyncIterator[Sides]:
    """Serve the toy on both."""
    calls: list[bool] = []
    apps = []

    async def note(asked: Asked) -> Asked:
        calls.append(isinstance(asked, PlainRequest))
        return asked

    for middlewares in ((), (_pass,)):
        app = application(Toy(), "kms", "guest", context=note)
        add_headers(app, {"X-App-Version": "1 (100%d)"})
        app.middlewares.extend(middlewares)
        apps.append(app)
    with tempfile.TemporaryDirectory() as folder:
        socks = [bind_unix(Path(folder, name)) for name in ("plain", "aiohttp")]
        async with served(apps[0], socks[0]) as plain, served(apps[1], socks[1]) as other:
            yield Sides(plain, other, calls)


@pytest.fixture
async def sides() -> AsyncIterator[Sides]:
    async with both_sides() as sides:
        yield sides


# ---- One request -----------------------------------------------------------------------------------------

JSON = ("application/json", "application/json; charset=utf-8")
_FIELDS = ("mrAggregated", "osImageHash", "appId", "composeHash", "instanceId", "deviceId")
BOOT_INFO = json.dumps(dict.fromkeys(_FIELDS, "0xaa")).encode()
APP_ID = b'{"app_id":"%s"}' % (b"00" * 20)
PLAIN = {
    "json": raw("POST", "/prpc/GetAppEnvEncryptPubKey?json", APP_ID),
    "prefix": raw("POST", "/prpc/KMS.GetMeta?json"),
    "binary": raw("POST", "/prpc/GetAppEnvEncryptPubKey", b"\x0a\x14" + bytes(20)),
    "binary refused": raw("POST", "/prpc/GetAppEnvEncryptPubKey", b"\x0a\x13" + bytes(19)),
    "garbage": raw("POST", "/prpc/GetAppEnvEncryptPubKey", b"\xff\xff"),
    "refused": raw("POST", "/prpc/GetAppEnvEncryptPubKey?json", b"{}"),
    "no JSON": raw("POST", "/prpc/GetAppEnvEncryptPubKey?json", b"{"),
    "by type": raw("POST", "/prpc/GetAppEnvEncryptPubKey", APP_ID, {"Content-Type": "application/json"}),
    "by type with charset": raw("POST", "/prpc/GetMeta", b"", {"content-type": "application/json; charset=utf-8"}),
    "other query": raw("POST", "/prpc/GetMeta?a=b&json=0"),
    "at the root": raw("POST", "/Version?json"),
    "error of the handler": raw("POST", "/Broken?json"),
    "evidence that does not hold": raw("POST", "/Unproven"),
    "kept": raw("POST", "/Version?json", headers={"Connection": "Keep-Alive"}),
    "odd spaces": raw("POST", "/Version?json", headers={"Content-Length": "\t 0 ", "X-Empty": ""}),
    "its path once more": raw("POST", "/prpc/GetMeta?json", headers={"X-Again": "POST /prpc/GetMeta HTTP/1.1"}),
    "binary body that ends a head": raw("POST", "/Version", b"\r\n\r\n"),
}
NOT_PLAIN = {
    "get": raw("GET", "/prpc/GetMeta?json"),
    "closing": raw("POST", "/prpc/GetMeta?json", close=True),
    "two headers": b"POST /Version?json HTTP/1.1\r\nHost: x\r\nA: 1\r\na: 2\r\nContent-Length: 0\r\n\r\n",
    "no length": b"POST /Version?json HTTP/1.1\r\nHost: x\r\n\r\n",
    "chunks": b"POST /Version?json HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "encoded": raw("POST", "/Version?json", headers={"Content-Encoding": "gzip"}),
    "expecting": raw("POST", "/Version?json", headers={"Expect": "100-continue"}),
    "upgrading": raw("POST", "/Version?json", headers={"Upgrade": "h2c"}),
    "HTTP/1.0": raw("POST", "/Version?json").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "latin-1": raw("POST", "/Version?json").replace(b"Host: x", b"Host: \xe9"),
    "escaped name": raw("POST", "/prpc/%47etMeta?json"),
    "slashes": raw("POST", "/prpc//GetMeta?json"),
    "escaped query": raw("POST", "/prpc/GetMeta?%6ason"),
}
NO_CALL = {
    "no host": b"POST /Version HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "two lengths": b"POST /Version HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "unknown verb": raw("BREW", "/prpc/GetMeta"),
    "wrong verb": raw("PUT", "/prpc/GetMeta"),
    "mount": raw("POST", "/prpc/"),
    "nothing there": raw("POST", "/a/b/c"),
    "signed length": raw("POST", "/Version", headers={"Content-Length": "+0"}),
    "length in words": raw("POST", "/Version", headers={"Content-Length": "none"}),
    "no number of digits": raw("POST", "/Version", headers={"Content-Length": "\xb2"}),
    "space before a colon": raw("POST", "/Version").replace(b"Host:", b"Host :"),
    "folded header": raw("POST", "/Version").replace(b"Host: x", b"Host: x\r\n y"),
    "bare line feeds": raw("POST", "/Version").replace(b"\r\n", b"\n"),
    "NUL": raw("POST", "/Version").replace(b"Host: x", b"Host: \0"),
    "long line": raw("POST", "/Version", headers={"X-Long": "x" * 9000}),
    "many headers": raw("POST", "/Version", headers={f"X-{n}": "" for n in range(200)}),
}


@pytest.mark.parametrize("name", PLAIN)
async def test_a_plain_request_is_answered_as_aiohttp_answers_it(sides: Sides, name: str) -> None:
    assert (await sides.ask(PLAIN[name])).startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
    assert sides.calls == [True, False]


@pytest.mark.parametrize("name", NOT_PLAIN)
async def test_a_request_of_another_form_is_aiohttps(sides: Sides, name: str) -> None:
    assert b" 200 OK" in await sides.ask(NOT_PLAIN[name])
    assert sides.calls == [False, False]


@pytest.mark.parametrize("name", NO_CALL)
async def test_what_is_no_call_is_aiohttps_to_refuse(sides: Sides, name: str) -> None:
    assert not (await sides.ask(NO_CALL[name])).startswith(b"HTTP/1.1 200 ")
    assert sides.calls == []


async def test_a_name_that_nobody_serves_is_refused_alike(sides: Sides) -> None:
    answer = await sides.ask(raw("POST", "/prpc/GetNothing?json"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert sides.calls == [False, False]


async def test_too_short_a_body_is_aiohttps_to_refuse(sides: Sides) -> None:
    assert await sides.ask(raw("POST", "/Version", b"1")[:-1]) == b""


@pytest.mark.parametrize("cut", [1, 20, 40, -13, -1])
async def test_a_request_in_pieces_is_aiohttps(sides: Sides, cut: int) -> None:
    whole = raw("POST", "/GetKey?json", b'{"path":"a"}')
    assert b'"key":"61' in await sides.ask(whole[:cut], whole[cut:])
    assert sides.calls == [False, False]


async def test_a_handler_that_raises_ends_its_connection_as_with_aiohttp(caplog: pytest.LogCaptureFixture) -> None:
    async def raises(_request: object) -> NoReturn:
        raise ValueError("5f-secret-5f")

    with tempfile.TemporaryDirectory() as folder:
        answers = []
        for name, middlewares in (("plain", ()), ("aiohttp", (_pass,))):
            app = web.Application(middlewares=middlewares)
            app.router.add_post("/", raises)
            plain_calls(app).handlers["/"] = raises
            add_headers(app, {"X-App-Version": "1"})
            async with served(app, bind_unix(Path(folder, name))) as server:
                request = raw("POST", "/")
                answers.append(await _all(server, (request, request)))
    assert answers[0] == answers[1]
    assert answers[0].startswith(b"HTTP/1.1 500 ")
    assert answers[0].count(b"HTTP/1.1") == 1
    assert "5f-secret-5f" in caplog.text


@pytest.mark.parametrize("path", ["/bootAuth/app", "/bootAuth/kms"])
@pytest.mark.parametrize("kind", [*JSON, "text/plain", None])
@pytest.mark.parametrize("body", [b"", b"{}", b"[", b'"\xff"', BOOT_INFO, b" " * 60_000 + BOOT_INFO])
async def test_a_webhook_answers_a_plain_request_as_aiohttp_does(
    tmp_path: Path, path: str, kind: str | None, body: bytes
) -> None:
    """KMS ask like this."""
    answers = []
    for name, middlewares in (("plain", ()), ("aiohttp", (_pass,))):
        app = simple_app(tmp_path / "there-is-no-config.json")
        app.middlewares.extend(middlewares)
        async with served(app, bind_unix(tmp_path / name)) as server:
            request = raw("POST", path, body, {} if kind is None else {"Content-Type": kind})
            answers.append(await _all(server, (request,)))
    assert answers[0] == answers[1]
    assert answers[0].startswith(b"HTTP/1.1 200 " if body.endswith(BOOT_INFO) and kind in JSON else b"HTTP/1.1 400 ")


# ---- Several on a connection -----------------------------------------------------------------------------


async def test_plain_requests_follow_one_another_on_a_connection(sides: Sides) -> None:
    one, two = (raw("POST", "/GetKey?json", b'{"path":"%s"}' % name) for name in (b"a", b"b"))
    answer = await sides.ask(one, two, one)
    assert [bytes.fromhex(key)[:1] for key in re.findall(r'"key":"(\w+)"', answer.decode())] == [b"a", b"b", b"a"]
    assert sides.calls[:3] == [True] * 3


async def test_from_a_request_of_another_form_on_a_connection_is_aiohttps(sides: Sides) -> None:
    plain = raw("POST", "/Version?json")
    await sides.ask(plain, raw("GET", "/Version"), plain)
    assert sides.calls == [True, False, False] + [False] * 3


async def test_a_body_that_looks_like_a_request_is_none(sides: Sides) -> None:
    inner = raw("POST", "/Broken?json")
    head, body = raw("POST", "/GetKey", inner).partition(inner)[:2]
    answer = await sides.ask(head, body)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert sides.calls == [False, False]


async def test_a_head_that_ends_in_a_request_is_one_request(sides: Sides) -> None:
    answer = await sides.ask(b"POST /Version?json HTTP/1.1\r\nX-Begun: ", raw("POST", "/Broken?json"))
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"internal error" not in answer


async def test_what_comes_during_a_plain_call_is_answered_after_it() -> None:
    toy = Toy()
    async with served(application(toy, "guest")) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json", b'{"report_data":"01"}'))
        await toy.started.wait()
        for path in ("a", "b"):
            writer.write(raw("POST", "/GetKey?json", json.dumps({"path": path}).encode()))
        writer.write(raw("GET", "/Version"))
        writer.write_eof()
        async with asyncio.timeout(10):  # a whole other call: the server has had time to read
            other = await connect(server)
            other[1].write(raw("POST", "/Version?json"))
            await read_answer(other[0])
            toy.may_answer.set()
            answers = [await read_answer(reader) for _ in range(4)]
            assert await reader.read() == b""
        assert json.loads(answers[0].body)["report_data"] == "01"
        assert [json.loads(answer.body)["key"][:2] for answer in answers[1:3]] == ["61", "62"]
        assert json.loads(answers[3].body) == {"version": "1", "rev": ""}
        for each in (writer, other[1]):
            each.close()


async def test_the_end_of_file_within_what_came_during_a_plain_call_closes_after_its_answer() -> None:
    toy = Toy()
    async with served(application(toy, "guest")) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
        writer.write(b"POST /Vers")
        writer.write_eof()
        toy.may_answer.set()
        async with asyncio.timeout(10):
            assert (await read_answer(reader)).status == 200
            assert await reader.read() == b""
        writer.close()


async def test_a_client_that_goes_away_during_a_plain_call_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy()
    async with served(application(toy, "guest")) as server:
        _, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
        writer.transport.abort()
        async with asyncio.timeout(10):
            for _ in range(2):  # by the second answer the server knows
                reader, other = await connect(server)
                other.write(raw("POST", "/Version?json"))
                assert (await read_answer(reader)).status == 200
                other.close()
                toy.may_answer.set()
    assert not caplog.records


async def test_who_does_not_read_answers_is_not_read_from() -> None:
    """Or their answers would fill the server's memory."""
    calls: asyncio.Queue[bool] = asyncio.Queue()

    async def note(asked: Asked) -> Asked:
        calls.put_nowait(isinstance(asked, PlainRequest))
        return asked

    request = raw("POST", "/GetTlsKey?json", json.dumps({"subject": "x" * 60_000}).encode())
    total, taken = 500, 0  # 30 MB of answers
    async with served(application(Toy(), "guest", context=note)) as server:
        _, writer = await connect(server)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(TimeoutError):
            while taken < total:
                writer.write(request)
                async with asyncio.timeout(0.5):
                    assert await calls.get()
                taken += 1
        assert 0 < taken < total
        writer.transport.abort()


async def test_what_comes_during_a_plain_call_is_not_taken_without_end() -> None:
    toy = Toy()
    async with served(application(toy, "guest")) as server:
        _, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
        writer.write(bytes(30_000_000))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.5)
        assert writer.transport.get_write_buffer_size() > 10_000_000
        writer.transport.abort()
        toy.may_answer.set()


# ---- The end of a server -----------------------------------------------------------------------------------


async def test_closing_ends_a_plain_call_that_never_ends() -> None:
    toy = Toy()
    ended = asyncio.Event()

    async def watch(asked: Asked) -> Asked:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: ended.set())
        return asked

    async with served(application(toy, "guest", context=watch)) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json"))
        await toy.started.wait()
    assert ended.is_set()
    assert await reader.read() == b""
    writer.close()


# ---- Any bytes -------------------------------------------------------------------------------------------

_PIECES = [b"\r\n", b"\r\n\r\n", b":", b" ", b"?", b"%", b"\xff", b"0", b"Content-Length: 1\r\n"]
_REQUESTS = [*PLAIN.values(), *NOT_PLAIN.values()]


@st.composite
def _damaged(draw: st.DrawFn) -> tuple[bytes, ...]:
    """A request with a few bytes put in, taken out or replaced, in up to three pieces."""
    data = bytearray(draw(st.sampled_from(_REQUESTS)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.one_of(st.binary(max_size=2), st.sampled_from(_PIECES)))
    data += draw(st.sampled_from([b"", b"\r\n", _REQUESTS[1]]))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=2)))
    return tuple(bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=_damaged())
def test_any_bytes_are_answered_as_aiohttp_answers_them(pieces: tuple[bytes, ...]) -> None:
    async def compare() -> None:
        async with both_sides() as sides:
            await sides.ask(*pieces)

    asyncio.run(compare())
