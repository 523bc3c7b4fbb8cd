"""The ingress, black box: openssl's and curl's TLS, plain sockets as apps, on both event loops."""

import asyncio
import contextlib
import functools
import queue
import random
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dstack_emu.gateway.ingress.settings import IngressSettings, Timeouts
from dstack_emu.gateway.ingress.tls import DomainTls, domain_tls
from dstack_emu.gateway.state import PolicyEntry
from tests import tls
from tests.identities import Identity, self_signed, server_tls
from tests.ingress import (
    APP,
    DOMAIN,
    LOOPS,
    TIMEOUT,
    HalfClosingClient,
    RunningIngress,
    app_server,
    echo,
    exchanged,
    is_closed,
    read_all,
    read_exactly,
    running_ingress,
)
from tests.ports import refusing_port
from tests.tls import client_hello

MUCH = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Return a certificate."""
    return self_signed(tmp_path_factory.mktemp("ingress"), "wildcard")


@pytest.fixture(scope="module")
def domain(identity: Identity) -> DomainTls:
    """Return the TLS settings of the domain."""
    return domain_tls(Path(identity.cert_file).read_text(), Path(identity.key_file).read_text())


@pytest.fixture(params=LOOPS)
def ingress(request: pytest.FixtureRequest, domain: DomainTls) -> Iterator[RunningIngress]:
    """Run an ingress, on each event loop."""
    with running_ingress(domain, loop=request.param) as running:
        yield running


@pytest.fixture
def hasty(request: pytest.FixtureRequest, domain: DomainTls) -> Iterator[RunningIngress]:
    """Run an ingress with the event loop and the time limits of `limited`."""
    loop, limits = request.param
    with running_ingress(domain, loop=loop, settings=IngressSettings(timeouts=limits)) as running:
        yield running


def limited(**limits: float) -> pytest.MarkDecorator:
    """Let a test have a `hasty` ingress with these limits, on each event loop."""
    timeouts = replace(Timeouts(), **limits)
    runs = [pytest.param((loop, timeouts), id=loop) for loop in LOOPS]
    return pytest.mark.parametrize("hasty", runs, indirect=True)


@pytest.fixture(scope="module")
def shared(domain: DomainTls) -> Iterator[RunningIngress]:
    """Run an ingress that has no instances."""
    with running_ingress(domain) as running:
        yield running


def test_label_without_a_suffix_reaches_the_port_as_plain_bytes(ingress: RunningIngress) -> None:
    with app_server(echo) as endpoint:
        ingress.table.add("vm1", 8080, endpoint)
        with ingress.connect_tls("vm1-8080") as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            assert client.version() == "TLSv1.2"
            assert client.selected_alpn_protocol() is None
            client.unwrap()
    record = ingress.ended()
    assert replace(record, client="", seconds=0) == replace(
        record,
        client="",
        server_name=f"vm1-8080.{DOMAIN}",
        id="vm1",
        port=8080,
        treatment="terminated",
        app_id=APP,
        instance_id="vm1",
        is_forwarded=True,
        received=5,
        sent=5,
        seconds=0,
        ended="complete",
    )


def test_app_id_reaches_an_instance_of_the_app(ingress: RunningIngress) -> None:
    with app_server(echo) as endpoint:
        ingress.table.add("vm1", 80, endpoint)
        with ingress.connect_tls(APP) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            client.unwrap()
    assert ingress.ended().instance_id == "vm1"


def test_passthrough_reaches_the_app_with_every_byte_from_the_first_one(ingress: RunningIngress) -> None:
    received = []

    def app(sock: socket.socket) -> None:
        received.append(read_all(sock))
        sock.sendall(b"not TLS")

    hello = client_hello(f"vm1-8443s.{DOMAIN}")
    with app_server(app) as endpoint:
        ingress.table.add("vm1", 8443, endpoint)
        with ingress.connect() as client:
            for part in (hello[:100], hello[100:], b"and more"):
                client.sendall(part)
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"not TLS"
    assert received == [hello + b"and more"]
    record = ingress.ended()
    assert (record.treatment, record.ended) == ("passthrough", "complete")
    assert (record.received, record.sent) == (len(hello) + 8, 7)


def test_passthrough_shows_the_certificate_of_the_app(
    ingress: RunningIngress, identity: Identity, tmp_path: Path
) -> None:
    own = self_signed(tmp_path, "own")

    def app(sock: socket.socket) -> None:
        with server_tls(own).wrap_socket(sock, server_side=True) as secured:
            echo(secured)

    with app_server(app) as endpoint, app_server(echo) as plain:
        ingress.table.add("vm1", 443, endpoint)
        with ingress.connect_tls("vm1-s") as client:
            assert client.getpeercert(binary_form=True) == own.der
        ingress.table.add("vm2", 443, plain)
        with ingress.connect_tls("vm2-443") as client:
            assert client.getpeercert(binary_form=True) == identity.der


def test_g_agrees_to_http2_alone(ingress: RunningIngress) -> None:
    both = tls.client()
    both.set_alpn_protocols(["http/1.1", "h2"])
    with app_server(echo) as endpoint:
        ingress.table.add("vm1", 50051, endpoint)
        with ingress.connect_tls("vm1-50051g", both) as client:
            assert client.selected_alpn_protocol() == "h2"
            client.sendall(b"PRI * HTTP/2.0")
            assert client.recv(100) == b"PRI * HTTP/2.0"
        with ingress.connect_tls("vm1-50051", both) as client:
            assert client.selected_alpn_protocol() is None
    assert {ingress.ended().treatment for _ in range(2)} == {"h2", "terminated"}


# ---- both directions


def test_client_that_has_sent_everything_gets_the_answer(ingress: RunningIngress) -> None:
    def app(sock: socket.socket) -> None:
        sock.sendall(read_all(sock)[::-1] * 100_000)

    with app_server(app) as endpoint:
        ingress.table.add("vm1", 80, endpoint)
        with ingress.connect() as sock:
            client = HalfClosingClient(sock, f"vm1.{DOMAIN}", tls.client())
            client.send(b"0123456789")
            client.end()
            assert client.read_all() == b"9876543210" * 100_000
    assert ingress.ended().ended == "complete"


def test_app_that_has_sent_everything_gets_what_the_client_sends(ingress: RunningIngress) -> None:
    received: queue.Queue[bytes] = queue.Queue()

    def app(sock: socket.socket) -> None:
        sock.sendall(b"0123456789")
        sock.shutdown(socket.SHUT_WR)
        received.put(read_all(sock))

    with app_server(app) as endpoint:
        ingress.table.add("vm1", 80, endpoint)
        with ingress.connect() as sock:
            client = HalfClosingClient(sock, f"vm1.{DOMAIN}", tls.client())
            assert client.read_all() == b"0123456789"
            for _ in range(100):
                client.send(b"x" * 10_000)
            client.end()
            assert received.get(timeout=TIMEOUT) == b"x" * 1_000_000
    assert ingress.ended().ended == "complete"


def test_passed_through_app_that_has_sent_everything_gets_what_the_client_sends(ingress: RunningIngress) -> None:
    received: queue.Queue[bytes] = queue.Queue()
    hello = client_hello(f"vm1-s.{DOMAIN}")

    def app(sock: socket.socket) -> None:
        sock.sendall(b"0123456789")
        sock.shutdown(socket.SHUT_WR)
        received.put(read_all(sock))

    with app_server(app) as endpoint:
        ingress.table.add("vm1", 443, endpoint)
        with ingress.connect() as client:
            client.sendall(hello)
            assert read_all(client) == b"0123456789"
            client.sendall(b"x" * 1_000_000)
            client.shutdown(socket.SHUT_WR)
            assert received.get(timeout=TIMEOUT) == hello + b"x" * 1_000_000
    assert ingress.ended().ended == "complete"


def test_app_that_closes_is_an_orderly_end_for_the_client(ingress: RunningIngress) -> None:
    def app(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(bytes(MUCH))

    with app_server(app) as endpoint:
        ingress.table.add("vm1", 80, endpoint)
        with ingress.connect_tls("vm1") as client:
            client.sendall(b"go")
            assert len(read_all(client)) == MUCH  # an end without a close_notify is an error of this client


def test_client_that_ends_without_a_close_notify_has_sent_everything(ingress: RunningIngress) -> None:
    received: queue.Queue[bytes] = queue.Queue()
    with app_server(lambda sock: received.put(read_all(sock))) as endpoint:
        ingress.table.add("vm1", 80, endpoint)
        with ingress.connect_tls("vm1") as client:
            client.sendall(b"all")
            client.shutdown(socket.SHUT_WR)
            assert received.get(timeout=TIMEOUT) == b"all"


@pytest.mark.parametrize("label", ["vm1", "vm1-80s"])
def test_much_data_arrives_whole_both_ways_at_once(ingress: RunningIngress, label: str) -> None:
    with app_server(echo) as endpoint:
        ingress.table.add("vm1", 80, endpoint)
        with _client(ingress, label) as client:
            begin = read_exactly(client, len(_hello(label))) if label.endswith("s") else b""
            assert begin == (_hello(label) if label.endswith("s") else b"")
            data = random.Random(1).randbytes(MUCH)
            assert exchanged(client, data) == data


# ---- limits of time


@pytest.mark.parametrize("label", ["vm1", "vm1-80s"])
@limited(write=0.5)
def test_app_that_does_not_read_stops_the_client_and_ends_the_connection(hasty: RunningIngress, label: str) -> None:
    done = threading.Event()
    with app_server(lambda _: _wait(done)) as endpoint:
        hasty.table.add("vm1", 80, endpoint)
        with _client(hasty, label) as client, pytest.raises(OSError, match="(?i)reset|pipe|eof|closed|timed out"):
            client.sendall(bytes(32 * MUCH))
        record = hasty.ended()
        done.set()
    assert record.ended == "write timeout"
    assert record.received < 8 * MUCH


@pytest.mark.parametrize("label", ["vm1", "vm1-80s"])
@limited(idle=0.5)
def test_client_that_does_not_read_stops_the_app_and_ends_the_connection(hasty: RunningIngress, label: str) -> None:
    failed = threading.Event()

    def app(sock: socket.socket) -> None:
        with pytest.raises(OSError, match="reset|pipe"):
            sock.sendall(bytes(32 * MUCH))
        failed.set()

    with app_server(app) as endpoint:
        hasty.table.add("vm1", 80, endpoint)
        with _client(hasty, label):
            record = hasty.ended()
            assert failed.wait(TIMEOUT)
    assert record.ended == "idle timeout"
    assert record.sent < 8 * MUCH


@limited(idle=0.5)
@pytest.mark.parametrize("label", ["vm1", "vm1-80s"])
def test_connection_that_stands_still_is_closed(hasty: RunningIngress, label: str) -> None:
    with app_server(echo) as endpoint:
        hasty.table.add("vm1", 80, endpoint)
        with _client(hasty, label) as client:
            client.sendall(b"hello")
            size = len(_hello(label)) + 5 if label.endswith("s") else 5
            assert len(read_exactly(client, size)) == size
            assert _ends(client)
    assert hasty.ended().ended == "idle timeout"
    assert hasty.counted() == hasty.counted("vm1") == 0


@limited(total=0.8)
def test_connection_is_closed_after_the_total_time_although_bytes_flow(hasty: RunningIngress) -> None:
    with app_server(echo) as endpoint:
        hasty.table.add("vm1", 80, endpoint)
        with hasty.connect_tls("vm1") as client, contextlib.suppress(OSError):  # ssl.SSLError is one
            while True:
                client.sendall(b"hello")
                client.recv(100)
        assert hasty.ended().ended == "the connection was kept too long"


@limited(handshake=0.5)
def test_client_that_sends_no_hello_is_closed(hasty: RunningIngress) -> None:
    for sent in (b"", client_hello(f"vm1.{DOMAIN}")[:50]):
        with hasty.connect() as client:
            client.sendall(sent)
            assert is_closed(client)
        assert hasty.ended().ended == "take sni timeout"


@limited(handshake=0.5)
def test_client_that_does_not_finish_the_handshake_is_closed(hasty: RunningIngress) -> None:
    hasty.table.add("vm1", 80, ("127.0.0.1", 1))
    with hasty.connect() as client:
        client.sendall(client_hello(f"vm1.{DOMAIN}"))
        assert read_all(client)[:1] == b"\x16"
    assert hasty.ended().ended == "handshake timeout"


@limited(connect=0.5)
def test_app_that_does_not_accept_in_time_is_given_up(hasty: RunningIngress) -> None:
    with _full_listener() as endpoint:
        hasty.table.add("vm1", 443, endpoint)
        assert _refusal(hasty, "vm1-s") == "connecting timeout to app vm1"


# ---- refusals


def test_name_that_nobody_has_is_refused(ingress: RunningIngress) -> None:
    assert _refusal(ingress, "vm1") == "app <vm1> not found"
    assert _refusal(ingress, "vm1-s") == "app <vm1> not found"
    assert ingress.counted() == 0


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("vm1-80-80", "invalid sni format"),
        ("vm1-80sg", "invalid sni format: `gs` is not allowed"),
        ("vm1-65536", "invalid port: '65536'"),
        ("-80", "app id is empty"),
        ("localhost-80", "app <localhost> not found"),
        ("gateway-81", "Only port 80 is supported for the id gateway"),
        ("health-81", "Only port 80 is supported for the id health"),
        ("gateway-s", "app <gateway> not found"),
    ],
)
def test_label_that_means_nothing_is_refused(shared: RunningIngress, label: str, why: str) -> None:
    assert _refusal(shared, label) == why


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no sni found"),
        (b"\x16\x03\x01\x02\x00\x01", "no sni found"),
        (b"", "no sni found"),
    ],
)
def test_bytes_without_a_server_name_are_refused(shared: RunningIngress, data: bytes, why: str) -> None:
    with shared.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert is_closed(client)
    assert shared.ended().ended == why


def test_server_names_of_no_domain_are_refused(shared: RunningIngress) -> None:
    for name, why in {
        "vm1": "invalid sni",
        f"vm1.vm1.{DOMAIN}": f"failed to resolve app address for vm1.vm1.{DOMAIN}: "
        f"no txt record found via _dstack-app-address-wildcard.vm1.{DOMAIN}",
        DOMAIN: f"failed to resolve app address for {DOMAIN}: "
        "no txt record found via _dstack-app-address-wildcard.localhost",
    }.items():
        assert _refusal_of(shared, name) == why


def test_app_that_refuses_connections_ends_them_after_the_handshake(ingress: RunningIngress) -> None:
    with refusing_port() as port:
        ingress.table.add("vm1", 80, ("127.0.0.1", port))
        with ingress.connect_tls("vm1") as client:
            assert _ends(client)
        assert ingress.ended().ended == f"failed to connect to app vm1: 127.0.0.1:{port}: Connection refused"
        with ingress.connect_tls("vm1-81") as client:
            assert _ends(client)
        assert ingress.ended().ended == "failed to connect to app vm1: nobody listens"
        ingress.table.add("vm1", 82, ("no name", 82))
        with ingress.connect_tls("vm1-82") as client:
            assert _ends(client)
        reason = ingress.ended().ended
        assert reason.startswith("failed to connect to app vm1: no name:82: ")
        assert "nknown error" not in reason
    assert ingress.counted("vm1") == 0


def test_client_without_a_common_version_gets_an_alert(ingress: RunningIngress) -> None:
    newest = tls.client()
    newest.minimum_version = ssl.TLSVersion.TLSv1_3
    ingress.table.add("vm1", 80, ("127.0.0.1", 1))
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        ingress.connect_tls("vm1", newest)
    assert ingress.ended().ended == "failed to accept tls connection: UNSUPPORTED_PROTOCOL"


def test_bytes_that_are_no_tls_end_the_connection(ingress: RunningIngress) -> None:
    with app_server(echo) as endpoint:
        ingress.table.add("vm1", 80, endpoint)
        with ingress.connect_tls("vm1") as secured, socket.socket(fileno=secured.detach()) as client:
            client.settimeout(TIMEOUT)
            client.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            read_all(client)
    assert ingress.ended().ended == "client: DECRYPTION_FAILED_OR_BAD_RECORD_MAC"


def test_any_first_bytes_end_the_connection_once_the_client_has_ended(shared: RunningIngress) -> None:
    hello, chance = client_hello(f"vm1.{DOMAIN}"), random.Random(2)
    for _ in range(200):
        start = chance.randrange(len(hello))
        data = hello[:start] + chance.randbytes(chance.randrange(1, 8)) + hello[start + chance.randrange(8) :]
        with shared.connect() as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                read_all(client)
        assert not shared.ended().is_forwarded
    assert shared.counted() == 0


# ---- which instance, and which of its ports


def test_first_instance_that_answers_is_taken(ingress: RunningIngress) -> None:
    with app_server(echo) as endpoint, refusing_port() as port, _full_listener() as silent:
        ingress.table.add("silent", 80, silent)
        ingress.table.add("refusing", 80, ("127.0.0.1", port))
        ingress.table.add("answering", 80, endpoint)
        with ingress.connect_tls(APP) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            assert [ingress.counted(name) for name in ("silent", "refusing", "answering")] == [0, 0, 1]
    assert ingress.ended().instance_id == "answering"


def test_port_that_the_policy_does_not_list_is_refused(ingress: RunningIngress) -> None:
    with app_server(echo) as endpoint:
        for port in (8080, 8081):
            ingress.table.add("vm1", port, endpoint)
        ingress.table.policies["vm1"] = PolicyEntry(ports={8080: False}, restrict_mode=True)
        with ingress.connect_tls("vm1-8080") as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        assert ingress.ended().is_forwarded
        denied = "denied by app port policy for vm1 (1 candidate(s))"
        assert _refusal(ingress, "vm1-8081") == f"port 8081 {denied}"
        ingress.table.policies["vm1"] = None
        assert _refusal(ingress, "vm1-8080") == f"port 8080 {denied}"


def test_instance_whose_policy_denies_the_port_is_no_candidate(ingress: RunningIngress) -> None:
    with app_server(echo) as endpoint:
        ingress.table.add("closed", 80, endpoint)
        ingress.table.add("open", 80, endpoint)
        ingress.table.policies["closed"] = PolicyEntry(restrict_mode=True)
        with ingress.connect_tls(APP) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        assert ingress.ended().instance_id == "open"
        ingress.table.policies["open"] = None
        assert _refusal(ingress, APP) == f"port 80 denied by app port policy for {APP} (2 candidate(s))"


@pytest.mark.parametrize("label", ["vm1", "vm1-80s"])
def test_app_is_told_the_client_where_the_policy_says_so(ingress: RunningIngress, label: str) -> None:
    received: queue.Queue[bytes] = queue.Queue()
    with app_server(lambda sock: received.put(read_all(sock))) as endpoint:
        ingress.table.add("vm1", 80, endpoint)
        ingress.table.policies["vm1"] = PolicyEntry(ports={80: True})
        with _client(ingress, label) as client:
            client.sendall(b"hello")
            peer = client.getsockname()[1].to_bytes(2, "big") + ingress.port.to_bytes(2, "big")
            client.shutdown(socket.SHUT_WR)
            header = bytes.fromhex("0d0a0d0a000d0a515549540a2111000c7f0000017f000001") + peer
            expected = header + (_hello(label) if label.endswith("s") else b"") + b"hello"
            assert received.get(timeout=TIMEOUT) == expected


def test_client_is_the_one_that_an_inbound_header_names(domain: DomainTls) -> None:
    received: queue.Queue[bytes] = queue.Queue()
    header = b"PROXY TCP4 1.2.3.4 5.6.7.8 11111 22222\r\n"
    with (
        running_ingress(
            domain, settings=IngressSettings(timeouts=Timeouts(proxy_header=0.5), reads_proxy_header=True)
        ) as ingress,
        app_server(lambda sock: received.put(read_all(sock))) as endpoint,
    ):
        ingress.table.add("vm1", 443, endpoint)
        ingress.table.policies["vm1"] = PolicyEntry(ports={443: True})
        hello = _hello("vm1-s")
        for data in (header + hello, header[:20], hello):
            with ingress.connect() as client:
                client.sendall(data)
                if data.startswith(header):
                    client.shutdown(socket.SHUT_WR)
                assert is_closed(client)
        assert received.get(timeout=TIMEOUT) == header + hello
        records = [ingress.ended() for _ in range(3)]
    assert records[0].client == "1.2.3.4:11111"
    assert [record.ended for record in records] == [
        "complete",
        "proxy protocol header timeout",
        "no valid proxy protocol header detected",
    ]


@pytest.mark.parametrize("loop", LOOPS)
def test_app_has_no_more_connections_than_it_may_have(domain: DomainTls, loop: str) -> None:
    with (
        running_ingress(domain, loop=loop, settings=IngressSettings(max_connections_per_app=2)) as ingress,
        app_server(echo) as endpoint,
    ):
        for name in ("vm1", "vm2"):
            ingress.table.add(name, 80, endpoint)
        first, second = (_echoing(ingress, name) for name in ("vm1", "vm2"))
        with ingress.connect_tls(APP) as third:
            assert _ends(third)
        assert ingress.ended().ended == "app connection limit exceeded: 2/2"
        assert ingress.counted() == 2
        first.close()
        ingress.ended()
        for client in (_echoing(ingress, APP), second):
            client.close()


def test_custom_domain_is_passed_through_to_what_its_record_says(ingress: RunningIngress) -> None:
    received: queue.Queue[bytes] = queue.Queue()
    table = ingress.table
    with app_server(lambda sock: received.put(read_all(sock))) as endpoint:
        table.add("vm1", 8443, endpoint)
        table.txt |= {
            "_dstack-app-address.shop.example": f"{APP}:8443",
            "_tapp-address.shop.example": "nobody:1",
            "_tapp-address.old.example": "vm1:8443",
            "_dstack-app-address-wildcard.many.example": "vm1:8443",
            "_dstack-app-address.broken.many.example": "vm1",
            "_dstack-app-address.gone.example": "nobody:8443",
        }
        for name in ("shop.example", "old.example", "any.many.example"):
            hello = client_hello(name)
            with ingress.connect() as client:
                client.sendall(hello)
                client.shutdown(socket.SHUT_WR)
                assert is_closed(client)
            assert received.get(timeout=TIMEOUT) == hello
            assert (ingress.ended().treatment) == "passthrough"
        assert _refusal_of(ingress, "gone.example") == "app <nobody> not found"
        assert _refusal_of(ingress, "broken.many.example") == (
            "failed to parse app address for broken.many.example via _dstack-app-address.broken.many.example: "
            "expected `<id>:<port>`, got b'vm1'"
        )


def test_localhost_is_this_machine_where_the_settings_open_it(domain: DomainTls) -> None:
    settings = IngressSettings(insecure_localhost_backend=True)
    with running_ingress(domain, settings=settings) as ingress, app_server(echo) as endpoint:
        with ingress.connect_tls(f"localhost-{endpoint[1]}") as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        assert ingress.ended().instance_id == "localhost"


# ---- what the surroundings make of a connection


@limited(connect=0.5, handshake=0.5, dns=0.5)
@pytest.mark.parametrize("label", ["vm1", "gateway"])
def test_interrupted_connection_goes_on_whatever_the_other_limits_are(hasty: RunningIngress, label: str) -> None:
    hasty.table.interrupt = lambda: asyncio.sleep(0.8)
    with app_server(echo) as endpoint:
        hasty.table.add("vm1", 80, endpoint)
        with hasty.connect_tls(label) as client:
            client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert client.recv(4) in (b"GET ", b"HTTP")
        assert hasty.ended().is_forwarded


async def _never() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("label", ["vm1", "vm1-s"])
def test_client_that_ends_while_it_is_interrupted_ends_the_connection(ingress: RunningIngress, label: str) -> None:
    ingress.table.add("vm1", 443, ("127.0.0.1", 1))
    ingress.table.interrupt = _never
    with ingress.connect() as client:
        client.sendall(client_hello(f"{label}.{DOMAIN}"))
    assert ingress.ended().ended == "the client ended"
    assert ingress.counted() == 0


# ---- the gateway itself


def test_gateway_itself_speaks_http_1_1_where_the_name_wants_http2(shared: RunningIngress) -> None:
    context = tls.client()
    context.set_alpn_protocols(["h2"])
    with shared.connect_tls("gateway-g", context) as client:
        assert client.selected_alpn_protocol() == "h2"
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert shared.ended().treatment == "h2"


def test_page_that_cannot_be_had_is_an_error_with_its_reason(shared: RunningIngress) -> None:
    address = f"gateway.{DOMAIN}:{shared.port}:127.0.0.1"
    url = f"https://gateway.{DOMAIN}:{shared.port}/app-info"
    command = ["curl", "-sk", "-w", "%{http_code}", "--resolve", address, url]
    shared.this_node.failure = "guest agent, Info: no answer"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    finally:
        shared.this_node.failure = ""
    assert done.stdout == "guest agent, Info: no answer\n503"
    shared.ended()


@pytest.mark.parametrize(
    ("label", "request_line", "status", "body"),
    [
        ("gateway", "GET /health", 200, ""),
        (
            "gateway",
            "GET /.dstack/index",
            200,
            '{"type":"dstack gateway","paths":["/index","/app-info","/acme-info"]}',
        ),
        ("gateway", "GET /index", 200, '{"type":"dstack gateway","paths":["/index","/app-info","/acme-info"]}'),
        ("gateway", "GET /.dstack/app-info", 200, '{"app_name":"dstack-gateway"}'),
        ("gateway", "GET /.dstack/acme-info", 200, '{"account_uri":"acme://account"}'),
        ("gateway", "GET /", 404, ""),
        ("gateway", "GET /.dstack/health", 404, ""),
        ("gateway", "POST /health", 405, ""),
        ("gateway", "HEAD /health", 405, ""),
        ("gateway-80", "GET /health", 200, ""),
        ("health", "GET /", 200, ""),
        ("health", "GET /health", 404, ""),
        ("health", "POST /", 404, ""),
    ],
)
def test_special_id_answers(shared: RunningIngress, label: str, request_line: str, status: int, body: str) -> None:
    method, path = request_line.split()
    address = f"{label}.{DOMAIN}:{shared.port}:127.0.0.1"
    command = ["curl", "-ski", "--resolve", address, "-X", method, f"https://{label}.{DOMAIN}:{shared.port}{path}"]
    if method == "HEAD":
        command[4:6] = ["--head"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True).stdout
    head, _, content = answer.partition("\r\n\r\n" if "\r\n\r\n" in answer else "\n\n")
    assert head.split()[1] == str(status)
    assert content == body
    assert shared.ended().is_forwarded


def test_wildcard_name_is_trusted_by_curl_without_a_resolver(tmp_path: Path) -> None:
    own = self_signed(tmp_path, "own", f"*.{DOMAIN}")
    settings = domain_tls(Path(own.cert_file).read_text(), Path(own.key_file).read_text(), ("1.2", "1.3"))
    with running_ingress(settings) as ingress:
        url = f"https://health.{DOMAIN}:{ingress.port}/"
        command = ["curl", "-s", "-w", "%{http_code}", "--cacert", own.cert_file, "--tlsv1.3", url]
        assert subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True).stdout == "200"


def test_ingress_that_closes_ends_every_connection(domain: DomainTls) -> None:
    with app_server(echo) as endpoint:
        with running_ingress(domain) as ingress:
            ingress.table.add("vm1", 80, endpoint)
            forwarded, silent = _echoing(ingress, "vm1"), ingress.connect()
            assert ingress.counted("vm1") == 1
        assert {ingress.ended().ended for _ in range(2)} == {"the ingress is closed"}
        for client in (forwarded, silent):
            assert _ends(client)
            client.close()


# ---- clients and apps


def _wait(event: threading.Event) -> None:
    event.wait(TIMEOUT)


@functools.cache  # each one has other random bytes
def _hello(label: str) -> bytes:
    return client_hello(f"{label}.{DOMAIN}")


def _client(ingress: RunningIngress, label: str) -> socket.socket:
    """Connect under a label: with TLS, or with a ClientHello alone that is passed through."""
    if not label.endswith("s"):
        return ingress.connect_tls(label)
    client = ingress.connect()
    client.sendall(_hello(label))
    return client


def _echoing(ingress: RunningIngress, label: str) -> socket.socket:
    """Connect to an app that echoes, and wait until it does."""
    client = ingress.connect_tls(label)
    client.sendall(b"hello")
    assert client.recv(100) == b"hello"
    return client


def _ends(client: socket.socket) -> bool:
    """Return whether the connection ends, over TLS without a close_notify."""
    try:
        return client.recv(1) == b"" and not isinstance(client, ssl.SSLSocket)
    except (ConnectionResetError, ssl.SSLEOFError):
        return True


def _refusal(ingress: RunningIngress, label: str) -> str:
    return _refusal_of(ingress, f"{label}.{DOMAIN}")


def _refusal_of(ingress: RunningIngress, name: str) -> str:
    """Send a hello, expect the end of the connection without a byte, and return why."""
    with ingress.connect() as client:
        client.sendall(client_hello(name))
        assert is_closed(client)
    record = ingress.ended()
    assert not record.is_forwarded
    assert record.server_name == name
    return record.ended


@contextmanager
def _full_listener() -> Iterator[tuple[str, int]]:
    """Listen with a full backlog: a further connection is neither accepted nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield listener.getsockname()
