"""RA-TLS from both sides: identities in files, a server on an event loop of its own, and clients.

The clients share no code with the server: openssl, curl and the standard library.
"""

import asyncio
import contextlib
import datetime
import hashlib
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import load_pem, pem
from dstack_emu.attest.eventlog import TdxEvent
from dstack_emu.attest.issuing import CertificateRequest, self_signed
from dstack_emu.attest.kdf import pkcs8_pem
from dstack_emu.transport.http.application import Application
from dstack_emu.transport.http.message import Request, Response
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.transport.ratls_server import attested_clients_context

NOW = int(time.time())
DAY = 86400
LOG = tuple(TdxEvent(3, 0x08000001, bytes([i]) * 48, f"event-{i}", bytes([i]) * 32) for i in range(24))
EVIDENCE = Attestation(bytes(range(250)) * 20, LOG, (), bytes(64), "{}")
"""As long as a real one; only its form counts here."""


# ---- Identities ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A certificate (or chain) and a key, as files."""

    certificate: Path
    key: Path

    @property
    def der(self) -> bytes:
        """The leaf in DER."""
        return load_pem(self.certificate.read_text(), "leaf").public_bytes(Encoding.DER)

    @property
    def options(self) -> list[str]:
        """The pair as options of `openssl s_client`."""
        chain = ["-cert_chain", str(self.certificate)] if self.certificate.read_text().count("BEGIN") > 1 else []
        return ["-cert", str(self.certificate), "-key", str(self.key), *chain]


class Identities:
    """Makes pairs in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def self_signed(self, attestation: Attestation | None = EVIDENCE, **options: Any) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        request = CertificateRequest(
            public_key=key.public_key(), subject="client", attestation=attestation, client_auth=True, **options
        )
        return self.write(pkcs8_pem(key), self_signed(request, key, NOW).pem)

    def chain(self, attestation: Attestation | None = EVIDENCE) -> Pair:
        """A leaf under a CA that the server never saw, and that CA."""
        ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        request = CertificateRequest(public_key=ca_key.public_key(), subject="a CA", ca_path_length=0)
        ca = self_signed(request, ca_key, NOW)
        leaf = ca.issue(CertificateRequest(public_key=key.public_key(), subject="leaf", attestation=attestation), NOW)
        return self.write(pkcs8_pem(key), pem(leaf) + ca.pem)

    def with_extension(self, oid: x509.ObjectIdentifier, value: bytes) -> Pair:
        """A self-signed certificate with one extension of these bytes."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "client")])
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(datetime.datetime.fromtimestamp(NOW, datetime.UTC))
            .not_valid_after(datetime.datetime.fromtimestamp(NOW + DAY, datetime.UTC))
            .add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
            .sign(key, hashes.SHA256())
        )
        return self.write(pkcs8_pem(key), pem(certificate))

    def stolen(self) -> Pair:
        """Somebody's certificate, and a key file that says it is the certificate's and holds another secret."""
        theirs = self.self_signed()
        public = load_pem(theirs.certificate.read_text(), "theirs").public_key()
        point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        secret = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value.to_bytes(32, "big")
        curve = bytes.fromhex("06082a8648ce3d030107")  # OID prime256v1
        body = b"\x02\x01\x01\x04\x20" + secret + b"\xa0\x0a" + curve + b"\xa1\x44\x03\x42\x00" + point  # RFC 5915
        key = theirs.key.with_suffix(".stolen")
        key.write_bytes(pem_of(b"\x30" + bytes([len(body)]) + body))
        return Pair(theirs.certificate, key)

    def write(self, key: str, certificate: str) -> Pair:
        self._count += 1
        pair = Pair(self._folder / f"{self._count}.crt", self._folder / f"{self._count}.key")
        pair.certificate.write_text(certificate)
        pair.key.write_text(key)
        return pair


def pem_of(ec_key: bytes) -> bytes:
    """Wrap a key in RFC 5915's form."""
    return ssl.DER_cert_to_PEM_cert(ec_key).replace("CERTIFICATE", "EC PRIVATE KEY").encode()


# ---- The server, on an event loop of its own -------------------------------------------------------------


@dataclass
class Served:
    """A server in another thread."""

    loop: asyncio.AbstractEventLoop
    port: int
    refused: list[str] = field(default_factory=list)
    clock: list[float] = field(default_factory=lambda: [float(NOW)])

    def wait_for_tasks(self) -> None:
        """Wait until its loop has no task but the one that serves."""

        async def wait() -> None:
            while len(tasks := asyncio.all_tasks()) > 2:  # this one, and the one that serves
                await asyncio.wait(tasks - {asyncio.current_task()}, return_when=asyncio.FIRST_COMPLETED)

        asyncio.run_coroutine_threadsafe(wait(), self.loop).result()

    @contextlib.contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Check that after the block no connection and no task is left; the test's timeout bounds the wait.

        What a test before may have left counts too: the server may be ending those connections still.
        """
        yield
        self.wait_for_tasks()
        while accepted_connections(self.port):
            self.wait_for_tasks()


def accepted_connections(port: int) -> int:
    """Count the connections of a TCP port on this machine whose server has them open still."""
    count = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        inode = rest[5]  # 0 once no process has the socket any more
        count += int(local.rpartition(":")[2], 16) == port and state != TCP_LISTEN and inode != "0"
    return count


TCP_LISTEN = "0A"


async def who(request: Request) -> Response:
    """Tell which certificate the connection has, and what was sent."""
    channel, certificate = request.transport.get_extra_info("ssl_object"), request.client_certificate
    answer = {
        "shown": "nobody" if certificate is None else hashlib.sha256(certificate).hexdigest(),
        "alpn": channel.selected_alpn_protocol(),
        "version": channel.version(),
        "cipher": request.transport.get_extra_info("cipher"),
        "body": hashlib.sha256(await request.read()).hexdigest(),
    }
    return Response.of(json.dumps(answer), "application/json")


async def large(request: Request) -> Response:
    return Response.of(LARGE, "application/octet-stream")


LARGE = bytes(range(256)) * 32768
"""8 MiB."""


@contextlib.contextmanager
def run_server(pair: Pair, factory: Any, *, required: bool = False) -> Iterator[Served]:
    ready: list[Served] = []
    up, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        served = Served(asyncio.get_running_loop(), 0)
        context = attested_clients_context(
            pair.certificate, pair.key, now=lambda: served.clock[0], refused=served.refused.append, required=required
        )
        context.set_alpn_protocols(["http/1.1"])
        app = Application(max_body=len(LARGE))
        for method, path, handler in (("GET", "/who", who), ("POST", "/who", who), ("GET", "/large", large)):
            app.add(method, path, handler)
        sock = bind_tcp("127.0.0.1", 0)
        served.port = sock.getsockname()[1]
        server = await serve(app, sock, context)
        ready.append(served)
        up.set()
        await stop.wait()
        await server.close()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(main())
        finally:
            up.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert up.wait(20)
    try:
        yield ready[0]
    finally:
        ready[0].loop.call_soon_threadsafe(stop.set)
        thread.join(20)
    assert not thread.is_alive()


# ---- Clients ---------------------------------------------------------------------------------------------


def s_client(port: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Ask /who with `openssl s_client`, which stays until the server ends the connection."""
    request = "GET /who HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-ign_eof", *options]
    return subprocess.run(command, input=request, capture_output=True, text=True, timeout=20, check=False)


def curl(port: int, path: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = ["curl", "-sSk", "--max-time", "20", *options, f"https://127.0.0.1:{port}{path}"]
    return subprocess.run(command, capture_output=True, timeout=30, check=False)


def fingerprint(pair: Pair) -> str:
    return hashlib.sha256(pair.der).hexdigest()


def client_context(pair: Pair | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


class SlowClient:
    """TLS from the standard library whose bytes are sent by hand, in the pieces that a test wants."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.was_told_of_the_end = True
        """Whether the end of an answer was a close_notify, not the end of the TCP connection."""

    def flight(self) -> bytes:
        """Go on with the handshake until there is something to send; return that."""
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                return self._outgoing.read()
            if data := self._outgoing.read():
                return data
            self._incoming.write(self.sock.recv(65536))

    def encrypt(self, data: bytes) -> bytes:
        self._tls.write(data)
        return self._outgoing.read()

    def send_one_by_one(self, data: bytes) -> None:
        for at in range(len(data)):
            self.sock.sendall(data[at : at + 1])

    def goodbye(self) -> bytes:
        """A close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._outgoing.read()

    def answer(self) -> bytes:
        """All that the server sends until it ends the connection."""
        parts: list[bytes] = []
        while True:
            try:
                data = self._tls.read(65536)
            except ssl.SSLWantReadError:
                raw = self.sock.recv(65536)
                self._incoming.write(raw) if raw else self._incoming.write_eof()
                continue
            except ssl.SSLEOFError:
                self.was_told_of_the_end = False
                data = b""
            if not data:
                return b"".join(parts)
            parts.append(data)

    def end(self, how: str) -> None:
        """End the TCP connection: in order, or by a reset."""
        if how == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


REQUEST = b"GET /who HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
