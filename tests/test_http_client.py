"""The HTTP client against a server that writes bytes: which answers are read, and that each has its own connection."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import pytest

from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http.answer import AnswerReader
from dstack_emu.transport.http.client_connection import ClientConnection
from dstack_emu.transport.http_client import HttpAnswer, HttpClient
from tests.ports import refusing_port

MAX = 1000
BODY = b'{"isAllowed": true}'


@dataclass
class Server:
    """Answers each request with the next pieces, each in a segment of its own; None in place of one hangs up."""

    answers: list[list[bytes | None]] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once there was a question, and once a client hung up or was hung up on."""

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next((int(h[15:]) for h in head.split(b"\r\n") if h.startswith(b"Content-Length:")), 0)
                self.requests.append(head + await reader.readexactly(length))
                self.asked.set()
                for piece in self.answers.pop(0):
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
                    for _ in range(3):  # the client, in this very loop, reads what there is
                        await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.left.set()
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    serving = Server()
    listener = await asyncio.start_server(serving.converse, "127.0.0.1", 0)
    serving.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield serving
    listener.close()


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    made = HttpClient(timeout=5, max_answer=MAX, headers={"User-Agent": "test/1"})
    yield made
    await made.close()


def http(status: str, body: bytes = b"", *headers: str, length: bool = True) -> bytes:
    """An answer of HTTP/1.1."""
    said = (f"Content-Length: {len(body)}",) if length else ()
    return "\r\n".join((f"HTTP/1.1 {status}", *said, *headers, "", "")).encode() + body


def chunked(body: bytes) -> bytes:
    """An answer in chunks of seven bytes."""
    chunks = [body[at : at + 7] for at in range(0, len(body), 7)]
    data = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    return http("200 OK", b"", "Transfer-Encoding: chunked", length=False) + data


PLAIN = http("200 OK", BODY, "Content-Type: application/json", 'ETag: "one"')

READABLE: dict[str, tuple[list[bytes | None], int, bytes]] = {
    "plain": ([PLAIN], 200, BODY),
    "plain, as Node has it": (
        [http("200 OK", BODY, "Connection: keep-alive", "Keep-Alive: timeout=5")],
        200,
        BODY,
    ),
    "without a reason": ([http("200 ", BODY)], 200, BODY),
    "empty": ([http("200 OK")], 200, b""),
    "not modified": ([http("304 Not Modified", length=False)], 304, b""),
    "not modified, with the length of the document": (
        [http("304 Not Modified", b"", "Content-Length: 500", length=False)],
        304,
        b"",
    ),
    "no content": ([http("204 No Content", length=False)], 204, b""),
    "a refusal": ([http("500 Internal Server Error", b"oops")], 500, b"oops"),
    "a redirection": ([http("302 Found", b"", "Location: /other")], 302, b""),
    "in two segments": ([PLAIN[:40], PLAIN[40:]], 200, BODY),
    "head and body": ([PLAIN[: -len(BODY)], BODY], 200, BODY),
    "byte by byte": ([bytes([byte]) for byte in PLAIN], 200, BODY),
    "in chunks": ([chunked(BODY)], 200, BODY),
    "packed": (
        [http("200 OK", gzip.compress(BODY), "Content-Encoding: gzip")],
        200,
        BODY,
    ),
    "deflated": ([http("200 OK", zlib.compress(BODY), "Content-Encoding: deflate")], 200, BODY),
    "after an informational one": ([http("103 Early Hints", length=False) + PLAIN], 200, BODY),
    "then it closes": ([http("200 OK", BODY, "Connection: close")], 200, BODY),
    "HTTP/1.0": ([PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0", 1)], 200, BODY),
    "until it closes": ([http("200 OK", BODY, length=False), None], 200, BODY),
    "a header twice": ([http("200 OK", BODY, "X: 1", "X: 2")], 200, BODY),
    "a header in UTF-8": ([http("200 OK", BODY, "X: ü")], 200, BODY),
}


@pytest.mark.parametrize("name", READABLE)
async def test_any_answer_is_read_and_each_has_its_own_connection(
    server: Server, client: HttpClient, name: str
) -> None:
    pieces, status, body = READABLE[name]
    server.answers = [pieces, [PLAIN], pieces]
    for expected_status, expected in ((status, body), (200, BODY), (status, body)):
        answer = await client.send("POST", server.url, b"{}")
        assert (answer.status, answer.body) == (expected_status, expected)
    assert server.connections == 3


async def test_headers_are_found_by_their_names_in_lower_case(server: Server, client: HttpClient) -> None:
    server.answers = [[PLAIN], [PLAIN[:40], PLAIN[40:]]]
    for _ in range(2):
        assert (await client.send("GET", server.url)).headers["etag"] == '"one"'


UNREADABLE: dict[str, tuple[list[bytes | None], str]] = {
    "closes": ([None], "connection closed before the answer"),
    "closes within the head": ([PLAIN[:20], None], "connection closed before the answer"),
    "closes within the body": ([PLAIN[:-3], None], "connection closed within the answer"),
    "closes within chunks": ([chunked(BODY)[:-7], None], "connection closed within the answer"),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9.2\r\n"], "the answer is not HTTP"),
    "two lengths": ([http("200 OK", BODY, "Content-Length: 5")], "the answer is not HTTP"),
    "a length that is none": ([http("200 OK", BODY, "Content-Length: +5", length=False)], "the answer is not HTTP"),
    "a length and chunks": (
        [http("200 OK", b"0\r\n\r\n", "Transfer-Encoding: chunked")],
        "the answer is not HTTP",
    ),
    "a head without end": ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000], "the answer is not HTTP"),
    "a long head": ([http("200 OK", BODY, "X: " + "x" * 10_000)], "the answer is not HTTP"),
    "a NUL in the head": ([http("200 OK", BODY, "X: \0")], "the answer is not HTTP"),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_what_cannot_be_read_is_an_error(server: Server, client: HttpClient, name: str) -> None:
    pieces, said = UNREADABLE[name]
    server.answers = [[PLAIN], pieces, [PLAIN]]
    await client.send("POST", server.url, b"{}")
    with pytest.raises(NoAnswerError) as refused:
        await client.send("POST", server.url, b"{}")
    assert str(refused.value) == said
    assert (await client.send("POST", server.url, b"{}")).body == BODY


@pytest.mark.parametrize(
    "write",
    [
        lambda body: [http("200 OK", body)],
        lambda body: [chunked(body)],
        lambda body: [http("200 OK", gzip.compress(body), "Content-Encoding: gzip")],
        lambda body: [http("200 OK", body, length=False), None],
    ],
    ids=["plain", "in chunks", "packed", "until it closes"],
)
async def test_an_answer_of_the_greatest_length_is_read_and_one_byte_more_is_not(
    server: Server, client: HttpClient, write: Callable[[bytes], list[bytes | None]]
) -> None:
    server.answers = [write(b"x" * MAX), write(b"x" * (MAX + 1))]
    assert len((await client.send("POST", server.url)).body) == MAX
    with pytest.raises(AnswerTooLongError):
        await client.send("POST", server.url)


async def test_an_answer_that_nobody_requested_is_no_answer(server: Server, client: HttpClient) -> None:
    forged = http("200 OK", b"forged")
    server.answers = [[PLAIN, forged], [PLAIN + forged], [PLAIN], [PLAIN[:40], PLAIN[40:] + forged], [PLAIN]]
    bodies = [(await client.send("POST", server.url)).body for _ in range(5)]
    assert bodies == [BODY] * 5


async def test_server_that_speaks_before_it_is_sent_the_request_gives_no_answer() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(PLAIN)
        with suppress(ConnectionError):
            await reader.read()
        left.set()
        writer.close()

    left = asyncio.Event()
    listener = await asyncio.start_server(speak, "127.0.0.1", 0)
    connections: set[ClientConnection] = set()
    address = listener.sockets[0].getsockname()
    _, connection = await asyncio.get_running_loop().create_connection(lambda: ClientConnection(connections), *address)
    assert connections == {connection}
    await asyncio.wait_for(left.wait(), 5)  # the client ends the connection
    with pytest.raises(NoAnswerError) as refused:
        await connection.exchange(b"GET / HTTP/1.1\r\n\r\n", AnswerReader(MAX))
    assert str(refused.value) == "the server spoke before it was sent the request"
    listener.close()


@pytest.mark.parametrize("says", [[], [PLAIN[:40]], [chunked(BODY)[:60]]], ids=["nothing", "a head", "a chunk"])
async def test_a_server_that_hangs_is_given_up(server: Server, says: list[bytes | None]) -> None:
    client = HttpClient(timeout=1.0, max_answer=MAX)  # enough for the answer that comes
    server.answers = [says, [PLAIN]]
    with pytest.raises(TimeoutError):
        await client.send("POST", server.url)
    assert (await client.send("POST", server.url)).body == BODY
    assert server.connections == 2
    await client.close()


async def test_a_caller_that_gives_up_takes_its_connection_along(server: Server, client: HttpClient) -> None:
    server.answers = [[], [PLAIN]]
    gone = asyncio.create_task(client.send("POST", server.url))
    await server.asked.wait()
    gone.cancel()
    assert (await client.send("POST", server.url)).body == BODY
    assert server.connections == 2
    assert gone.cancelled()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_request_that_is_lost_is_not_repeated(server: Server, client: HttpClient, method: str) -> None:
    server.answers = [[None], [PLAIN]]
    with pytest.raises(NoAnswerError, match="^connection closed before the answer$"):
        await client.send(method, server.url)
    assert len(server.requests) == 1
    assert (await client.send(method, server.url)).status == 200


async def test_questions_at_the_same_time_have_connections_of_their_own(server: Server, client: HttpClient) -> None:
    server.answers = [[PLAIN]] * 20
    answers = await asyncio.gather(*(client.send("POST", server.url, b"x") for _ in range(10)))
    answers += await asyncio.gather(*(client.send("POST", server.url, b"x") for _ in range(10)))
    assert answers == [HttpAnswer(200, answers[0].headers, BODY)] * 20
    assert server.connections == 20


async def test_what_is_sent_is_what_a_session_of_aiohttp_sends(server: Server, client: HttpClient) -> None:
    url = server.url.replace("http://", "http://user:secret@") + "/a b/ü?c=d#e"
    server.answers = [[PLAIN], [PLAIN]]
    await client.send("POST", url, b'{"a":1}', {"Content-Type": "application/json"})
    async with aiohttp.ClientSession(
        headers={"User-Agent": "test/1", "Connection": "close"}, skip_auto_headers=("Accept-Encoding",)
    ) as session:
        await session.post(url, data=b'{"a":1}', headers={"Content-Type": "application/json"})

    def parsed(request: bytes) -> tuple[bytes, set[bytes], bytes]:
        head, _, body = request.partition(b"\r\n\r\n")
        line, *headers = head.split(b"\r\n")
        return line, set(headers), body

    assert parsed(server.requests[0]) == parsed(server.requests[1])


@pytest.mark.parametrize("url", ["", "nothing", "ftp://127.0.0.1/", "http://", "http://:80/", "/path"])
async def test_a_url_that_is_none_is_refused(client: HttpClient, url: str) -> None:
    with pytest.raises(NoAnswerError) as refused:
        await client.send("GET", url)
    assert str(refused.value) == "not a URL"


async def test_a_server_that_is_not_there_is_an_error(client: HttpClient) -> None:
    with refusing_port() as port, pytest.raises(NoAnswerError) as refused:
        await client.send("POST", f"http://127.0.0.1:{port}")
    assert str(refused.value) == "Connection refused"
