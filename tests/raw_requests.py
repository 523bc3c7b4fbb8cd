"""Requests as upstream's Rust SDK sends them, byte by byte, and requests that could be read in two ways.

Source of the first: Dstack-TEE/dstack, sdk/rust/src/{dstack_client,tappd_client}.rs. Over http reqwest's `.json()` and
the SDK's own header each write a Content-Type; over a socket file the client's `Host` is the SDK's, and TappdClient
gives none.
"""

from collections.abc import Callable, Mapping
from typing import Final

_JSON: Final = "content-type: application/json"

RawRequest = Callable[[str, bytes], bytes]
"""Makes a POST of a JSON body to a path."""


def _form(*headers: str) -> RawRequest:
    def write(path: str, body: bytes) -> bytes:
        lines = (f"POST {path} HTTP/1.1", *headers, f"content-length: {len(body)}", "", "")
        return "\r\n".join(lines).encode() + body

    return write


SDK_FORMS: Final[Mapping[str, RawRequest]] = {
    "DstackClient over http": _form(_JSON, _JSON, "accept: */*", "host: 127.0.0.1:8090"),
    "DstackClient over a socket": _form(_JSON, "host: dstack", _JSON),
    "TappdClient over a socket": _form(_JSON, _JSON),
    "Host and User-Agent twice": _form(_JSON, "host: x", "host: x", "user-agent: a", "user-agent: a"),
    "a head of 60 KiB": _form(_JSON, "host: x", f"x-long: {'x' * 60 * 1024}"),
}


def _chunked(*headers: str, end: bytes = b"\r\n0\r\n\r\n") -> RawRequest:
    def write(path: str, body: bytes) -> bytes:
        lines = (f"POST {path} HTTP/1.1", "Host: x", *headers, "Transfer-Encoding: chunked", "", "")
        return "\r\n".join(lines).encode() + b"%x\r\n%b%b" % (len(body), body, end)

    return write


SMUGGLED: Final[Mapping[str, RawRequest]] = {
    "two lengths": _form("Host: x", _JSON, "Content-Length: 1"),
    "the same length twice": lambda path, body: _form("Host: x", f"Content-Length: {len(body)}")(path, body),
    "both framings": _chunked("Content-Length: 3"),
    "a broken chunk": _chunked(end=b"XX\r\n0\r\n\r\n"),
    "a space before the colon": _form("Host : x"),
    "NUL in a value": _form("Host: x", "X: a\0b"),
}
