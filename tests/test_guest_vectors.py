"""Published vectors and texts of the guest agent, over its sockets; the health file; and a server that is no KMS."""

import datetime
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import coincurve
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests import foreign, tls
from tests.commands import ask, run_command, serving
from tests.foreign import Guest
from tests.recorded import golden
from tests.running import RunningStack
from tests.test_guest_keys_v1 import APP_KEY, KEYS, SIMULATOR_APP_KEY

RELEASES = ("0.5", "0.6")
K256_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def key_file(folder: Path, k256_key: bytes) -> str:
    """Write the key file of upstream's simulator with this k256 key."""
    path = folder / "appkeys.json"
    path.write_text(json.dumps({**golden("guest-agent-keys.json")["appkeys"], "k256_key": k256_key.hex()}))
    return str(path)


@pytest.fixture(scope="module", params=RELEASES)
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """An agent with the app key of upstream's documents."""
    keys = key_file(tmp_path_factory.mktemp("keys"), APP_KEY)
    with serving("agent", "--release", request.param, "--keys", keys) as description:
        yield description


def reported(quote: str) -> bytes:
    """The report_data in a quote of version 4 (at 568, 64 bytes)."""
    return bytes.fromhex(quote)[568:632]


def evidence_of(certificate: x509.Certificate) -> bytes:
    """The evidence in a certificate, which is an OCTET STRING in an extension."""
    (found,) = (e.value for e in certificate.extensions if e.oid.dotted_string == "1.3.6.1.4.1.62397.1.8")
    assert isinstance(found, x509.UnrecognizedExtension)
    assert found.value[:2] == b"\x04\x82", "more than 255 and less than 65536 bytes"
    return found.value[4:]


# ---- v0


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [
        ("ed25519", b"dip1::ed25519-pk:5Pbre1Amf1hrp2V2bbfKlIfxpQb2pJAmrgmhxgVoG9s"),
        ("secp256k1", b"dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9"),
        ("k256", b"dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9"),
    ],
)
def test_app_key_is_attested_by_its_published_name(agent: dict[str, Any], algorithm: str, text: bytes) -> None:
    status, answer = ask(agent["dstack_url"], "/prpc/Worker.GetAttestationForAppKey", {"algorithm": algorithm})
    assert (status, reported(answer["quote"])) == (200, text.ljust(64, b"\0"))
    status, answer = ask(agent["dstack_url"], "/prpc/Worker.GetAttestationForAppKey", {"algorithm": "rsa"})
    assert (status, answer) == (400, {"error": "Unsupported algorithm"})


def test_0_6_attests_the_key_of_prehashed_signatures_and_0_5_has_no_such_key(agent: dict[str, Any]) -> None:
    """Upstream: `app_key_report_data` in guest-agent/src/rpc_service.rs at 0fcd31cd, `get_attestation_for_app_key` at
    312dc605, which hands the name to GetKey.
    """
    request = {"algorithm": "secp256k1_prehashed"}
    status, answer = ask(agent["dstack_url"], "/prpc/Worker.GetAttestationForAppKey", request)
    if ask(agent["dstack_url"], "/Version", {})[1]["version"] == "0.6.0":
        text = b"dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9"
        assert (status, reported(answer["quote"])) == (200, text.ljust(64, b"\0"))
    else:
        assert (status, answer) == (400, {"error": "Unsupported algorithm"})


def test_link_of_v0_equals_the_published_vector(agent: dict[str, Any]) -> None:
    for algorithm in ("secp256k1", "k256", ""):
        request = {"path": "test", "purpose": "signing", "algorithm": algorithm}
        status, answer = ask(agent["dstack_sock"], "/GetKey", request)
        assert (status, answer["signature_chain"][0]) == (
            200,
            "c8a3dcf06c4e95bd78a5d7a1c8fcff171fc5848cfae804c6fc11bda4dc5d4062"
            "379995390843827444992c4c0e4bac70f0f878e01b9fc8b98cd7126fe5a3876b01",
        )
    status, answer = ask(agent["dstack_sock"], "/GetKey", {**request, "algorithm": "secp256k1_prehashed"})
    assert (status, answer) == (400, {"error": "Unsupported algorithm"})


def test_verify_accepts_low_s_alone_and_digests_of_16_bytes_and_more(agent: dict[str, Any]) -> None:
    key = coincurve.PrivateKey(b"\x07" * 32)
    public_key = key.public_key.format().hex()

    def verified(signature: bytes, data: bytes, algorithm: str) -> tuple[int, Any]:
        request = {"algorithm": algorithm, "data": data.hex(), "signature": signature.hex(), "public_key": public_key}
        return ask(agent["dstack_sock"], "/Verify", request)

    signature = key.sign_recoverable(b"content")[:64]
    high = signature[:32] + (K256_ORDER - int.from_bytes(signature[32:], "big")).to_bytes(32, "big")
    assert verified(signature, b"content", "secp256k1") == (200, {"valid": True})
    assert verified(high, b"content", "secp256k1") == (200, {"valid": False})
    digest = bytes(range(16))
    signature = key.sign_recoverable(digest.rjust(32, b"\0"), hasher=None)[:64]
    assert verified(signature, digest, "secp256k1_prehashed") == (200, {"valid": True})
    assert verified(signature, digest.rjust(32, b"\0") + b"cut off", "secp256k1_prehashed") == (200, {"valid": True})
    assert verified(signature, digest[:15], "secp256k1_prehashed") == (200, {"valid": False})


def test_app_key_that_is_no_scalar_is_refused_by_name(tmp_path: Path) -> None:
    with serving("agent", "--release", "0.6", "--keys", key_file(tmp_path, b"\xff" * 32)) as agent:
        for path in ("/GetKey", "/v0/GetKey"):
            status, answer = ask(agent["dstack_sock"], path, {"path": "a", "algorithm": "ed25519"})
            assert (status, answer) == (400, {"error": "Failed to parse app k256 key: signature error"})
        request = {"domain": "a", "algorithm": "ed25519"}
        words = "the app root k256 key is not a valid secp256k1 scalar"
        assert ask(agent["dstack_sock"], "/v1/GetKey", request) == (400, {"error": words})


def test_certificate_without_dates_is_valid_from_1975_for_ten_years_from_now(agent: dict[str, Any]) -> None:
    chain = ask(agent["dstack_sock"], "/GetTlsKey", {"subject": "app"})[1]["certificate_chain"]
    leaf = x509.load_pem_x509_certificate(chain[0].encode())
    assert leaf.not_valid_before_utc.isoformat() == "1975-01-01T00:00:00+00:00"
    issued = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)  # as every certificate of a seed
    assert leaf.not_valid_after_utc - issued == datetime.timedelta(days=10 * 365)


def test_log_in_a_certificate_has_digests_in_0_6(agent: dict[str, Any]) -> None:
    measured = json.loads(ask(agent["dstack_sock"], "/GetQuote", {"report_data": ""})[1]["event_log"])
    digests = [bytes.fromhex(event["digest"]) for event in measured if event["imr"] == 3]
    request = {"subject": "app", "usage_ra_tls": True}
    leaf = x509.load_pem_x509_certificate(
        ask(agent["dstack_sock"], "/GetTlsKey", request)[1]["certificate_chain"][0].encode()
    )
    evidence = evidence_of(leaf)
    is_0_6 = ask(agent["dstack_sock"], "/Version", {})[1]["version"] == "0.6.0"
    assert [digest in evidence for digest in digests] == [is_0_6] * len(digests)


# ---- v1, as upstream's Rust suite runs it


@pytest.mark.parametrize("app_key", [APP_KEY, SIMULATOR_APP_KEY], ids=["documents", "simulator"])
def test_keys_of_v1_equal_the_published_vectors(app_key: bytes, tmp_path: Path) -> None:
    with serving("agent", "--release", "0.6", "--keys", key_file(tmp_path, app_key)) as agent:
        for _, domain, algorithm, key, public_key in (row for row in KEYS if row[0] == app_key):
            status, answer = ask(agent["dstack_sock"], "/v1/GetKey", {"domain": domain, "algorithm": algorithm})
            assert (status, answer["key"], answer["public_key"]) == (200, key, public_key)
            assert [len(bytes.fromhex(link)) for link in answer["signature_chain"]] == [65, 65]


def test_v1_answers_as_upstreams_python_suite_expects(tmp_path: Path) -> None:
    with serving("agent", "--release", "0.6", "--keys", key_file(tmp_path, APP_KEY)) as agent:

        def v1(method: str, **fields: Any) -> tuple[int, Any]:
            return ask(agent["dstack_sock"], f"/v1/{method}", fields)

        info = v1("Info")[1]
        sizes = {"app_id": 20, "compose_hash": 32, "instance_id": 20, "device_id": 32, "mr_aggregated": 32}
        assert {name: len(bytes.fromhex(info[name])) for name in sizes} == sizes
        assert len(bytes.fromhex(info["os_image_hash"])) in (0, 32)
        assert info["app_compose"]
        assert set(info) == {
            *sizes, "app_name", "app_compose", "os_image_hash", "vm_config", "key_provider_info", "cloud_vendor",
            "cloud_product",
        }  # fmt: skip
        for document in ("vm_config", "key_provider_info"):
            assert isinstance(json.loads(info[document]), dict)
        status, answer = v1("GetKey", domain="a", algorithm="k256")
        assert (status, "k256" in answer["error"]) == (400, True)
        status, answer = v1("AttestGpu", nonce="00" * 32)
        assert (status, "GPU attestation is not available in this image" in answer["error"]) == (501, True)
        first, second = (v1("IssueCert", subject="a", usage_server_auth=True)[1] for _ in range(2))
        assert first["key"] != second["key"]
        assert first["key"].startswith("-----BEGIN PRIVATE KEY-----\n")
        assert (
            v1("GetKey", domain="a", algorithm="secp256k1")[1]["key"]
            != ask(agent["dstack_sock"], "/GetKey", {"path": "a"})[1]["key"]
        )


def test_last_certificate_is_the_apps_own_root_with_evidence_in_scale() -> None:
    with serving("agent", "--release", "0.6") as agent:
        for path in ("/v1/IssueCert", "/GetTlsKey"):
            chain = ask(agent["dstack_sock"], path, {"subject": "a", "usage_ra_tls": True})[1]["certificate_chain"]
            leaf, root = (x509.load_pem_x509_certificate(pem.encode()) for pem in chain)
            assert root.subject.rfc4514_string() == "CN=App Root Cert"
            forms = [evidence_of(certificate)[:1].hex() for certificate in (leaf, root)]
            # A map of MessagePack begins with 8_, the version of the SCALE form is 0.
            assert forms == [("83" if path.startswith("/v1") else "00"), "00"]


def test_v1_is_served_in_every_encoding_and_refuses_what_is_none(tmp_path: Path) -> None:
    with serving("agent", "--release", "0.6", "--keys", key_file(tmp_path, APP_KEY)) as agent:
        port = int(agent["dstack_url"].rpartition(":")[2])

        def call(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            try:
                connection.request(method, path, body or None, {k.replace("_", "-"): v for k, v in headers.items()})
                answer = connection.getresponse()
                return answer.status, answer.getheader("Content-Type", ""), answer.read()
            finally:
                connection.close()

        wallet = next(row for row in KEYS if row[:3] == (APP_KEY, "wallet", "ed25519"))
        fields = b"\x0a\x06wallet\x12\x07ed25519"  # protobuf: 1 domain, 2 algorithm
        status, _, answer = call("POST", "/v1/GetKey", fields)
        assert (status, answer[:34]) == (200, b"\x0a\x20" + bytes.fromhex(wallet[3]))
        for path in ("/v1/GetKey?json", "/v1/GetKey?json=1", "/v1/GetKey?json=true"):
            status, kind, answer = call("POST", path, b'{"domain":"wallet","algorithm":"ed25519"}')
            assert (status, kind, json.loads(answer)["key"]) == (200, "application/json", wallet[3])
        status, kind, answer = call("GET", "/v1/GetKey?domain=wallet&algorithm=ed25519")
        assert (status, kind, json.loads(answer)["key"]) == (200, "application/json", wallet[3])
        assert call("POST", "/v1/GetKey", b"\xff\xff")[0] == 400
        status, kind, answer = call("POST", "/v1/GetKey?json", b"no JSON")
        assert (status, kind, list(json.loads(answer))) == (400, "application/json", ["error"])
        assert call("POST", "/v2/GetKey", Accept="application/json")[:2] == (404, "application/json")
        assert call("POST", "/v2/GetKey", Accept="text/html")[1].startswith("text/html")
        assert call("POST", "/v1/Nothing?json")[::2] == (404, b'{\n  "error": "Service not found: Nothing"\n}')


def test_agent_of_0_5_has_no_v1() -> None:
    with serving("agent", "--release", "0.5") as agent, pytest.raises(json.JSONDecodeError):
        ask(agent["dstack_sock"], "/v1/Version", {})


# ---- Worker.Health


@pytest.fixture(scope="module")
def health_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("health") / "health"


@pytest.fixture(scope="module")
def reporting(health_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the agent of an app that reports its health in that file."""
    compose = tmp_path_factory.mktemp("app") / "app-compose.json"
    requirements = {"health_check": True, "health_status_file": str(health_file)}
    manifest = {"manifest_version": "3", "name": "app", "runner": "bash", "requirements": requirements}
    compose.write_text(json.dumps(manifest))
    with serving("agent", "--release", "0.6", "--app-compose", str(compose)) as agent:
        yield agent["dstack_url"]


NOW = 4_000_000_000
"""A moment in the future, which counts as fresh."""


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (None, "{path} has not been written yet"),
        ("", "health file is empty"),
        (" \n\n", "health file is empty"),
        ("healthy", "health file must have two lines: state and unix timestamp"),
        ("healthy\nnow", "health file line 2 is not a unix time in seconds"),
        (f"unhealthy\n{NOW}", "app reports unhealthy"),
        (f" UNHEALTHY \n {NOW} \nmore", "app reports unhealthy"),
        (f"fine\n{NOW}", "health file line 1 is neither healthy nor unhealthy"),
    ],
)
def test_health_file_that_does_not_say_healthy_has_its_status(
    reporting: str, health_file: Path, text: str | None, status: str
) -> None:
    health_file.unlink(missing_ok=True)
    if text is not None:
        health_file.write_text(text)
    expected = {"name": "<health_file>", "status": status.format(path=health_file)}
    unhealthy = {"healthy": False, "unhealthy": [expected], "error": ""}
    assert ask(reporting, "/prpc/v1/Health", {}) == (200, unhealthy)
    health_file.write_text(f" Healthy \n{NOW}\n")
    assert ask(reporting, "/prpc/v1/Health", {}) == (200, {"healthy": True, "unhealthy": [], "error": ""})


def test_old_health_is_stale_and_a_folder_cannot_be_read(reporting: str, health_file: Path) -> None:
    health_file.write_text("healthy\n1000")
    (only,) = ask(reporting, "/prpc/v1/Health", {})[1]["unhealthy"]
    written, limit = only["status"].split(", ")
    assert written.startswith("health file is stale: written ")
    assert written.endswith("s ago")
    assert limit == "limit is 60s"
    health_file.unlink()
    health_file.mkdir()
    (only,) = ask(reporting, "/prpc/v1/Health", {})[1]["unhealthy"]
    assert only["status"].startswith(f"cannot read {health_file}: ")
    health_file.rmdir()


def test_app_that_relies_on_containers_waits_for_one(tmp_path: Path) -> None:
    compose = tmp_path / "app-compose.json"
    manifest = {"manifest_version": "3", "name": "app", "runner": "docker-compose"}
    compose.write_text(json.dumps({**manifest, "requirements": {"health_check": True}}))
    with serving("agent", "--release", "0.6", "--app-compose", str(compose)) as agent:
        waits = {"name": "<compose>", "status": "no container has been created yet"}
        unhealthy = {"healthy": False, "unhealthy": [waits], "error": ""}
        assert ask(agent["dstack_url"], "/prpc/v1/Health", {}) == (200, unhealthy)


# ---- a server that is no KMS, under the KMS's root


class _Impostor(BaseHTTPRequestHandler):
    """Answers GetTempCaCert as the KMS does, and would take anything else."""

    temp_ca: dict[str, Any]
    calls: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.calls.append(self.path)
        body = json.dumps(self.temp_ca if "GetTempCaCert" in self.path else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


@contextmanager
def impostor(stack: RunningStack) -> Iterator[tuple[str, list[str]]]:
    """Serve with the certificate of an app, which has the KMS's root; yield the URL, and the paths that are called."""
    with foreign.kms(stack.services["kms-src"]) as connection:
        temp_ca = connection.call("GetTempCaCert").value
    request = {"subject": "127.0.0.1", "alt_names": ["127.0.0.1"], "usage_server_auth": True, "usage_ra_tls": True}
    own = ask(stack.description["app"]["dstack_sock"], "/GetTlsKey", request)[1]
    calls: list[str] = []
    handler = type("Handler", (_Impostor,), {"temp_ca": temp_ca, "calls": calls})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = tls.server("".join(own["certificate_chain"]), own["key"]).wrap_socket(
        server.socket, server_side=True
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}", calls
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_app_that_poses_as_the_kms_gives_no_keys(each_ready_stack: RunningStack) -> None:
    services = each_ready_stack.services
    options = ("--release", each_ready_stack.release.name, "--pccs", services["pccs"])
    with impostor(each_ready_stack) as (url, calls):
        done = run_command("boot", "--kms", url, *options, "--json")
    assert (done.returncode, done.stdout) == (1, b"")
    refused = f"failed to validate the server attestation of {url}/prpc: Invalid server cert usage: app:custom\n"
    assert done.stderr.decode().endswith(refused)
    assert [path.partition("?")[0] for path in calls] == ["/prpc/GetTempCaCert", "/prpc/GetAppKey"]
    with serving("boot", "--kms", services["kms-src"], *options) as agent:
        assert agent["app_id"] == each_ready_stack.description["app"]["app_id"]


@pytest.mark.parametrize("release", RELEASES)
def test_app_that_poses_as_the_kms_signs_no_certificates_of_0_6(
    ready_stack: RunningStack, release: str, tmp_path: Path
) -> None:
    guest = Guest.of(ready_stack.services["kms-src"], ready_stack.description["app"]["dstack_sock"])
    keys = guest.get_app_key().value
    root = x509.load_pem_x509_certificate(keys["ca_cert"].encode())
    with impostor(ready_stack) as (url, _), foreign.kms(guest.kms_url) as connection:
        temp = connection.call("GetTempCaCert").value
        provider = {
            "url": f"{url}/prpc",
            "pubkey": root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).hex(),
            "tmp_ca_key": temp["temp_ca_key"],
            "tmp_ca_cert": temp["temp_ca_cert"],
        }
        names = ("ca_cert", "disk_crypt_key", "env_crypt_key", "k256_key", "k256_signature", "gateway_app_id")
        path = tmp_path / "appkeys.json"
        path.write_text(json.dumps({**{name: keys[name] for name in names}, "key_provider": {"Kms": provider}}))
        command = ("agent", "--keys", str(path), "--release", release)
        if release == "0.5":
            with serving(*command) as agent:
                assert ask(agent["dstack_sock"], "/GetTlsKey", {"subject": "app"})[1]["certificate_chain"] == []
            return
        done = run_command(*command, "--json")
    words = f"failed to validate the server attestation of {url}/prpc: Invalid server cert usage: app:custom"
    assert (done.returncode, done.stderr.decode()) == (1, f"Error: Failed to sign the CSR: {words}\n")
