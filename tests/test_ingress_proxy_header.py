"""The PROXY header: as the specification and dstack's own tests have it."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.gateway.ingress.errors import RefusedConnectionError
from dstack_emu.gateway.ingress.proxy_header import MAX_V2, ProxyHeader, header_of, read_header

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V1 = b"PROXY TCP4 1.2.3.4 5.6.7.8 11111 22222\r\n"
V2 = SIGNATURE + bytes.fromhex("2111000c 01020304 05060708 2b67 56ce")
V2_LOCAL = SIGNATURE + bytes.fromhex("20000000")
V2_IPV6 = SIGNATURE + bytes.fromhex("21210024") + bytes(15) + b"\x01" + bytes(15) + b"\x02" + bytes.fromhex("2b6756ce")

READ = {
    V1: "1.2.3.4:11111",
    b"PROXY TCP6 ::1 ::2 11111 22222\r\n": "[::1]:11111",
    b"PROXY UNKNOWN\r\n": "unknown",
    b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n": "unknown",
    V2: "1.2.3.4:11111",
    V2_IPV6: "[::1]:11111",
    V2_LOCAL: "unknown",
}


@pytest.mark.parametrize(("header", "client"), READ.items())
def test_header_is_read_as_far_as_it_goes_and_passed_on(header: bytes, client: str) -> None:
    assert read_header(header + b"\x16\x03") == (ProxyHeader(client, header), len(header))
    assert all(read_header(header[:size]) is None for size in range(len(header)))


def test_additional_fields_of_version_2_are_not_passed_on() -> None:
    extended = V2[:14] + b"\x00\x14" + V2[16:] + b"\x03\x00\x05abcde"
    read = read_header(extended)
    assert read == (ProxyHeader("1.2.3.4:11111", V2), len(extended))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n", "no valid proxy protocol header detected"),
        (b"\x16\x03\x01", "no valid proxy protocol header detected"),
        (b"PROXY" + b"A" * 200, r"no valid proxy protocol header detected \(v1 terminator not found\)"),
        (SIGNATURE + b"\x21\x11" + MAX_V2.to_bytes(2, "big"), "v2 proxy protocol header is too long"),
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 11111\r\n", "failed to parse proxy protocol header"),
        (b"PROXY TCP4 ::1 ::2 1 2\r\n", "'::1' is no IPv4 address"),
        (b"PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n", "b'1.2.3' is no address"),
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n", "b'65536' is no port"),
        (SIGNATURE + b"\x31\x11\x00\x0c", "version and command 0x31"),
        (SIGNATURE + b"\x22\x11\x00\x0c", "version and command 0x22"),
        (SIGNATURE + b"\x21\x41\x00\x0c", "family 0x41"),
        (SIGNATURE + b"\x21\x11\x00\x0b", "11 bytes"),
    ],
)
def test_bytes_that_are_no_header_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(RefusedConnectionError, match=why):
        read_header(data)


def test_header_of_a_socket_is_version_2() -> None:
    assert header_of(("1.2.3.4", 11111), ("5.6.7.8", 22222), socket.AF_INET) == ProxyHeader("1.2.3.4:11111", V2)
    assert header_of(("::1", 11111, 0, 0), ("::2", 22222, 0, 0), socket.AF_INET6) == ProxyHeader("[::1]:11111", V2_IPV6)
    assert header_of("", "", socket.AF_UNIX) == ProxyHeader("unknown", SIGNATURE + b"\x21\x01\x00\x00")


@given(st.binary(max_size=40).flatmap(lambda data: st.sampled_from([data, b"PROXY " + data, SIGNATURE + data])))
def test_any_bytes_are_a_header_or_a_refusal_or_a_wait_for_more(data: bytes) -> None:
    try:
        while (read := read_header(data)) is None and len(data) <= MAX_V2:
            data += bytes(50)
    except RefusedConnectionError:
        return
    assert read is not None
    assert 0 < read[1] <= len(data)
