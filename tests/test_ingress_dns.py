"""TXT records from a name server: messages laid out by hand after RFC 1035, over UDP and TCP, on both event loops."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.gateway.ingress.dns_message import DnsError, TxtAnswer, encode_query, parse_answer
from dstack_emu.gateway.ingress.dns_records import DnsRecords
from tests.ingress import LOOPS, TIMEOUT
from tests.ports import refusing_port

NAME = "_dstack-app-address.shop.example"
QUERY = bytes.fromhex("beef 0100 0001 0000 0000 0000") + (
    b"\x13_dstack-app-address\x04shop\x07example\x00" + bytes.fromhex("0010 0001")
)
TXT = bytes.fromhex("c00c 0010 0001 0000012c 0009") + b"\x08vm1:8443"
CNAME = bytes.fromhex("c00c 0005 0001 0000012c 0006") + b"\x03vm1\xc0\x0c"


def answer(query: bytes, *records: bytes, flags: int = 0x8180) -> bytes:
    """Lay out an answer to a query."""
    return query[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0) + query[12:] + b"".join(records)


def test_query_is_that_of_the_specification() -> None:
    assert encode_query(NAME, 0xBEEF) == QUERY


@pytest.mark.parametrize("name", ["", "a..b", "." * 10, "a" * 64 + ".example", "a." * 127 + "b", "straße.example"])
def test_name_that_dns_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(DnsError, match="is no domain name"):
        encode_query(name, 1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (answer(QUERY, TXT), TxtAnswer(b"vm1:8443", 300)),
        (answer(QUERY, CNAME, TXT, TXT[:-8] + b"\x07vm2:844"), TxtAnswer(b"vm1:8443", 300)),
        (answer(QUERY, CNAME), TxtAnswer()),
        (answer(QUERY), TxtAnswer()),
        (answer(QUERY, flags=0x8183), TxtAnswer()),
        (answer(QUERY, flags=0x8380), TxtAnswer(is_truncated=True)),
    ],
)
def test_answer_is_the_first_string_of_the_first_record(data: bytes, expected: TxtAnswer) -> None:
    assert parse_answer(data, QUERY) == expected


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "at least 12 bytes, got 0"),
        (QUERY, "to another query"),
        (b"\0\0" + answer(QUERY, TXT)[2:], "to another query"),
        (answer(QUERY, TXT).replace(b"shop", b"ship"), "to another question"),
        (answer(QUERY, flags=0x8182), "with status 2"),
        (answer(QUERY, TXT)[:-1], "a TXT record is cut off"),
        (answer(QUERY, TXT[:-9] + b"\x09vm1:8443"), "a TXT record is cut off"),
        (answer(QUERY, TXT)[:-12], "the answer is cut off"),
    ],
)
def test_bytes_that_are_no_answer_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(DnsError, match=why):
        parse_answer(data, QUERY)


@given(st.binary(max_size=100))
def test_any_records_are_an_answer_or_refused(records: bytes) -> None:
    with contextlib.suppress(DnsError):
        parse_answer(answer(QUERY, records, records, records), QUERY)


@contextmanager
def name_server(respond: Callable[[bytes, bool], bytes]) -> Iterator[tuple[str, int]]:
    """Answer queries over UDP and TCP; `respond` is given the query, and whether it came over TCP."""

    def serve_udp() -> None:
        with contextlib.suppress(OSError):
            while True:
                query, peer = udp.recvfrom(512)
                if not query:
                    return
                udp.sendto(respond(query, False), peer)

    def serve_tcp() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = tcp.accept()
                with sock:
                    sock.settimeout(TIMEOUT)
                    query = sock.recv(int.from_bytes(sock.recv(2, socket.MSG_WAITALL), "big"), socket.MSG_WAITALL)
                    data = respond(query, True)
                    sock.sendall(len(data).to_bytes(2, "big") + data)

    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        address: tuple[str, int] = tcp.getsockname()
        udp.bind(address)
        threads = [threading.Thread(target=serve, daemon=True) for serve in (serve_udp, serve_tcp)]
        for thread in threads:
            thread.start()
        try:
            yield address
        finally:
            udp.sendto(b"", address)
            tcp.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(TIMEOUT)


@pytest.mark.parametrize("loop", LOOPS)
def test_record_of_a_server_is_kept_as_long_as_it_is_valid(loop: str) -> None:
    queries: list[bytes] = []

    def respond(query: bytes, is_tcp: bool) -> bytes:
        queries.append(query)
        return answer(query, TXT if b"shop" in query else TXT.replace(bytes.fromhex("0000012c"), bytes(4)))

    async def ask(server: tuple[str, int]) -> None:
        records = DnsRecords([server])
        for name in (NAME, NAME.upper(), NAME.replace("shop", "short"), NAME.replace("shop", "short")):
            assert await records.lookup(name) == b"vm1:8443"

    with name_server(respond) as server, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(ask(server))
    assert [b"shop" in query for query in queries] == [True, False, False]


@pytest.mark.parametrize("loop", LOOPS)
def test_answer_that_is_too_long_for_udp_is_asked_for_over_tcp(loop: str) -> None:
    def respond(query: bytes, is_tcp: bool) -> bytes:
        return answer(query, TXT) if is_tcp else answer(query, flags=0x8380)

    with name_server(respond) as server, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        assert runner.run(DnsRecords([server]).lookup(NAME)) == b"vm1:8443"


@pytest.mark.parametrize("loop", LOOPS)
def test_next_server_is_asked_if_one_fails_and_none_is_no_record(loop: str) -> None:
    def fail(query: bytes, is_tcp: bool) -> bytes:
        return answer(query, flags=0x8182)

    def respond(query: bytes, is_tcp: bool) -> bytes:
        return answer(query, TXT)

    with (
        name_server(fail) as failing,
        name_server(respond) as server,
        refusing_port() as port,
        asyncio.Runner(loop_factory=LOOPS[loop]) as runner,
    ):
        nobody = ("127.0.0.1", port)
        assert runner.run(DnsRecords([nobody, failing, server]).lookup(NAME)) == b"vm1:8443"
        assert runner.run(DnsRecords([nobody, failing]).lookup(NAME)) is None
        assert runner.run(DnsRecords([server]).lookup("a..b")) is None
        assert runner.run(DnsRecords([]).lookup(NAME)) is None
