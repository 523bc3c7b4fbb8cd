"""The server name is found in what OpenSSL sends, however that is cut; other bytes are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.gateway.ingress.client_hello import MAX_BYTES, ServerNameReader
from dstack_emu.gateway.ingress.errors import RefusedConnectionError
from tests.tls import client_hello

NAME = "3327603e03f5bd1f830812ca4a789277fc31f577-8080s.app.localhost"


HELLO = client_hello(NAME)


def in_records(hello: bytes, sizes: list[int]) -> bytes:
    """Split the one record of a hello into several; the last size holds for the rest."""
    rest, records = hello[5:], b""
    while rest:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        records += hello[:3] + len(rest[:size]).to_bytes(2, "big") + rest[:size]
        rest = rest[size:]
    return records


def read(*segments: bytes) -> str | None:
    """Read segments until the name is there."""
    reader = ServerNameReader()
    for segment in segments:
        if (name := reader.receive(segment)) is not None:
            return name
    return None


def in_segments(data: bytes, size: int) -> list[bytes]:
    """Cut bytes into segments of a size."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_name_is_found_in_a_whole_hello() -> None:
    assert read(HELLO) == NAME


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_name_is_found_in_a_hello_that_comes_in_segments(size: int) -> None:
    assert read(*in_segments(HELLO, size)) == NAME


@pytest.mark.parametrize("size", [1, 3, 100])
def test_name_is_found_in_a_hello_of_several_records(size: int) -> None:
    records = in_records(HELLO, [size])
    assert read(records) == NAME
    assert read(*in_segments(records, 1)) == NAME


def test_name_is_found_before_the_hello_is_complete() -> None:
    end = HELLO.index(NAME.encode()) + len(NAME)
    assert read(HELLO[: end - 1]) is None
    assert read(HELLO[:end]) == NAME


def test_name_is_found_at_the_beginning_of_a_hello_that_is_longer_than_what_is_read() -> None:
    long = client_hello(NAME, alpn=tuple(f"{number:0250}" for number in range(200)))
    assert len(long) > 10 * MAX_BYTES
    assert read(long) == NAME


def test_name_that_is_not_within_the_first_bytes_is_none() -> None:
    padding = b"\xff\x01" + (MAX_BYTES).to_bytes(2, "big") + bytes(MAX_BYTES)  # an extension before the name's
    session = 5 + 4 + 34
    suites = session + 1 + HELLO[session]
    extensions = suites + 2 + int.from_bytes(HELLO[suites : suites + 2], "big") + 2 + 2
    body = HELLO[9:extensions] + padding + HELLO[extensions:]
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    hello = HELLO[:3] + len(message).to_bytes(2, "big") + message
    with pytest.raises(RefusedConnectionError, match="no sni found in the first 4096 bytes"):
        read(*in_segments(hello, 1000))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: app\r\n\r\n",
        b"\x16\x02\x00\x00\x10" + HELLO[5:],  # SSL 2
        b"\x17" + HELLO[1:],  # application data
        HELLO[:5] + b"\x02" + HELLO[6:],  # a ServerHello
        HELLO[:3] + b"\x00\x00" + HELLO[5:],  # an empty record
        HELLO[:3] + b"\x40\x01" + HELLO[5:],  # a record that is longer than any
        client_hello(None),
    ],
)
def test_bytes_that_are_no_hello_with_a_name_are_refused_at_once(data: bytes) -> None:
    with pytest.raises(RefusedConnectionError, match="^no sni found$"):
        read(data)


def test_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(RefusedConnectionError, match="^sni: invalid utf-8$"):
        read(HELLO.replace(b"app.localhost", b"app.l\xffcalhost"))


@given(st.data())
def test_hello_is_read_whatever_its_records_and_segments_are(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=20))
    records = in_records(HELLO, [*sizes, 600])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(records)), max_size=20)))
    segments = [records[start:end] for start, end in zip([0, *cuts], [*cuts, len(records)], strict=True)]
    assert read(*segments) == NAME


@given(st.one_of(st.binary(max_size=200), st.tuples(st.integers(0, 516), st.binary(min_size=1, max_size=8))))
def test_any_bytes_are_a_name_or_a_refusal_or_a_wait_for_more(change: bytes | tuple[int, bytes]) -> None:
    data = change if isinstance(change, bytes) else HELLO[: change[0]] + change[1] + HELLO[change[0] + len(change[1]) :]
    reader = ServerNameReader()
    try:
        name = reader.receive(data)
        while name is None and len(data) <= MAX_BYTES:  # waits end
            data += bytes(500)
            name = reader.receive(bytes(500))
        assert name is not None
    except RefusedConnectionError:
        pass


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_bytes_after_the_hello_do_not_matter(size: int) -> None:
    assert read(*in_segments(HELLO + b"anything", size)) == NAME
    assert read(*in_segments(in_records(HELLO, [100]) + b"anything", size)) == NAME
