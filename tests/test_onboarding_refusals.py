"""Onboarding refused, case by case: nothing is stored, and once the cause is gone the same KMS onboards.

The receiver is a process of its own (`dstack-emu kms`) beside a stack, with a webhook of its own (`dstack-emu auth
simple`), asked with curl. The source is the stack's, one with something wrong about it, or a small TLS server of this
file, which may even have the source's certificate and key. The receiver's PCCS says of the source what a case wants.
"""

import json
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dstack_emu.simulator.platform import PlatformState
from tests import foreign, tls
from tests.commands import run_command, serving
from tests.kms_files import copy_keys, write_kms_toml
from tests.live_pccs import LivePccs, live_pccs
from tests.ports import refusing_port
from tests.running import RunningStack, running_kms
from tests.test_sign_cert import vec

SOURCE_PLATFORM = "host of kms-src"
Reply = Callable[[str], bytes]


@dataclass(frozen=True)
class World:
    """A stack, and a receiver beside it, with the folder of its keys, its webhook's policy and its PCCS."""

    stack: RunningStack
    receiver: str
    folder: Path
    policy: Path
    pccs: LivePccs

    @property
    def source(self) -> str:
        """The source that is as it should be."""
        return self.stack.services["kms-src"]

    @property
    def certs(self) -> Path:
        """Its keys and certificates."""
        return Path(self.stack.description["kms_ca"]).parent

    def allow_source(self) -> None:
        """Let the receiver's webhook allow the source."""
        info = self.stack.description["kms"]["src"]
        kms = {"mrAggregated": [f"0x{info['mr_aggregated']}"], "devices": [], "allowAnyDevice": True}
        self.policy.write_text(json.dumps({"osImages": [f"0x{info['os_image_hash']}"], "kms": kms}))


@pytest.fixture(scope="module")
def world(ready_stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The stack with a receiver."""
    folder = tmp_path_factory.mktemp("receiver")
    policy = folder / "policy.json"
    with ExitStack() as stack:
        webhook = stack.enter_context(serving("auth", "simple", "--listen", "127.0.0.1:0", "--config", str(policy)))
        pccs = stack.enter_context(live_pccs(ready_stack.description["seed"]))
        config = write_kms_toml(folder, ready_stack, webhook=webhook["url"], pccs=pccs.url)
        receiver = stack.enter_context(running_kms(config, ready_stack.services["agent-dst"]))
        world = World(ready_stack, receiver, folder / "certs", policy, pccs)
        world.allow_source()
        yield world


# ---- a source of this file's own


@contextmanager
def tls_server(reply: Reply, *contexts: ssl.SSLContext) -> Iterator[str]:
    """Answer each request by its path with raw bytes, and hang up; yield the URL.

    Each connection has the next one of the certificates, the last of them for the rest.
    """
    left = list(contexts)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                plain, _ = listener.accept()
                with plain:
                    plain.settimeout(foreign.TIMEOUT)
                    context = left.pop(0) if len(left) > 1 else left[0]
                    try:
                        with context.wrap_socket(plain, server_side=True) as channel:
                            head = b""
                            while b"\r\n\r\n" not in head and (more := channel.recv(65536)):
                                head += more
                            if head:
                                channel.sendall(reply(head.split(b" ")[1].decode()))
                    except OSError:
                        continue  # the client had seen enough

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"https://127.0.0.1:{port}"
        finally:
            done.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def http(body: bytes, length: int | None = None) -> bytes:
    """A 200, of which as much is said to come as `length` says."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


@contextmanager
def posing_as_the_source(world: World, answer: bytes | None, *, then_as: str = "src") -> Iterator[str]:
    """A server with the source's own certificate and key, which answers GetTempCaCert as it does, and then so.

    Without an answer it hangs up already on GetTempCaCert; `then_as` is the side whose certificate the second
    connection gets to see.
    """
    status, temp = world.stack.rpc("kms-src", "KMS.GetTempCaCert")
    assert status == 200

    def reply(path: str) -> bytes:
        if answer is None:
            return b""
        return http(json.dumps(temp).encode()) if "GetTempCaCert" in path else answer

    folders = [world.certs, Path(world.stack.description["state"], f"kms-{then_as}", "certs")]
    shown = [tls.server((each / "rpc.crt").read_text(), (each / "rpc.key").read_text()) for each in folders]
    with tls_server(reply, *shown) as url:
        yield url


# ---- what can be wrong; each yields the source's URL and the refusal that must come

Case = Callable[[World], AbstractContextManager[tuple[str, str]]]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Callable[[World], Iterator[tuple[str, str]]]], None]:
    """Put a case into the table."""

    def note(function: Callable[[World], Iterator[tuple[str, str]]]) -> None:
        CASES[name] = contextmanager(function)

    return note


def refused(text: str) -> str:
    """A refusal of the source, inside the receiver's."""
    body = json.dumps({"error": text}, indent=2)
    return f"Request failed with status=400 Bad Request, error={body}"


def unproven(url: str, text: str) -> str:
    """The refusal of a source whose certificate proves nothing."""
    return f"failed to validate the server attestation of {url}/prpc: {text}"


def unsent(url: str, method: str, why: str) -> str:
    """What is said where no answer came."""
    return f"Failed to send request: error sending request for url ({url}/prpc/{method}?json): {why}"


@case("the source denies itself")
def _(world: World) -> Iterator[tuple[str, str]]:
    dst = world.stack.description["kms"]["dst"]["mr_aggregated"]
    with world.stack.policy_changed("src", lambda policy: policy["kms"].update(mrAggregated=[dst])):
        yield (
            world.source,
            refused("KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"),
        )


@case("the source denies the receiver")
def _(world: World) -> Iterator[tuple[str, str]]:
    src = world.stack.description["kms"]["src"]["mr_aggregated"]
    with world.stack.policy_changed("src", lambda policy: policy["kms"].update(mrAggregated=[src])):
        yield world.source, refused("Boot denied: aggregated MR not allowed")


@case("the receiver denies the source")
def _(world: World) -> Iterator[tuple[str, str]]:
    world.policy.write_text(world.policy.read_text().replace('"mrAggregated": ["0x', '"mrAggregated": ["0x00'))
    try:
        yield (
            world.source,
            "Source KMS is not allowed for onboarding: boot denied: aggregated MR not allowed",
        )
    finally:
        world.allow_source()


UNVERIFIED = "failed to verify the attestation report presented by the server: "


@case("the source's certificate has no attestation")
def _(world: World) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_keys(folder, world.stack)
        webhook = world.stack.services["auth-src"]
        config = write_kms_toml(folder, world.stack, webhook=webhook, attests=False)
        with running_kms(config, world.stack.services["agent-src"]) as url:
            yield url, unproven(url, "Source KMS certificate does not contain attestation")


@contextmanager
def attested(evidence_of: Callable[[bytes], bytes], answer: bytes = b"{}") -> Iterator[str]:
    """A server whose certificate carries evidence that is made for its key (SPKI DER)."""

    def extensions(spki: bytes) -> dict[x509.ObjectIdentifier, bytes]:
        return {foreign.OID_ATTESTATION: foreign.der_octet_string(evidence_of(spki))}

    with certified(extensions, answer) as url:
        yield url


@contextmanager
def certified(
    extensions_of: Callable[[bytes], dict[x509.ObjectIdentifier, bytes]], answer: bytes = b"{}"
) -> Iterator[str]:
    """A server whose certificate has extensions that are made for its key (SPKI DER)."""
    key = foreign.new_key()
    extensions = extensions_of(foreign.spki_of(key))
    certificate = foreign.Authority.invent("Dstack KMS CA").issue_raw(key, extensions).certificate
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    shown = tls.server(certificate.public_bytes(Encoding.PEM).decode(), pem)
    with tls_server(lambda path: http(answer), shown) as url:
        yield url


def quoted(*options: str) -> Callable[[bytes], bytes]:
    """Evidence of the source's platform with something wrong about it."""

    def evidence_of(spki: bytes) -> bytes:
        binding = foreign.binding_of(spki).hex()
        done = run_command("quote", "--platform", SOURCE_PLATFORM, "--attestation", "--report-data", binding, *options)
        assert done.returncode == 0, done
        return done.stdout

    return evidence_of


@case("the source's quote is under another root")
def _(world: World) -> Iterator[tuple[str, str]]:
    with attested(quoted("--other-root")) as url:
        reason = "failed to verify TDX quote: Failed to verify certificate chain: InvalidSignatureForPublicKey"
        yield url, unproven(url, UNVERIFIED + reason)


@case("the source is a debug domain")
def _(world: World) -> Iterator[tuple[str, str]]:
    with attested(quoted("--debug")) as url:
        yield url, unproven(url, UNVERIFIED + "failed to verify TDX quote: Debug mode is enabled")


@case("the source's attestation belongs to another key")
def _(world: World) -> Iterator[tuple[str, str]]:
    other = foreign.spki_of(foreign.new_key())
    with attested(lambda spki: foreign.attest(world.stack.services["agent-src"], other)) as url:
        yield url, unproven(url, UNVERIFIED + "report data mismatch")


@case("the source's VM config cannot be read")
def _(world: World) -> Iterator[tuple[str, str]]:
    agent = world.stack.services["agent-src"]
    config = vec(foreign.ask_agent(agent, "Info")["vm_config"].encode())

    def with_another_config(spki: bytes) -> bytes:
        evidence = foreign.attest(agent, spki)
        assert evidence.endswith(config), "no quote covers it"
        return evidence[: -len(config)] + vec(b"[]")

    temp_ca = json.dumps(world.stack.rpc("kms-src", "KMS.GetTempCaCert")[1]).encode()
    with attested(with_another_config, temp_ca) as url:
        context = "Source KMS is not allowed for onboarding: failed to build KMS boot info from attestation: "
        reason = "Failed to decode os image hash: Failed to parse vm config: object expected, got []"
        yield url, f"{context}decode app info: {reason}"


DSTACK = "1.3.6.1.4.1.62397.1"


@case("the source's evidence is no OCTET STRING")
def _(world: World) -> Iterator[tuple[str, str]]:
    with certified(lambda spki: {foreign.OID_ATTESTATION: b"\x0c\x00"}) as url:
        reason = "[1, 3, 6, 1, 4, 1, 62397, 1, 8]: extension: DER tag 0x04 expected, got 0x0c"
        yield url, unproven(url, f"Failed to parse attestation: Failed to get extension for {reason}")


@case("the source's usage is no text")
def _(world: World) -> Iterator[tuple[str, str]]:
    usage = x509.ObjectIdentifier(f"{DSTACK}.4")
    with certified(lambda spki: {usage: foreign.der_octet_string(b"\xff")}) as url:
        reason = "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
        context = "Failed to get special usage: Failed to decode special usage as utf8: "
        yield url, unproven(url, context + reason)


@case("the source's app id is no OCTET STRING")
def _(world: World) -> Iterator[tuple[str, str]]:
    with certified(lambda spki: {x509.ObjectIdentifier(f"{DSTACK}.3"): b"\x04\x00\x00"}) as url:
        reason = "[1, 3, 6, 1, 4, 1, 62397, 1, 3]: extension: 1 bytes after the OCTET STRING"
        yield url, unproven(url, f"Failed to get app id: Failed to get extension for {reason}")


@case("the source's TCB is out of date")
def _(world: World) -> Iterator[tuple[str, str]]:
    with world.pccs.says(SOURCE_PLATFORM, PlatformState(tcb_status="OutOfDate")):
        yield world.source, "Source KMS is not allowed for onboarding: boot denied: TCB status is not allowed"


@case("the source's TCB is revoked")
def _(world: World) -> Iterator[tuple[str, str]]:
    with world.pccs.says(SOURCE_PLATFORM, PlatformState(tcb_status="Revoked")):
        reason = "failed to verify TDX quote: TCB status is invalid: Revoked"
        yield world.source, unproven(world.source, UNVERIFIED + reason)


@case("the source's platform certificate is revoked")
def _(world: World) -> Iterator[tuple[str, str]]:
    with world.pccs.says(SOURCE_PLATFORM, PlatformState(pck_revoked=True)):
        reason = "failed to verify TDX quote: Failed to verify certificate chain: CertRevoked"
        yield world.source, unproven(world.source, UNVERIFIED + reason)


@case("nobody listens at the URL")
def _(world: World) -> Iterator[tuple[str, str]]:
    with refusing_port() as port:
        url = f"https://127.0.0.1:{port}"
        yield url, unsent(url, "GetTempCaCert", "Connection refused")


@case("the URL is a plain one")
def _(world: World) -> Iterator[tuple[str, str]]:
    url = world.stack.services["pccs"]
    yield url, unproven(url, "No TLS info in response")


@case("the URL is none")
def _(world: World) -> Iterator[tuple[str, str]]:
    yield "kms-src:9301", "Failed to send request: builder error: http(s) URL expected, got 'kms-src:9301/prpc'"


@case("the connection ends before the first answer")
def _(world: World) -> Iterator[tuple[str, str]]:
    with posing_as_the_source(world, None) as url:
        yield url, unsent(url, "GetTempCaCert", "connection closed before the answer")


@case("the connection ends before the keys")
def _(world: World) -> Iterator[tuple[str, str]]:
    with posing_as_the_source(world, b"") as url:
        yield url, unsent(url, "GetKmsKey", "connection closed before the answer")


@case("the connection ends within the keys")
def _(world: World) -> Iterator[tuple[str, str]]:
    half = http(b'{"temp_ca_key":"-----BEGIN PRIVATE KEY-----\\n', length=1000)
    with posing_as_the_source(world, half) as url:
        yield url, unsent(url, "GetKmsKey", "connection closed within the answer")


@case("the source has no keys to give")
def _(world: World) -> Iterator[tuple[str, str]]:
    with posing_as_the_source(world, http(b'{"temp_ca_key":"","keys":[]}')) as url:
        yield url, "Invalid keys"


@case("the source has another key on the second connection")
def _(world: World) -> Iterator[tuple[str, str]]:
    real = {"temp_ca_key": (world.certs / "tmp-ca.key").read_text()}
    root = {"ca_key": (world.certs / "root-ca.key").read_text(), "k256_key": "11" * 32}
    with posing_as_the_source(world, http(json.dumps({**real, "keys": [root]}).encode()), then_as="dst") as url:
        yield url, "Source KMS changed its key between two connections"


# ---- the table


def onboard(world: World, source: str) -> tuple[int, Any]:
    """Ask with curl."""
    question = json.dumps({"source_url": source, "domain": "kms.test"})
    status, text = world.stack.curl(f"{world.receiver}/prpc/Onboard.Onboard?json", "-d", question)
    return status, json.loads(text)


@pytest.mark.parametrize("name", CASES)
def test_onboarding_is_refused_stores_nothing_and_can_be_retried(world: World, name: str) -> None:
    assert not list(world.folder.iterdir())
    with CASES[name](world) as (source, refusal):
        assert onboard(world, source) == (400, {"error": f"Failed to onboard: {refusal}"})
        assert not list(world.folder.iterdir())
    status, answer = onboard(world, world.source)
    assert (status, list(answer)) == (200, ["k256_pubkey"]), answer
    for key in ("root-ca.key", "root-k256.key", "tmp-ca.key"):
        assert (world.folder / key).read_bytes() == (world.certs / key).read_bytes()
    for file in world.folder.iterdir():  # Onboard looks at the folder at every call: the receiver is fresh again
        file.unlink()
