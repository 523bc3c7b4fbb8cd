"""What a client of an aiohttp application does wrong is a line of the log; what a handler does wrong is a traceback."""

import asyncio
import logging

import pytest
from aiohttp import web

from dstack_emu.transport.listen import bind_tcp, reset, serve


async def fail(request: web.Request) -> web.Response:
    raise ValueError("5f-secret-5f")


ENDED = web.AppKey("ended", asyncio.Event)


async def echo(request: web.Request) -> web.Response:
    try:
        return web.Response(body=await request.read())
    finally:
        request.app[ENDED].set()


async def asked(request: bytes, *, goes_away: bool = False) -> bytes:
    """Send a request; return all that is answered until the server closes, or reset the connection after the head."""
    app = web.Application()
    app[ENDED] = asyncio.Event()
    app.router.add_get("/fail", fail)
    app.router.add_post("/echo", echo)
    server = await serve(app, bind_tcp("127.0.0.1", 0))
    try:
        host, _, port = server.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        if goes_away:
            await reader.readuntil(b"100 Continue\r\n\r\n")
            reset(writer.transport)
            await app[ENDED].wait()
            return b""
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer
    finally:
        await server.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x00\xff",
        b"GET / HTTP/3.7\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost : a\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nXX\r\n",
    ],
)
async def test_request_that_cannot_be_read_is_refused_without_a_traceback(
    caplog: pytest.LogCaptureFixture, request_: bytes
) -> None:
    caplog.set_level(logging.DEBUG)
    assert (await asked(request_)).startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))
    records = [record for record in caplog.records if record.name.startswith("dstack_emu")]
    assert [(record.levelno, record.exc_info) for record in records] == [(logging.DEBUG, None)]
    assert records[0].message.startswith("refused with 400: ")


async def test_handler_that_raises_is_a_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    answer = await asked(b"GET /fail HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert "5f-secret-5f" in caplog.text


async def test_client_that_goes_away_within_a_body_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    await asked(head, goes_away=True)
    records = [record for record in caplog.records if record.name.startswith("dstack_emu")]
    assert [(record.levelno, record.exc_info) for record in records] == [(logging.DEBUG, None)]
    assert records[0].message.startswith("the client went away: ")
