"""A gateway in a thread with a clock of its own, and clients that share no code with it: certificates by cryptography,
HTTP by the standard library.
"""

import asyncio
import base64
import copy
import datetime
import hashlib
import http.client
import http.server
import ipaddress
import json
import os
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgpack
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from dstack_emu.attest.release import DEFAULT, RELEASES
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.routing import Endpoint, Instance
from dstack_emu.gateway.server import GatewayDependencies, GatewayServer

T = TypeVar("T")
TOKEN = "an operator's token"
START = 1_800_000_000
LOCAL_NAMES = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
DAY = datetime.timedelta(days=1)


def wg_key(name: str) -> str:
    """Return a WireGuard key in base64: any 32 bytes."""
    return base64.b64encode(hashlib.sha256(name.encode()).digest()).decode()


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in one PEM file."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    file: Path


class TestCa:
    """A CA in a folder, which stands for the root of a KMS."""

    __test__ = False

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self.own = self._signed(name, None, (x509.BasicConstraints(ca=True, path_length=None), True))

    def client(
        self,
        name: str,
        *extensions: tuple[x509.ExtensionType, bool],
        alt_names: x509.SubjectAlternativeName = LOCAL_NAMES,
    ) -> Pair:
        """Make a certificate with some extensions beside its names and the usages of client and server."""
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        return self._signed(name, self.own, (usages, False), (alt_names, False), *extensions)

    def instance(
        self,
        instance: bytes,
        app: bytes = b"a" * 20,
        compose: bytes = bytes(32),
        more: Sequence[tuple[x509.ExtensionType, bool]] = (),
    ) -> Pair:
        """Make the certificate of an instance, with its app info as dstack-util requests it."""
        info = [app, compose, instance, b"d" * 32, b"s" * 32, b"g" * 32, b"o" * 32, b"{}", []]
        return self.client("instance", extension(9, msgpack.packb(info)), extension(3, app), *more)

    def replaced(self, file: Path) -> "TestCa":
        """Return a CA that only says which file has the root of the gateway's certificate."""
        made = copy.copy(self)
        made.own = Pair(self.own.certificate, self.own.key, file)
        return made

    def _signed(self, name: str, issuer: Pair | None, *extensions: tuple[x509.ExtensionType, bool]) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(
            issuer.certificate.subject if issuer else subject,
            subject,
            key.public_key(),
            x509.random_serial_number(),
            now - DAY,
            now + DAY,
        )
        for value, critical in extensions:
            builder = builder.add_extension(value, critical)
        certificate = builder.sign(issuer.key if issuer else key, hashes.SHA256())
        file = self._folder / f"{certificate.serial_number}.pem"
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.write_bytes(key_pem + certificate.public_bytes(Encoding.PEM))
        return Pair(certificate, key, file)


def extension(number: int, payload: bytes) -> tuple[x509.ExtensionType, bool]:
    """Return one of dstack's certificate extensions: the payload in an OCTET STRING."""
    size = len(payload)
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    length = bytes([size]) if size < 128 else bytes([0x80 | len(octets)]) + octets
    oid = x509.ObjectIdentifier(f"1.3.6.1.4.1.62397.1.{number}")
    return x509.UnrecognizedExtension(oid, b"\x04" + length + payload), False


class StubAgent:
    """A guest agent of the standard library: its certificates are of a CA, and its quotes repeat the report data."""

    def __init__(self, ca: TestCa, app_id: bytes) -> None:
        self.ca, self.app_id = ca, app_id
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.tcb_info = ""
        self.health: dict[str, Any] = {}
        self.status = 200
        self._held = ""
        self._is_asked, self._may_answer = threading.Event(), threading.Event()

    @contextmanager
    def held(self, method: str) -> Iterator[threading.Event]:
        """Answer a method only after the block, and yield what is set when it is called."""
        self._held = method
        self._is_asked.clear()
        self._may_answer.clear()
        try:
            yield self._is_asked
        finally:
            self._held = ""
            self._may_answer.set()

    def answer(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        if method == "GetTlsKey":
            names = [x509.DNSName(name) for name in request["alt_names"]]
            local = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            alt_names = x509.SubjectAlternativeName([*names, local])
            made = self.ca.client(request["subject"], extension(3, self.app_id), alt_names=alt_names)
            key, leaf = made.file.read_text().split("-----BEGIN CERTIFICATE")
            chain = [f"-----BEGIN CERTIFICATE{leaf}", self.ca.own.certificate.public_bytes(Encoding.PEM).decode()]
            return {"key": key, "certificate_chain": chain}
        if method == "Info":
            return {"app_id": self.app_id.hex(), "tcb_info": self.tcb_info}
        if method == "Health":
            return self.health
        return {"attestation" if method == "Attest" else "report_data": request["report_data"]}

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve until the block ends, and yield the URL."""
        agent = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                method = urlsplit(self.path).path.rsplit("/", 1)[-1]
                request = json.loads(body or b"null") or {}
                agent.asked.append((method, request))
                if method == agent._held:
                    agent._is_asked.set()
                    agent._may_answer.wait(20)
                answer = json.dumps(agent.answer(method, request)).encode()
                self.send_response(agent.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class Table:
    """Where instances listen, by instance id and port."""

    def __init__(self) -> None:
        self.endpoints: dict[tuple[str, int], Endpoint] = {}

    def endpoint(self, instance: Instance, port: int) -> Endpoint | None:
        return self.endpoints.get((instance.id, port))


class GatewayClient:
    """Requests to a gateway."""

    def __init__(self, urls: Mapping[str, str], ca: TestCa) -> None:
        self.urls, self.ca = dict(urls), ca

    def ask(
        self,
        listener: str,
        path: str,
        body: bytes | None = None,
        *,
        client: Pair | Path | None = None,
        headers: dict[str, str] | None = None,
        verb: str = "POST",
    ) -> tuple[int, bytes, dict[str, str]]:
        """Send one request; return status, body and headers."""
        url = urlsplit(self.urls[listener])
        connection: http.client.HTTPConnection
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(
                url.hostname or "", url.port, timeout=20, context=self.client_tls(client)
            )
        else:
            connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
        if listener == "admin" and headers is None:
            headers = {"X-Admin-Token": TOKEN}
        try:
            connection.request(verb, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()

    def client_tls(self, client: Pair | Path | None) -> ssl.SSLContext:
        """Make the settings of a client that verifies the gateway under the CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca.own.file)
        if client is not None:
            context.load_cert_chain(client if isinstance(client, Path) else client.file)
        return context

    def rpc(self, listener: str, method: str, client: Pair | Path | None = None, **body: Any) -> Any:
        """Call one RPC in JSON that succeeds."""
        status, answer = self.tried(listener, method, client, **body)
        assert status == 200, answer
        return answer

    def tried(self, listener: str, method: str, client: Pair | Path | None = None, **body: Any) -> tuple[int, Any]:
        """Call one RPC in JSON."""
        headers = {"Content-Type": "application/json"}
        if listener == "admin":
            headers["Authorization"] = f"Bearer {TOKEN}"
        content = json.dumps(body).encode()
        status, answer, _ = self.ask(listener, f"/prpc/{method}?json", content, client=client, headers=headers)
        return status, json.loads(answer)

    def refused(self, listener: str, method: str, client: Pair | Path | None = None, **body: Any) -> str:
        """Call one RPC in JSON that is refused with 400; return the text."""
        status, answer = self.tried(listener, method, client, **body)
        assert (status, list(answer)) == (400, ["error"]), answer
        text: str = answer["error"]
        return text

    def register(self, client: Pair, key: str, **body: Any) -> Any:
        """Register an instance that succeeds."""
        return self.rpc("rpc", "RegisterCvm", client, client_public_key=wg_key(key), **body)

    def debug_register(self, instance: str, app: str = "app1", key: str = "") -> Any:
        """Register an instance on the debug listener."""
        names = {"instance_id": instance, "app_id": app, "client_public_key": wg_key(key or instance)}
        return self.rpc("debug", "RegisterCvm", None, **names)


class RunningGateway(GatewayClient):
    """A gateway, its clock, and requests to it."""

    def __init__(self, server: GatewayServer, ca: TestCa, loop: asyncio.AbstractEventLoop, clock: list[int]) -> None:
        super().__init__(server.urls, ca)
        self.server, self.clock, self._loop = server, clock, loop

    def remember(self) -> None:
        """Remember the present state for `reset`."""
        self._remembered = self.call(self.server.gateway.capture)

    def reset(self) -> None:
        """Put back the state that was remembered, and the clock."""
        self.clock[0] = START
        self.call(lambda: self.server.gateway.restore(self._remembered))

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the gateway's thread."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result(20)

    def poll_health(self) -> None:
        """Let it ask the agents about the health of their apps once."""
        asyncio.run_coroutine_threadsafe(self.server.gateway.poller.poll(), self._loop).result(20)

    def wait_for_exit(self) -> None:
        """Wait until an operator has ended it."""
        asyncio.run_coroutine_threadsafe(self.server.wait(), self._loop).result(20)


TOML = """
address = "127.0.0.1:0"
[tls]
key = "{file}"
certs = "{file}"
[tls.mutual]
ca_certs = "{ca}"
[core]
set_ulimit = false
[core.admin]
enabled = true
address = "127.0.0.1:0"
auth_token = "{token}"
[core.debug]
insecure_enable_debug_rpc = true
insecure_skip_attestation = true
address = "127.0.0.1:0"
[core.sync]
node_id = 1
my_url = "https://gateway.example:8000"
data_dir = "{data}"
[core.proxy]
listen_addr = "127.0.0.1"
listen_port = 0
"""


def config_text(folder: Path, ca: TestCa) -> str:
    """Return a gateway.toml whose certificate is under the CA, without a guest agent."""
    server = ca.client("gateway")
    return TOML.format(file=server.file, ca=ca.own.file, token=TOKEN, data=folder / "data")


@contextmanager
def running_gateway(
    folder: Path, more: str = "", *, release: str = DEFAULT.name, ca: TestCa | None = None, **given: Any
) -> Iterator[RunningGateway]:
    """Run a gateway until the block ends; `more` is added to its gateway.toml, `given` to its dependencies."""
    ca = ca or TestCa(folder / "ca", "EMULATED KMS root of a test")
    file = folder / "gateway.toml"
    file.write_text(with_more(config_text(folder, ca), more))
    clock, loop = [START], asyncio.new_event_loop()
    dependencies = GatewayDependencies(clock=lambda: clock[0], entropy=os.urandom, **given)
    ready: Future[GatewayServer] = Future()
    ended = asyncio.Event()

    async def live() -> None:
        try:
            server = GatewayServer(GatewayConfig.load(file), dependencies, release=RELEASES[release])
            await server.start()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(server)
        await ended.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: loop.run_until_complete(live()), daemon=True)
    thread.start()
    try:
        yield RunningGateway(ready.result(20), ca, loop, clock)
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def with_more(text: str, more: str) -> str:
    """Add lines to the sections of a TOML text: a key of `more` takes the place of the one that was there."""
    sections = _sections(text)
    for name, lines in _sections(more).items():
        sections.setdefault(name, {}).update(lines)
    top = "\n".join(sections.pop("").values())
    return top + "".join(f"\n[{name}]\n" + "\n".join(lines.values()) for name, lines in sections.items()) + "\n"


def _sections(text: str) -> dict[str, dict[str, str]]:
    """Return the lines of a TOML text by section and key."""
    sections: dict[str, dict[str, str]] = {"": {}}
    name = ""
    for line in text.splitlines():
        if line.startswith("["):
            name = line.strip("[]")
            sections.setdefault(name, {})
        elif line:
            sections[name][line.partition("=")[0].strip()] = line
    return sections
