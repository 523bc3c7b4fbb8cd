"""A KMS as a legacy source: its RPC certificate carries quote and event log as releases before 0.5.9 wrote them.

The receiver runs in a trust domain with another OS image, so it shows whose image it asks its webhook about.
"""

import gzip
import json
import ssl
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests import foreign, tls
from tests.commands import serving
from tests.foreign import Authority, Guest
from tests.kms_process import Kms, World, running, variables
from tests.running import RunningStack
from tests.test_onboarding_refusals import http, tls_server

FORMS = ["versioned", "legacy", "legacy-gzip"]
MAGIC = b"ELGZv1"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The source's trust domain."""
    with serving("agent") as description:
        yield World.of(description)


@pytest.fixture(scope="module")
def other_world() -> Iterator[World]:
    """The receiver's, of another image."""
    with serving("agent", "--image", "another") as description:
        yield World.of(description)


@pytest.fixture(scope="module", params=FORMS)
def source(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    """A KMS with keys, its evidence in one of the forms."""
    keys = {"emulator.rpc_cert_evidence": request.param, "core.onboard.auto_bootstrap_domain": "127.0.0.1"}
    with running(tmp_path_factory.mktemp("source"), world, **variables(keys)) as kms:
        yield kms


def form_of(kms: Kms) -> str:
    """The form that a KMS's certificate has."""
    values = extensions(kms)
    if foreign.OID_ATTESTATION in values:
        return "versioned"
    return "legacy-gzip" if values[foreign.OID_EVENT_LOG].startswith(MAGIC) else "legacy"


def extensions(kms: Kms) -> dict[x509.ObjectIdentifier, bytes]:
    """dstack's own extensions of a KMS's certificate, in order, out of their OCTET STRINGs."""
    certificate = x509.load_pem_x509_certificate((kms.certs / "rpc.crt").read_bytes())
    found = {}
    for extension in certificate.extensions:
        if isinstance(value := extension.value, x509.UnrecognizedExtension):
            assert value.value[0] == 4
            size = value.value[1]
            found[extension.oid] = value.value[2 + (size & 0x7F if size & 0x80 else 0) :]
    return found


def test_certificate_has_the_extensions_of_its_form(source: Kms) -> None:
    values = extensions(source)
    oids = [oid.dotted_string.rpartition(".")[2] for oid in values]
    assert oids == (["4", "8"] if form_of(source) == "versioned" else ["4", "1", "2"])
    if form_of(source) == "versioned":
        return
    log = values[foreign.OID_EVENT_LOG]
    if form_of(source) == "legacy-gzip":
        log = gzip.decompress(log.removeprefix(MAGIC))
    events = json.loads(log)
    assert {event["imr"] for event in events} == {0, 1, 2, 3}, "the whole log"
    assert all(event["digest"] for event in events)
    assert values[foreign.OID_QUOTE][:2] == b"\x04\0"


@pytest.fixture
def policy(tmp_path: Path, other_world: World) -> Path:
    """A policy that allows no image yet."""
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"osImages": [], "kms": {"mrAggregated": [], "allowAnyDevice": True}, "apps": {}}))
    return path


def test_receiver_asks_about_a_legacy_source_with_its_own_image(
    source: Kms, world: World, other_world: World, policy: Path, tmp_path: Path
) -> None:
    log = tmp_path / "auth.log"
    with serving("auth", "simple", "--listen", "127.0.0.1:0", "--config", str(policy), log=log) as auth:
        keys = {"core.auth_api.type": "webhook", "core.auth_api.webhook.url": auth["url"]}
        with running(tmp_path, other_world, **variables(keys)) as kms:
            onboarding = {"source_url": source.runtime_url, "domain": "127.0.0.1"}
            refused = "Failed to onboard: Source KMS is not allowed for onboarding: boot denied: "
            assert kms.rpc("Onboard.Onboard", onboarding) == (400, {"error": refused + "OS image is not allowed"})
            asked = json.loads(log.read_text().partition("KMS boot auth request: ")[2].splitlines()[0])
            expected = world if form_of(source) == "versioned" else other_world
            assert asked["osImageHash"] == expected.os_image_hash

            rules: dict[str, Any] = json.loads(policy.read_text())
            rules["osImages"] = [f"0x{asked['osImageHash']}"]
            policy.write_text(json.dumps(rules))
            assert kms.rpc("Onboard.Onboard", onboarding) == (400, {"error": refused + "aggregated MR not allowed"})
            rules["kms"]["mrAggregated"] = [f"0x{asked['mrAggregated']}"]
            policy.write_text(json.dumps(rules))
            assert not list(kms.certs.iterdir())
            status, answer = kms.rpc("Onboard.Onboard", onboarding)
            assert (status, answer) == (200, {"k256_pubkey": source.rpc("KMS.GetMeta")[1]["k256_pubkey"]})
            assert (kms.certs / "root-ca.key").read_bytes() == (source.certs / "root-ca.key").read_bytes()


def test_source_without_evidence_is_refused_whatever_the_form(world: World, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    keys = {
        "emulator.rpc_cert_evidence": "legacy",
        "core.attest_rpc_cert": "false",
        "core.onboard.auto_bootstrap_domain": "127.0.0.1",
    }
    with (
        running(tmp_path / "source", world, **variables(keys)) as source,
        running(tmp_path, world) as kms,
    ):
        status, refusal = kms.rpc("Onboard.Onboard", {"source_url": source.runtime_url, "domain": "127.0.0.1"})
        assert status == 400
        assert refusal["error"].endswith("Source KMS certificate does not contain attestation")


# ---- callers with such certificates


def packed(log: bytes) -> bytes:
    """An event log in the compressed form."""
    return MAGIC + gzip.compress(log)


def test_getappkey_answers_callers_with_legacy_certificates(each_ready_stack: RunningStack) -> None:
    guest = Guest.of(each_ready_stack.services["kms-src"], each_ready_stack.description["app"]["dstack_sock"])
    key = foreign.new_key()
    answer = foreign.ask_agent(guest.agent, "GetQuote", {"report_data": foreign.binding_of(foreign.spki_of(key)).hex()})
    quote, log = bytes.fromhex(answer["quote"]), answer["event_log"].encode()

    def ask(event_log: bytes | None, vm_config: str = answer["vm_config"]) -> foreign.Answer:
        values = {foreign.OID_QUOTE: quote}
        if event_log is not None:
            values[foreign.OID_EVENT_LOG] = event_log
        return guest.get_app_key(guest.temp_ca.issue_with(key, values), vm_config=vm_config)

    wanted = guest.get_app_key().value
    assert ask(log).value == ask(packed(log)).value == wanted
    # Nobody says which image it is, where the request does not.
    for form in (log, packed(log)):
        assert ask(form, vm_config="").error == "App not allowed: Boot denied: OS image is not allowed"
    context = "Failed to create attestation from TDX quote: "
    undecodable = {
        "TDX event log missing": None,
        f"{context}failed to decompress event log: it is cut short": packed(log)[:-9],
        f"{context}failed to decompress event log: ": MAGIC + log,
        f"{context}failed to decompress event log: E": MAGIC + zlib.compress(log),
        f"{context}event log extension too large (>16384 bytes)": packed(log + b" " * 16384),
        f"{context}event log extension too large (>16384 bytes": packed(b" " * 100_000_000),
    }
    for reason, event_log in undecodable.items():
        if (
            each_ready_stack.release.any_client_certificate_issuer
        ):  # the handshake ends, and the reason stays in the log
            with pytest.raises(ssl.SSLError, match="ALERT_HANDSHAKE_FAILURE"):
                ask(event_log)
        else:
            assert ask(event_log).error.startswith(reason)
    events = json.loads(log)
    lie = json.dumps([{**event, "event_payload": "00"} if event["event"] == "app-id" else event for event in events])
    for form in (lie.encode(), packed(lie.encode())):
        assert ask(form).error.startswith("invalid quote: RTMR3 mismatch, quoted: ")
    other = guest.temp_ca.issue_with(foreign.new_key(), {foreign.OID_QUOTE: quote, foreign.OID_EVENT_LOG: packed(log)})
    assert guest.get_app_key(other).error == "invalid quote: report data mismatch"


# ---- a source that names no OS image


@contextmanager
def source_with(world: World, values_of: Callable[[bytes], dict[x509.ObjectIdentifier, bytes]]) -> Iterator[str]:
    """A server that answers GetTempCaCert, and whose certificate carries such extensions for its key; yield its URL."""
    key, temporary = foreign.new_key(), Authority.invent("temporary CA")
    certificate = Authority.invent("Dstack KMS CA").issue_with(key, values_of(foreign.spki_of(key))).certificate
    temp = {
        "temp_ca_cert": pem(temporary.certificate),
        "temp_ca_key": private_pem(temporary.key),
        "ca_cert": pem(temporary.certificate),
    }
    shown = tls.server(pem(certificate), private_pem(key))
    with tls_server(lambda path: http(json.dumps(temp).encode()), shown) as url:
        yield url


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def with_config(evidence: bytes, config: bytes) -> bytes:
    """Evidence in SCALE, whose last member, the VM config, is another text of less than 64 bytes."""
    assert evidence[0] == 0
    head, brace, _ = evidence.rpartition(b'{"os_image_hash"')
    assert brace
    return head[:-2] + bytes([len(config) << 2]) + config


@pytest.mark.parametrize(
    ("release", "config", "image"),
    [
        ("0.5", None, "the receiver's"),
        ("0.6", None, "the receiver's"),
        ("0.5", b"", "the receiver's"),
        ("0.6", b"", "the receiver's"),
        ("0.5", b"{}", "the receiver's"),
        ("0.6", b"{}", "none"),
        ("0.5", b'{"cpu_count":1}', "the receiver's"),
        ("0.6", b'{"cpu_count":1}', "none"),
    ],
)
def test_receiver_of_0_6_substitutes_its_image_only_if_the_source_has_no_config(
    world: World, other_world: World, policy: Path, tmp_path: Path, release: str, config: bytes | None, image: str
) -> None:
    agent = world.agent.removeprefix("unix:")

    def values_of(spki: bytes) -> dict[x509.ObjectIdentifier, bytes]:
        if config is not None:
            return {foreign.OID_ATTESTATION: with_config(foreign.attest(agent, spki), config)}
        answer = foreign.ask_agent(agent, "GetQuote", {"report_data": foreign.binding_of(spki).hex()})
        return {
            foreign.OID_QUOTE: bytes.fromhex(answer["quote"]),
            foreign.OID_EVENT_LOG: answer["event_log"].encode(),
        }

    log = tmp_path / "auth.log"
    with (
        source_with(world, values_of) as url,
        serving("auth", "simple", "--listen", "127.0.0.1:0", "--config", str(policy), log=log) as auth,
    ):
        keys = {"core.auth_api.type": "webhook", "core.auth_api.webhook.url": auth["url"]}
        with running(tmp_path, other_world, "--release", release, **variables(keys)) as kms:
            status, answer = kms.rpc("Onboard.Onboard", {"source_url": url, "domain": "127.0.0.1"})
            refused = "Failed to onboard: Source KMS is not allowed for onboarding: boot denied: "
            assert (status, answer) == (400, {"error": f"{refused}OS image is not allowed"})
            asked = json.loads(log.read_text().partition("KMS boot auth request: ")[2].splitlines()[0])
            assert asked["osImageHash"] == {"the receiver's": other_world.os_image_hash, "none": ""}[image]
            assert not list(kms.certs.iterdir())
