"""The RA-TLS server's handshake, asked by clients that share none of its code: openssl, curl and the standard library.

Each test runs under asyncio and under uvloop, which drive TLS in their own ways.
"""

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from dstack_emu.attest import der
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import OID_ATTESTATION, OID_TDX_QUOTE
from dstack_emu.attest.errors import VerificationError
from dstack_emu.transport.listen import bind_tcp, bind_unix
from dstack_emu.transport.ratls_server import attested_clients_context, verify_client_certificate
from dstack_emu.transport.relay import start_relay
from dstack_emu.transport.tls_alert import ALERT, plain_record, protected_record
from tests.ratls import (
    DAY,
    EVIDENCE,
    LARGE,
    NOW,
    REQUEST,
    Identities,
    Pair,
    Served,
    SlowClient,
    client_context,
    curl,
    fingerprint,
    run_server,
    s_client,
)

LOOPS = pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
VERSIONS = ["-tls1_2", "-tls1_3"]

HANDSHAKE_FAILURE = "SSL alert number 40"
DECRYPT_ERROR = "SSL alert number 51"
CERTIFICATE_REQUIRED = "SSL alert number 116"


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return Identities(tmp_path_factory.mktemp("identities"))


@pytest.fixture(scope="module")
def server_pair(identities: Identities) -> Pair:
    return identities.self_signed(None, alt_names=("127.0.0.1", "localhost"))


@pytest.fixture(scope="module")
def good(identities: Identities) -> Pair:
    return identities.self_signed()


@pytest.fixture(scope="module", params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def _server(request: pytest.FixtureRequest, server_pair: Pair) -> Iterator[Served]:
    with run_server(server_pair, request.param) as served:
        yield served


@pytest.fixture
def server(_server: Served) -> Served:
    """The running server, its records empty and its clock right."""
    _server.refused.clear()
    _server.clock[0] = NOW
    return _server


# ---- Who is served ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_without_a_certificate_is_served(server: Served, version: str) -> None:
    done = s_client(server.port, version)
    assert '"shown": "nobody"' in done.stdout
    assert server.refused == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_self_signed_certificate_with_evidence_is_served_and_known(server: Served, version: str, good: Pair) -> None:
    done = s_client(server.port, version, *good.options)
    assert f'"shown": "{fingerprint(good)}"' in done.stdout
    assert f'"version": "TLSv1.{version[-1]}"' in done.stdout
    assert server.refused == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_chain_of_two_under_an_unknown_ca_is_served_by_its_leaf(
    server: Served, version: str, identities: Identities
) -> None:
    chain = identities.chain()
    assert f'"shown": "{fingerprint(chain)}"' in s_client(server.port, version, *chain.options).stdout


def test_a_chain_is_refused_if_only_its_ca_carries_evidence(server: Served, identities: Identities) -> None:
    with_evidence = identities.self_signed(ca_path_length=0)
    chain = identities.chain(None)
    leaf = chain.certificate.read_text().partition("-----END CERTIFICATE-----\n")
    pair = identities.write(chain.key.read_text(), leaf[0] + leaf[1] + with_evidence.certificate.read_text())
    assert HANDSHAKE_FAILURE in s_client(server.port, *pair.options).stderr


@pytest.mark.parametrize(
    "evidence",
    [EVIDENCE.as_v1(), Attestation(bytes([1, 2, 3]), (), (), bytes(64), "")],
    ids=["msgpack", "a quote that is none, as in upstream's own test"],
)
def test_whatever_decodes_as_evidence_is_served(server: Served, identities: Identities, evidence: Attestation) -> None:
    pair = identities.self_signed(evidence)
    assert fingerprint(pair) in s_client(server.port, *pair.options).stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_no_ca_names_are_sent(server: Served, version: str) -> None:
    said = s_client(server.port, version).stdout
    assert "No client certificate CA names sent" in said
    assert "Requested Signature Algorithms" in said  # a certificate is asked for all the same


def test_curl_agrees_on_http_1_1_and_is_served(server: Served, good: Pair) -> None:
    done = curl(server.port, "/who", "--cert", str(good.certificate), "--key", str(good.key))
    assert done.returncode == 0, done.stderr
    assert f'"shown": "{fingerprint(good)}", "alpn": "http/1.1", "version": "TLSv1.3"'.encode() in done.stdout


def test_a_client_that_knows_no_protocol_of_the_servers_is_served_without(server: Served) -> None:
    done = s_client(server.port, "-alpn", "h2")
    assert '"alpn": null' in done.stdout


def test_the_transport_tells_the_cipher(server: Served) -> None:
    done = s_client(server.port, "-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256")
    assert '"cipher": ["TLS_AES_128_GCM_SHA256", "TLSv1.3", 128]' in done.stdout


# ---- Who is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["-tls1_2"],
        ["-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"],
        ["-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384"],
        ["-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"],
    ],
    ids=lambda options: options[-1],
)
def test_a_certificate_without_evidence_gets_handshake_failure_in_every_suite(
    server: Served, options: list[str], identities: Identities
) -> None:
    done = s_client(server.port, *options, *identities.self_signed(None).options)
    assert HANDSHAKE_FAILURE in done.stderr
    assert "HTTP/1.1" not in done.stdout
    assert server.refused == ["client certificate carries no attestation"]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_expired_certificate_gets_handshake_failure(server: Served, version: str, identities: Identities) -> None:
    done = s_client(server.port, version, *identities.self_signed(not_after=NOW - 1).options)
    assert HANDSHAKE_FAILURE in done.stderr
    assert server.refused == ["client certificate has expired"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_certificate_of_the_future_gets_handshake_failure(
    server: Served, version: str, identities: Identities
) -> None:
    done = s_client(server.port, version, *identities.self_signed(not_before=NOW + DAY).options)
    assert HANDSHAKE_FAILURE in done.stderr
    assert server.refused == ["client certificate is not yet valid"]


def test_validity_is_that_of_the_clock_that_was_given(server: Served, identities: Identities) -> None:
    pair = identities.self_signed(not_before=NOW + DAY, not_after=NOW + 2 * DAY)
    for moment, served in (
        (NOW + DAY - 1, False),
        (NOW + DAY, True),
        (NOW + 2 * DAY, True),
        (NOW + 2 * DAY + 1, False),
    ):
        server.clock[0] = moment
        assert (fingerprint(pair) in s_client(server.port, *pair.options).stdout) is served
    assert server.refused == ["client certificate is not yet valid", "client certificate has expired"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("oid", "value", "reason"),
    [
        (OID_ATTESTATION, der.octet_string(b"\x7fgarbage"), "Unknown attestation wire format"),
        (OID_ATTESTATION, der.octet_string(EVIDENCE.encode()[:-1]), "Failed to decode legacy VersionedAttestation"),
        (OID_ATTESTATION, b"no octet string", "failed to decode client attestation"),
        (OID_TDX_QUOTE, der.octet_string(b"quote"), "TDX event log missing"),
    ],
    ids=["garbage", "cut short", "no octet string", "quote alone"],
)
def test_evidence_that_does_not_decode_gets_handshake_failure(
    server: Served, version: str, identities: Identities, oid: x509.ObjectIdentifier, value: bytes, reason: str
) -> None:
    done = s_client(server.port, version, *identities.with_extension(oid, value).options)
    assert HANDSHAKE_FAILURE in done.stderr
    (said,) = server.refused
    assert said.startswith("failed to decode client attestation: ")
    assert reason in said


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_without_the_certificates_key_does_not_complete(
    server: Served, version: str, identities: Identities
) -> None:
    done = s_client(server.port, version, *identities.stolen().options)
    assert DECRYPT_ERROR in done.stderr
    assert "HTTP/1.1" not in done.stdout


def test_a_certificate_that_is_no_der_gets_handshake_failure(server: Served, good: Pair) -> None:
    with tampering(server.port, good.der[:16], b"\x31" + good.der[1:16]) as port:
        done = s_client(port, "-tls1_2", *good.options)
    assert HANDSHAKE_FAILURE in done.stderr
    (said,) = server.refused
    assert said.startswith("failed to parse client certificate: ")


def test_a_certificate_that_openssl_reads_and_a_stricter_parser_does_not_gets_handshake_failure(
    server: Served, good: Pair, identities: Identities
) -> None:
    version_3, version_9 = bytes.fromhex("a003020102"), bytes.fromhex("a003020108")
    certificate = ssl.DER_cert_to_PEM_cert(good.der.replace(version_3, version_9, 1))
    done = s_client(server.port, *identities.write(good.key.read_text(), certificate).options)
    assert HANDSHAKE_FAILURE in done.stderr
    (said,) = server.refused
    assert said.startswith("failed to parse client certificate: ")


def test_a_certificate_that_is_exchanged_on_the_way_does_not_complete(
    server: Served, good: Pair, identities: Identities
) -> None:
    other = identities.self_signed()
    at = len(good.der) // 2
    with tampering(server.port, good.der[at : at + 16], other.der[:16]) as port:
        done = s_client(port, "-tls1_2", *good.options)
    assert "SSL alert number" in done.stderr
    assert "HTTP/1.1" not in done.stdout


def test_curl_is_told_of_the_refusal(server: Served, identities: Identities) -> None:
    bad = identities.self_signed(None)
    done = curl(server.port, "/who", "--cert", str(bad.certificate), "--key", str(bad.key))
    assert done.returncode != 0
    assert b"alert handshake failure" in done.stderr
    assert done.stdout == b""


@LOOPS
@pytest.mark.parametrize(("version", "alert"), [("-tls1_2", HANDSHAKE_FAILURE), ("-tls1_3", CERTIFICATE_REQUIRED)])
def test_a_server_that_requires_a_certificate_refuses_clients_without(
    server_pair: Pair, good: Pair, factory: Any, version: str, alert: str
) -> None:
    with run_server(server_pair, factory, required=True) as served:
        assert alert in s_client(served.port, version).stderr
        assert fingerprint(good) in s_client(served.port, version, *good.options).stdout


def test_no_session_is_resumed_so_that_each_connection_shows_its_certificate(
    server: Served, good: Pair, tmp_path: Path
) -> None:
    reconnecting = s_client(server.port, "-tls1_2", *good.options, "-reconnect").stdout
    assert reconnecting.count("New, TLSv1.2") == 6
    assert "Reused" not in reconnecting
    session = str(tmp_path / "session")
    assert fingerprint(good) in s_client(server.port, "-tls1_3", *good.options, "-sess_out", session).stdout
    again = s_client(server.port, "-tls1_3", "-sess_in", session).stdout
    assert "New, TLSv1.3" in again
    assert '"shown": "nobody"' in again


@contextlib.contextmanager
def tampering(port: int, old: bytes, new: bytes) -> Iterator[int]:
    """Stand between one client and the server, and replace some bytes of what the client sends."""

    def carry(source: socket.socket, target: socket.socket, change: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data.replace(old, new) if change else data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(3) as pool:

        def accept() -> None:
            client, _ = listening.accept()
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                back = pool.submit(carry, server, client, False)
                carry(client, server, True)
                back.result(20)

        done = pool.submit(accept)
        yield listening.getsockname()[1]
        done.result(20)


# ---- Data ------------------------------------------------------------------------------------------------


def test_large_answers_and_large_requests_arrive_whole(server: Served, good: Pair, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(LARGE)
    identity = ("--cert", str(good.certificate), "--key", str(good.key))
    assert curl(server.port, "/large", *identity).stdout == LARGE
    done = curl(server.port, "/who", *identity, "-H", "Expect:", "--data-binary", f"@{upload}")
    assert hashlib.sha256(LARGE).hexdigest().encode() in done.stdout


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_request_in_one_segment_with_the_end_of_the_handshake_is_answered(
    server: Served, good: Pair, version: ssl.TLSVersion
) -> None:
    context = client_context(good)
    context.minimum_version = context.maximum_version = version
    client = SlowClient(server.port, context)
    client.sock.sendall(client.flight())
    last = client.flight()
    if version is ssl.TLSVersion.TLSv1_2:  # the client may not ask before the server has finished
        client.sock.sendall(last)
        last = client.flight()
    client.sock.sendall(last + client.encrypt(REQUEST))
    assert fingerprint(good).encode() in client.answer()
    client.end("in order")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("cut", [1, 4, 6, 1000, 16300])
def test_a_record_that_comes_in_two_pieces_hides_nothing_behind_it(
    server_pair: Pair, version: ssl.TLSVersion, cut: int
) -> None:
    """uvloop reads as long as `pending` says so: what it does not tell of waits for the client's next bytes."""
    context = client_context(None)
    context.minimum_version = context.maximum_version = version
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server)
    buffer = ssl.MemoryBIO()
    server = attested_clients_context(
        server_pair.certificate, server_pair.key, now=lambda: NOW, refused=lambda _reason: None
    ).wrap_bio(buffer, to_client, server_side=True)
    for _ in range(3):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
            if to_server.pending:
                buffer.write(to_server.read())
    client.write(bytes(16384))
    first = to_server.read()
    client.write(b"the rest")
    received = bytearray()
    for piece in (first[:cut], first[cut:] + to_server.read()):
        buffer.write(piece)
        with contextlib.suppress(ssl.SSLWantReadError):
            while buffer.pending or server.pending():
                received += server.read(65536)
    assert received == bytes(16384) + b"the rest"


def test_bytes_that_come_one_by_one_are_answered(server: Served, good: Pair) -> None:
    client = SlowClient(server.port, client_context(good))
    client.send_one_by_one(client.flight())
    client.send_one_by_one(client.flight() + client.encrypt(REQUEST))
    assert fingerprint(good).encode() in client.answer()
    client.end("in order")


def test_an_answer_is_ended_by_a_close_notify(server: Served) -> None:
    client = SlowClient(server.port, client_context(None))
    client.sock.sendall(client.flight())
    client.sock.sendall(client.flight() + client.encrypt(REQUEST))
    client.answer()
    assert client.was_told_of_the_end
    client.end("in order")


# ---- Many, and those that go away ------------------------------------------------------------------------


def test_200_connections_at_a_time_are_each_known_by_their_own_certificate(
    server: Served, identities: Identities
) -> None:
    pairs = [identities.self_signed() for _ in range(10)]

    async def ask(context: ssl.SSLContext, barrier: asyncio.Barrier) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
        await barrier.wait()  # all are connected before the first asks
        writer.write(REQUEST)
        answer = await reader.read()
        writer.close()
        return answer

    async def main() -> list[bytes]:
        barrier = asyncio.Barrier(200)
        contexts = [client_context(pair) for pair in pairs]
        return await asyncio.gather(*(ask(contexts[i % 10], barrier) for i in range(200)))

    with server.nothing_left():
        answers = asyncio.run(main())
    for i, answer in enumerate(answers):
        assert fingerprint(pairs[i % 10]).encode() in answer


STEPS: Sequence[str] = [
    "connected",
    "half a hello",
    "a hello",
    "half a certificate",
    "handshake",
    "half a request",
    "a request",
    "a request and a close_notify",
    "an answer",
]


@pytest.mark.parametrize("how", ["in order", "reset"])
@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_goes_away_leaves_nothing(server: Served, good: Pair, step: str, how: str) -> None:
    with server.nothing_left():
        client = SlowClient(server.port, client_context(good))
        go_until(client, step)
        client.end(how)


@pytest.mark.parametrize("how", ["in order", "reset"])
def test_a_client_that_is_refused_leaves_nothing(server: Served, identities: Identities, how: str) -> None:
    with server.nothing_left():
        client = SlowClient(server.port, client_context(identities.self_signed(None)))
        go_until(client, "a request")
        if how == "in order":
            with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
                client.answer()
        client.end(how)


def go_until(client: SlowClient, step: str) -> None:
    """Do what comes before a client goes away at a step."""
    at = STEPS.index(step)
    if at == 0:
        return
    hello = client.flight()
    client.sock.sendall(hello[: len(hello) // 2] if at == 1 else hello)
    if at <= 2:
        return
    certificate = client.flight()
    client.sock.sendall(certificate[: len(certificate) // 2] if at == 3 else certificate)
    if at <= 4:
        return
    request = client.encrypt(REQUEST)
    client.sock.sendall(request[: len(request) // 2] if at == 5 else request)
    if step == "a request and a close_notify":
        client.sock.sendall(client.goodbye())
    if step == "an answer":
        assert client.answer()


# ---- The relay in front of gRPC --------------------------------------------------------------------------


async def test_the_relay_knows_each_connections_certificate(server_pair: Pair, good: Pair, tmp_path: Path) -> None:
    context = attested_clients_context(server_pair.certificate, server_pair.key, now=time.time, refused=print)
    context.set_alpn_protocols(["h2"])

    certificates: dict[str, bytes | None] = {}
    seen: list[bytes | None] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(certificates.values())
        writer.write(await reader.readline())
        writer.close()

    behind = await asyncio.start_unix_server(echo, sock=bind_unix(tmp_path / "behind"))
    sock = bind_tcp("127.0.0.1", 0)
    port = sock.getsockname()[1]
    relay = await start_relay(sock, str(tmp_path / "behind"), certificates, context)
    for pair in (good, None):
        client = client_context(pair)
        client.set_alpn_protocols(["h2"])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        writer.write(b"hello\n")
        assert await reader.read() == b"hello\n"
        writer.close()
    await relay.close(10)
    behind.close()
    assert seen == [good.der, None]
    assert certificates == {}


async def test_the_relay_ends_a_client_that_has_ended_while_its_server_read_nothing(
    server_pair: Pair, tmp_path: Path
) -> None:
    context = attested_clients_context(server_pair.certificate, server_pair.key, now=time.time, refused=print)
    certificates: dict[str, bytes | None] = {}
    behind: list[asyncio.Transport] = []

    class ReadsNothing(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.pause_reading()
            behind.append(transport)

    loop = asyncio.get_running_loop()
    listening = await loop.create_unix_server(ReadsNothing, sock=bind_unix(tmp_path / "behind"))
    sock = bind_tcp("127.0.0.1", 0)
    port = sock.getsockname()[1]
    relay = await start_relay(sock, str(tmp_path / "behind"), certificates, context)

    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context(None))
    writer.write(bytes(512 * 1024))  # more than is taken without a reader, less than is read without one
    for _ in range(1000):
        await asyncio.sleep(0)
    writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
    for _ in range(100):  # the relay meets the end of file
        await asyncio.sleep(0)
    behind[0].abort()
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        while certificates:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
    writer.close()
    await relay.close(10)
    listening.close()


# ---- Without a connection --------------------------------------------------------------------------------


def test_verification_takes_whole_seconds_and_both_ends_of_the_validity(identities: Identities) -> None:
    certificate = identities.self_signed(not_before=NOW, not_after=NOW + 10).der
    verify_client_certificate(certificate, NOW)
    verify_client_certificate(certificate, NOW + 10.9)
    with pytest.raises(VerificationError, match="^client certificate is not yet valid$"):
        verify_client_certificate(certificate, NOW - 0.5)
    with pytest.raises(VerificationError, match="^client certificate has expired$"):
        verify_client_certificate(certificate, NOW + 11)


def test_verification_of_bytes_that_are_no_certificate() -> None:
    with pytest.raises(VerificationError, match="^failed to parse client certificate: "):
        verify_client_certificate(b"garbage", NOW)


def test_a_context_of_files_that_do_not_fit_together_is_refused(server_pair: Pair, good: Pair, tmp_path: Path) -> None:
    for certificate, key in ((server_pair.certificate, good.key), (tmp_path / "absent", good.key)):
        with pytest.raises(OSError, match=r"KEY_VALUES_MISMATCH|No such file"):
            attested_clients_context(certificate, key, now=time.time, refused=print)


def test_a_context_of_files_in_a_folder_whose_name_is_no_text(server_pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    certificate, key = (Path(shutil.copy(path, folder)) for path in (server_pair.certificate, server_pair.key))
    attested_clients_context(certificate, key, now=time.time, refused=print)


def test_the_alert_without_keys_is_a_plain_record() -> None:
    assert plain_record() == bytes.fromhex("15030300020228")


@pytest.mark.parametrize(
    ("suite", "algorithm", "aead", "size"),
    [
        ("TLS_AES_128_GCM_SHA256", hashes.SHA256(), AESGCM, 16),
        ("TLS_AES_256_GCM_SHA384", hashes.SHA384(), AESGCM, 32),
        ("TLS_CHACHA20_POLY1305_SHA256", hashes.SHA256(), ChaCha20Poly1305, 32),
    ],
)
def test_the_alert_under_keys_opens_with_them(
    suite: str, algorithm: hashes.HashAlgorithm, aead: type[AESGCM | ChaCha20Poly1305], size: int
) -> None:
    secret = bytes(range(algorithm.digest_size))
    record = protected_record(suite, secret)
    key = HKDFExpand(algorithm, size, size.to_bytes(2, "big") + b"\x09tls13 key\0").derive(secret)
    iv = HKDFExpand(algorithm, 12, b"\x00\x0c\x08tls13 iv\0").derive(secret)
    assert record[:5] == bytes.fromhex("1703030013")
    assert aead(key).decrypt(iv, record[5:], record[:5]) == ALERT + b"\x15"
