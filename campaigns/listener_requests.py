"""What is sent to a listener: valid requests, changed in the ways that parsers of HTTP, TLS and WebSocket get wrong."""

import ssl
import struct
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final

from campaigns.fuzz.mutation import mutated

HEAD_END: Final = b"\r\n\r\n"
LONG: Final = 70_000
"""More bytes than any listener takes in one line or header."""
GARBAGE: Final = (
    b"\0" * 64,
    b"\r\n" * 8,
    b"\x16\x03\x01\x02\0\x01\0",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\xff\xfe{}",
)
LENGTHS: Final = (b"-1", b"+2", b"0x10", b"1e3", b"", b"99999999999999999999", b"1000000", b"1", b"2, 2", b"\xb2")
CHUNKS: Final = (
    b"XX\r\n0\r\n\r\n",
    b"-1\r\n0\r\n\r\n",
    b"ffffffffffffffffffff\r\n",
    b"2\r\n{}XX0\r\n\r\n",
    b"2;" + b"a" * LONG + b"\r\n{}\r\n0\r\n\r\n",
    b"2\r\n{}\r\n0\r\nbad trailer\r\n\r\n",
    b"5\r\n{}",
    b"2\n{}\n0\n\n",
)


def http(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """Return a request after which the connection is closed."""
    length = [f"Content-Length: {len(body)}"] if body or method == "POST" else []
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers, *length, "", ""]
    return "\r\n".join(lines).encode() + body


def parts(request: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the request line, the headers and the body."""
    head, _, body = request.partition(HEAD_END)
    line, _, headers = head.partition(b"\r\n")
    return line, headers, body


def client_hello(name: str) -> bytes:
    """Return the first bytes of a TLS client that asks for a server's name."""
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = ssl.create_default_context().wrap_bio(coming, going, server_hostname=name)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return going.read()
    raise AssertionError("a handshake without an answer")


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """Return a client's WebSocket frame, whose mask is zero."""
    return bytes([0x80 | opcode, 0x80 | len(payload)]) + bytes(4) + payload


UPGRADE: Final = http(
    "GET", "/", b"", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
).replace(b"Connection: close", b"Connection: Upgrade")

Change = Callable[[bytes, Sequence[bytes], Random], bytes]


def _oversized(request: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    line, headers, body = parts(request)
    size = chance.choice((5000, 9000, LONG, 200_000))
    match chance.randrange(4):
        case 0:
            line = line.replace(b" /", b" /" + b"a" * size, 1)
        case 1:
            headers += b"\r\nX-Long: " + b"a" * size
        case 2:
            headers += b"\r\nA: b" * (size // 10)
        case _:
            headers += b"\r\n" + b"a" * size + b": b"
    return line + b"\r\n" + headers + HEAD_END + body


def _wrong_length(request: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    line, headers, body = parts(request)
    kept = [each for each in headers.split(b"\r\n") if not each.lower().startswith(b"content-length")]
    lengths = [b"Content-Length: " + chance.choice(LENGTHS) for _ in range(chance.choice((1, 1, 2)))]
    return b"\r\n".join([line, *kept, *lengths]) + HEAD_END + body


def _chunked(request: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    line, headers, _ = parts(request)
    kept = [each for each in headers.split(b"\r\n") if not each.lower().startswith(b"content-length")]
    name = chance.choice((b"chunked", b"chunked", b"gzip, chunked", b"chunked, chunked", b"xchunked"))
    return b"\r\n".join([line, *kept, b"Transfer-Encoding: " + name]) + HEAD_END + chance.choice(CHUNKS)


def _pipelined(request: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    requests = [chance.choice(others).replace(b"Connection: close\r\n", b"") for _ in range(chance.randint(1, 20))]
    last = mutated(request, others, chance) if chance.randrange(2) else request
    return b"".join([*requests, last])


def _http_1_0(request: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    version = chance.choice((b"HTTP/1.0", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b""))
    request = request.replace(b"HTTP/1.1", version, 1)
    return request.replace(b"Host: localhost\r\n", b"", 1) if chance.randrange(2) else request


def _garbage(request: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    garbage = chance.choice((*GARBAGE, chance.randbytes(chance.randint(1, 2000))))
    return garbage + request if chance.randrange(2) else request + garbage


def _websocket(request: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    upgrade = mutated(UPGRADE, [UPGRADE], chance) if not chance.randrange(4) else UPGRADE
    frames = [_frame(chance) for _ in range(chance.randint(1, 5))]
    return upgrade + b"".join(frames)


def _frame(chance: Random) -> bytes:
    valid = frame(b'{"jsonrpc":"2.0","id":1,"method":"eth_chainId","params":[]}')
    match chance.randrange(7):
        case 0:
            return chance.randbytes(chance.randint(1, 200))
        case 1:  # a length that does not come
            return b"\x81\xff" + struct.pack(">Q", chance.choice((1 << 20, 1 << 40, 1 << 63))) + b"abcd{}"
        case 2:  # not masked
            return b"\x81\x02{}"
        case 3:  # reserved bits, unknown opcodes, fragments of control frames
            return bytes([chance.randrange(256)]) + valid[1:]
        case 4:
            return frame(b"\xff\xfe\0", chance.choice((1, 2, 8, 9, 10)))
        case 5:
            return frame(chance.choice((b"[" * 100, b"null", b"{}", b"[]", b'{"id":1e999}')))
        case _:
            return mutated(valid, [valid], chance)


CHANGES: Final[Mapping[str, Change]] = {
    "mutated": mutated,
    "truncated": lambda request, others, chance: request[: chance.randrange(len(request))],
    "oversized": _oversized,
    "wrong length": _wrong_length,
    "malformed chunks": _chunked,
    "pipelined": _pipelined,
    "HTTP/1.0": _http_1_0,
    "garbage": _garbage,
    "WebSocket": _websocket,
}
BINARY: Final = ("mutated", "truncated", "garbage")
"""The changes of what is no HTTP: a ClientHello, HTTP/2."""
