"""The connection core alone: bytes in, requests and refusals out, without a socket."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_emu.transport.http.body import BodyBrokenError, BodyError, BodyTooLargeError
from dstack_emu.transport.http.connection import (
    MAX_HEAD,
    MAX_HEADERS,
    IncomingRequest,
    InvalidRequest,
    ServerConnection,
)

LIMIT = 100
POST = b"POST /Echo?json HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED = b"POST /Echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def reading(*pieces: bytes) -> ServerConnection:
    connection = ServerConnection(LIMIT)
    for piece in pieces:
        connection.receive(piece)
    return connection


def requests(connection: ServerConnection) -> list[IncomingRequest | InvalidRequest]:
    found = []
    while (following := connection.next_request()) is not None:
        found.append(following)
    return found


def the_request(*pieces: bytes) -> IncomingRequest:
    (request,) = requests(reading(*pieces))
    assert isinstance(request, IncomingRequest)
    return request


def the_refusal(*pieces: bytes) -> InvalidRequest:
    connection = reading(*pieces)
    (refusal,) = requests(connection)
    assert isinstance(refusal, InvalidRequest)
    assert connection.is_over
    return refusal


def head(*headers: str, target: str = "/", method: str = "POST", version: str = "1.1") -> bytes:
    return "\r\n".join((f"{method} {target} HTTP/{version}", *headers, "", "")).encode()


# ---- Requests --------------------------------------------------------------------------------------------


def test_request_is_read() -> None:
    request = the_request(POST)
    assert (request.method, request.path, request.query) == ("POST", "/Echo", "json")
    assert dict(request.headers) == {"host": "x", "content-length": "3"}
    assert (request.is_kept_alive, request.is_http_10, request.awaits_continue) == (True, False, False)
    assert (request.body.take(), request.body.has_ended) == (b"abc", True)


def test_request_is_read_however_it_is_cut() -> None:
    for cut in range(1, len(POST)):
        request = the_request(POST[:cut], POST[cut:])
        assert (request.path, request.query, request.headers["HOST"], request.body.take()) == (
            "/Echo",
            "json",
            "x",
            b"abc",
        )


def test_request_in_single_bytes_is_read() -> None:
    assert the_request(*(bytes([byte]) for byte in POST)).body.take() == b"abc"


def test_request_comes_out_once_its_head_is_complete_and_its_body_later() -> None:
    connection = reading(POST[:-3])
    (request,) = requests(connection)
    assert isinstance(request, IncomingRequest)
    assert not request.body.is_settled
    assert connection.is_within_request
    told: list[bool] = []
    request.body.when_settled(lambda: told.append(True))
    connection.receive(b"ab")
    assert told == []
    connection.receive(b"c")
    assert told == [True]
    assert request.body.take() == b"abc"
    assert not connection.is_within_request


def test_body_in_chunks_is_joined_and_its_trailers_are_dropped() -> None:
    request = the_request(CHUNKED, b"1\r\na\r\n2;x=y\r\nbc\r\n0\r\nX-Trailer: 1\r\n\r\n")
    assert request.body.take() == b"abc"
    assert "x-trailer" not in request.headers


def test_pipelined_requests_come_out_in_order() -> None:
    connection = reading(POST + head("Content-Length: 0", target="/two") + POST)
    assert [r.path for r in requests(connection) if isinstance(r, IncomingRequest)] == ["/Echo", "/two", "/Echo"]
    assert connection.can_continue


@pytest.mark.parametrize("name", ["Content-Type", "Host", "User-Agent", "X-Other"])
def test_header_may_be_repeated_and_its_first_value_counts(name: str) -> None:
    request = the_request(head(f"{name}: a", f"{name.upper()}: b", "Content-Length: 0"))
    assert (request.headers[name], request.headers.get_all(name)) == ("a", ["a", "b"])
    assert len(request.headers) == 2


def test_host_may_be_missing() -> None:
    assert "host" not in the_request(head("Content-Length: 0")).headers


def test_header_value_may_hold_any_text() -> None:
    request = the_request(b"GET / HTTP/1.1\r\nX: \xc3\xa9\r\nY: \xff\r\n\r\n")
    assert (request.headers["x"], request.headers["y"]) == ("é", "\udcff")


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("//GetKey?json", "//GetKey", "json"),
        ("/a%20b?c=%64?e", "/a%20b", "c=%64?e"),
        ("/a#b", "/a", ""),
        ("/?", "/", ""),
        ("*", "*", ""),
        ("http://x/GetKey?json", "/GetKey", "json"),
        ("http://x", "/", ""),
        ("https://user@x:81/a/b", "/a/b", ""),
        ("/http://x/a", "/http://x/a", ""),
    ],
)
def test_target_gives_path_and_query_as_they_were_sent(target: str, path: str, query: str) -> None:
    request = the_request(head("Content-Length: 0", target=target, method="OPTIONS"))
    assert (request.path, request.query) == (path, query)


# ---- The end of a connection -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_head", "is_kept"),
    [
        (head("Content-Length: 0"), True),
        (head("Content-Length: 0", "Connection: close"), False),
        (head("Content-Length: 0", "Connection: Keep-Alive, X"), True),
        (head("Content-Length: 0", version="1.0"), False),
        (head("Content-Length: 0", "Connection: keep-alive", version="1.0"), True),
    ],
)
def test_client_decides_whether_the_connection_goes_on(request_head: bytes, is_kept: bool) -> None:
    connection = reading(request_head)
    (request,) = requests(connection)
    assert isinstance(request, IncomingRequest)
    assert request.is_kept_alive == is_kept
    assert connection.can_continue == is_kept


@pytest.mark.parametrize("together", [True, False])
def test_what_follows_the_last_request_is_not_read(together: bool) -> None:
    last = head("Content-Length: 0", "Connection: close")
    connection = reading(last + POST) if together else reading(last, POST)
    assert len(requests(connection)) == 1
    assert not connection.can_continue


def test_end_of_file_leaves_what_was_asked_in_full() -> None:
    connection = reading(POST + POST + POST[:-1])
    connection.receive_eof()
    assert len(requests(connection)) == 2
    assert not connection.can_continue


def test_end_of_file_breaks_the_body_in_progress() -> None:
    connection = reading(POST[:-1])
    (request,) = requests(connection)
    assert isinstance(request, IncomingRequest)
    connection.receive_eof()
    assert request.body.is_settled
    assert not request.body.has_ended
    with pytest.raises(BodyBrokenError):
        request.body.take()


def test_end_of_file_within_a_head_is_no_request() -> None:
    connection = reading(POST[:20])
    connection.receive_eof()
    assert requests(connection) == []
    assert not connection.can_continue


# ---- Refusals --------------------------------------------------------------------------------------------

SMUGGLED = {
    "two lengths": head("Content-Length: 3", "Content-Length: 4") + b"abcd",
    "the same length twice": head("Content-Length: 3", "Content-Length: 3") + b"abc",
    "a list of lengths": head("Content-Length: 3, 3") + b"abc",
    "a signed length": head("Content-Length: +3") + b"abc",
    "a length in words": head("Content-Length: three"),
    "no length": head("Content-Length: "),
    "a length out of bounds": head(f"Content-Length: {2**64}"),
    "digits that are no ASCII": head("Content-Length: \xb2"),
    "both framings": head("Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "both framings, the other way round": head("Transfer-Encoding: chunked", "Content-Length: 3") + b"0\r\n\r\n",
    "chunks twice": head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunks that are not the last coding": head("Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "another coding": head("Transfer-Encoding: identity"),
    "chunks in HTTP/1.0": head("Transfer-Encoding: chunked", version="1.0") + b"0\r\n\r\n",
    "a space before the colon": head("Host : x"),
    "a space before a name": head("Host: x", " Content-Length: 3"),
    "a folded header": head("Host: x", " y"),
    "NUL in a value": head("Host: \0"),
    "NUL in a name": head("Ho\0st: x"),
    "a bare carriage return": b"POST / HTTP/1.1\r\nHost: x\ry: z\r\n\r\n",
    "bare line feeds": POST.replace(b"\r\n", b"\n"),
    "no name": head(": x"),
    "no colon": head("Host"),
    "a space in the target": head(target="/a b"),
    "HTTP/9.9": head(version="9.9"),
    "HTTP/2.0": head(version="2.0"),
    "HTTP/0.9": head(version="0.9"),
    "no version": b"GET /\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown method": head(method="BREW"),
    "a method in small letters": head(method="post"),
    "an absolute target that is none": head(target="http://"),
    "chunks behind a request to upgrade": head("Connection: Upgrade", "Upgrade: h2c", "Transfer-Encoding: chunked"),
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_could_be_read_in_two_ways_is_refused(name: str) -> None:
    assert the_refusal(SMUGGLED[name]).status == 400


@pytest.mark.parametrize("name", SMUGGLED)
def test_refused_request_ends_the_connection_after_those_before_it(name: str) -> None:
    connection = reading(POST + SMUGGLED[name], POST)
    first, refusal = requests(connection)
    assert isinstance(first, IncomingRequest)
    assert first.body.take() == b"abc"
    assert isinstance(refusal, InvalidRequest)
    assert not connection.can_continue


@pytest.mark.parametrize(
    "chunks",
    [
        b"5\r\nabcdeXX\r\n",
        b"g\r\n",
        b"-1\r\n",
        b"1 \r\na\r\n",
        b"1\na\n0\n\n",
        b"fffffffffffffffff\r\n",
        b"0\r\n?\r\n",
        b"0\r\nX : 1\r\n\r\n",
    ],
)
def test_broken_chunks_break_the_body_and_end_the_connection(chunks: bytes) -> None:
    connection = reading(CHUNKED + chunks + POST)
    (request,) = requests(connection)
    assert isinstance(request, IncomingRequest)
    with pytest.raises(BodyBrokenError):
        request.body.take()
    assert not connection.can_continue


# ---- Limits ----------------------------------------------------------------------------------------------


def filled(size: int) -> bytes:
    """A head of so many bytes in lines of at most 10 000."""
    left = size - len(head())
    lines = []
    while left > 0:
        length = left if left <= 10_000 else min(10_000, left - 10)
        lines.append("x: " + "a" * (length - 5))
        left -= length
    made = head(*lines)
    assert len(made) == size
    return made


@pytest.mark.parametrize("pieces", [1, 7])
def test_head_of_the_greatest_length_is_read_and_a_longer_one_refused(pieces: int) -> None:
    def cut(data: bytes) -> list[bytes]:
        size = -(-len(data) // pieces)
        return [data[at : at + size] for at in range(0, len(data), size)]

    assert the_request(*cut(filled(MAX_HEAD))).path == "/"
    assert the_refusal(*cut(filled(MAX_HEAD + 100))).status == 431


def test_head_without_end_is_refused_before_it_ends() -> None:
    connection = ServerConnection(LIMIT)
    connection.receive(b"GET / HTTP/1.1\r\nX: ")
    sent = 0
    while not connection.is_over:
        connection.receive(b"a" * 1000)
        sent += 1000
    assert sent <= MAX_HEAD + 1000
    assert [refusal.status for refusal in requests(connection) if isinstance(refusal, InvalidRequest)] == [431]


def test_target_without_end_is_refused() -> None:
    assert the_refusal(b"GET /", *(b"a" * 10_000 for _ in range(7))).status == 431


def test_so_many_headers_are_read_and_no_more() -> None:
    assert len(the_request(head(*(f"X-{n}: " for n in range(MAX_HEADERS)))).headers) == MAX_HEADERS
    assert the_refusal(head(*(f"X-{n}: " for n in range(MAX_HEADERS + 1)))).status == 431


@pytest.mark.parametrize("chunked", [True, False])
def test_body_of_the_greatest_length_is_read_and_one_byte_more_is_not(chunked: bool) -> None:
    def sent(size: int) -> bytes:
        if chunked:
            return CHUNKED + b"1\r\na\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (size - 1, b"a" * (size - 1))
        return head(f"Content-Length: {size}") + b"a" * size

    assert the_request(sent(LIMIT)).body.take() == b"a" * LIMIT
    connection = reading(sent(LIMIT + 1) + POST)
    larger, following = requests(connection)
    assert isinstance(larger, IncomingRequest)
    assert larger.body.has_ended
    with pytest.raises(BodyTooLargeError):
        larger.body.take()
    assert isinstance(following, IncomingRequest)
    assert following.body.take() == b"abc"


def test_body_that_is_announced_too_long_fails_before_it_comes() -> None:
    (request,) = requests(reading(head(f"Content-Length: {LIMIT + 1}")))
    assert isinstance(request, IncomingRequest)
    assert request.body.is_settled
    assert not request.body.has_ended


@pytest.mark.parametrize("endless", [b"1;" + b"x" * 1000, b"0\r\n" + b"X: " + b"a" * 1000])
def test_framing_without_end_breaks_the_body(endless: bytes) -> None:
    connection = reading(CHUNKED, endless)
    (request,) = requests(connection)
    assert isinstance(request, IncomingRequest)
    for _ in range(MAX_HEAD // 1000):
        connection.receive(b"x" * 1000)
    assert connection.is_over
    with pytest.raises(BodyBrokenError):
        request.body.take()


# ---- Other headers that change how a connection is read --------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "version", "awaits"),
    [
        (("Expect: 100-continue",), "1.1", True),
        (("Expect: 100-Continue",), "1.1", True),
        (("Expect: 100-continue",), "1.0", False),
        (("Expect: something",), "1.1", False),
    ],
)
def test_client_may_wait_to_be_asked_for_its_body(headers: tuple[str, ...], version: str, awaits: bool) -> None:
    assert the_request(head(*headers, "Content-Length: 3", version=version)).awaits_continue == awaits


@pytest.mark.parametrize("length", [0, 3])
def test_request_to_upgrade_is_read_as_any_other(length: int) -> None:
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    whole = head(*upgrade, f"Content-Length: {length}") + b"abc"[:length] + POST
    for cut in range(1, len(whole)):
        first, second = requests(reading(whole[:cut], whole[cut:]))
        assert isinstance(first, IncomingRequest)
        assert isinstance(second, IncomingRequest)
        assert (first.body.take(), second.body.take()) == (b"abc"[:length], b"abc"), cut


def test_request_for_a_tunnel_is_the_last_one() -> None:
    (request,) = requests(reading(head(method="CONNECT", target="x:1") + POST))
    assert isinstance(request, IncomingRequest)
    assert (request.method, request.path, request.is_kept_alive) == ("CONNECT", "x:1", False)


# ---- Any bytes -------------------------------------------------------------------------------------------

_PIECES = [b"\r\n", b"\r\n\r\n", b":", b" ", b"?", b"%", b"\xff", b"0", b"Content-Length: 1\r\n", b"\0"]


@st.composite
def _damaged(draw: st.DrawFn) -> list[bytes]:
    """Requests with a few bytes put in, taken out or replaced, in up to three pieces."""
    data = bytearray(draw(st.sampled_from([POST, CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", *SMUGGLED.values()])) + POST)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.one_of(st.binary(max_size=2), st.sampled_from(_PIECES)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=2)))
    return [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _told(pieces: list[bytes]) -> list[object]:
    """All that a connection says of some bytes, up to the end of file."""
    connection = reading(*pieces)
    connection.receive_eof()
    said: list[object] = []
    for each in requests(connection):
        if isinstance(each, InvalidRequest):
            said.append(each.status)
            continue
        try:
            body: object = each.body.take()
        except BodyError as error:
            body = type(error)
        said.append((each.method, each.path, each.query, dict(each.headers), each.is_kept_alive, body))
    return said


@settings(max_examples=500, deadline=None)
@given(pieces=_damaged())
def test_any_bytes_mean_the_same_however_they_are_cut(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    assert _told(pieces) == _told([whole]) == _told([bytes([byte]) for byte in whole])
