"""The guest API v1 of a stack of release 0.6, for a client of the standard library, cryptography and coincurve.

What the client is given is checked with what its users check with: coincurve, dcap-qvl, the verifier's HTTP interface.
The vectors of the keys are in tests/test_guest_keys_v1.py.
"""

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coincurve
import dcap_qvl
import msgpack
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from eth_utils.crypto import keccak

from tests.reflected import reflected
from tests.running import RunningStack, running_stack

V1_METHODS = ("IssueCert", "GetKey", "Attest", "AttestGpu", "Info", "Version")
EMIT_EVENT_REMOVED = (
    "EmitEvent was removed in dstack 0.6.0; runtime RTMR3 events are system-owned and cannot be extended by apps"
)


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    with running_stack("--release", "0.6", "--grpc") as running:
        yield running


def over_socket(path: str, target: str, body: dict[str, Any] | None = None) -> tuple[int, str, bytes]:
    """POST JSON to a socket file; return status, content type and body."""
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(20)
    connection.sock.connect(path)
    try:
        connection.request("POST", target, json.dumps(body or {}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()
    finally:
        connection.close()


def over_tcp(url: str, body: dict[str, Any] | None = None, method: str = "POST") -> tuple[int, str, bytes]:
    """Send JSON, or a GET, to a URL; return status, content type and body."""
    data = json.dumps(body or {}).encode() if method == "POST" else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read()


class Client:
    """dstack.sock of the stack's app."""

    def __init__(self, stack: RunningStack) -> None:
        self.sock: str = stack.description["app"]["dstack_sock"]

    def call(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        status, _, answer = over_socket(self.sock, f"/v1/{method}", body)
        assert status == 200, answer
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def refusal(self, target: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        status, kind, answer = over_socket(self.sock, target, body)
        assert kind == "application/json", answer
        return status, json.loads(answer)["error"]


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Client:
    return Client(stack)


# ---- mounts


def test_unknown_method_is_an_error_and_unknown_mount_a_page(client: Client) -> None:
    assert client.refusal("/v1/Sign") == (404, "Service not found: Sign")
    assert client.refusal("/v0/IssueCert") == (404, "Service not found: IssueCert")
    assert client.refusal("/GpuInfo") == (404, "Service not found: GpuInfo")
    status, kind, page = over_socket(client.sock, "/v2/Version")
    assert (status, kind.partition(";")[0]) == (404, "text/html")
    assert b"<h1>404 Not Found</h1>" in page


def test_v0_has_two_paths_and_one_handler(client: Client) -> None:
    request = {"path": "wallet", "purpose": "signing"}
    assert over_socket(client.sock, "/GetKey", request) == over_socket(client.sock, "/v0/GetKey", request)
    assert over_socket(client.sock, "/Version") == over_socket(client.sock, "/v0/Version")


def test_external_listener_has_worker_in_both_versions(stack: RunningStack) -> None:
    base = f"{stack.services['app']}/prpc"
    version = {"version": "0.6.0", "rev": json.loads(over_tcp(f"{base}/v1/Version")[2])["rev"]}
    for mount in ("v1/Version", "v0/Version", "Version", "v0/Worker.Version"):
        status, _, answer = over_tcp(f"{base}/{mount}?json")
        assert (status, json.loads(answer)) == (200, version), mount
    assert json.loads(over_tcp(f"{base}/v1/Health", method="GET")[2]) == {
        "healthy": True,
        "unhealthy": [],
        "error": "",
    }
    assert json.loads(over_tcp(f"{base}/v1/GetKey")[2]) == {"error": "Service not found: GetKey"}


def test_body_over_the_limit_is_413(client: Client) -> None:
    status, error = client.refusal("/v1/Attest?json", {"report_data": "00" * (6 * 1024 * 1024)})
    assert (status, error) == (413, "failed to read data: payload too large")


def test_frozen_methods_answer_as_in_0_6(client: Client) -> None:
    assert client.refusal("/EmitEvent", {"event": "mine", "payload": "00"}) == (400, EMIT_EVENT_REMOVED)
    status, _, quote = over_socket(client.sock, "/GetQuote", {"report_data": "00"})
    assert (status, sorted(json.loads(quote))) == (200, ["event_log", "quote", "report_data", "vm_config"])


# ---- keys


def with_length(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


@pytest.mark.parametrize("domain", ["", "storage-encryption", "a/b/c"])
@pytest.mark.parametrize("algorithm", ["secp256k1", "ed25519"])
def test_key_and_both_links_of_its_chain_hold(stack: RunningStack, client: Client, domain: str, algorithm: str) -> None:
    answer = client.call("GetKey", {"domain": domain, "algorithm": algorithm})
    key, public_key = bytes.fromhex(answer["key"]), bytes.fromhex(answer["public_key"])
    if algorithm == "secp256k1":
        assert public_key == coincurve.PrivateKey(key).public_key.format()
    else:
        private = Ed25519PrivateKey.from_private_bytes(key)
        assert public_key == private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    claim = b"".join(map(with_length, (b"dstack-guest-v1-key-claim", algorithm.encode(), domain.encode(), public_key)))
    links = [bytes.fromhex(link) for link in answer["signature_chain"]]
    app_key = coincurve.PublicKey.from_signature_and_message(links[0], keccak(claim), hasher=None).format()
    app_id = bytes.fromhex(stack.description["app"]["app_id"])
    root = coincurve.PublicKey.from_signature_and_message(
        links[1], keccak(b"dstack-kms-issued:" + app_id + app_key), hasher=None
    )
    assert root.format().hex() == stack.rpc("kms-src", "KMS.GetMeta")[1]["k256_pubkey"]


def test_keys_differ_by_domain_algorithm_and_version(client: Client) -> None:
    keys = {
        client.call("GetKey", {"domain": domain, "algorithm": algorithm})["key"]
        for domain in ("one", "two")
        for algorithm in ("secp256k1", "ed25519")
    }
    keys.add(json.loads(over_socket(client.sock, "/GetKey", {"path": "one"})[2])["key"])
    assert len(keys) == 5


def test_derivation_is_the_published_one() -> None:
    app_key = bytes.fromhex("1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b")
    info = b"".join(map(with_length, (b"dstack-guest-v1-key", b"secp256k1", b"wallet")))
    key = HKDF(hashes.SHA256(), 32, b"dstack-guest-v1", info).derive(app_key)
    assert key.hex() == "2580611f0f936abe59399a8ac4ed9964d0259bd34c88ea012ca42b32acbf9386"


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("", "algorithm is required, use `secp256k1` or `ed25519`"),
        ("k256", "unsupported algorithm `k256`, use `secp256k1` or `ed25519`"),
    ],
)
def test_other_algorithms_are_refused_by_name(client: Client, algorithm: str, words: str) -> None:
    assert client.refusal("/v1/GetKey", {"domain": "a", "algorithm": algorithm}) == (400, words)
    assert client.call("GetKey", {"domain": "a", "algorithm": "ed25519"})["key"]


# ---- evidence


@pytest.fixture(scope="module")
def intel_root(stack: RunningStack) -> bytes:
    """The emulated Intel's root certificate, in DER."""
    root = x509.load_pem_x509_certificate(Path(stack.description["root_ca"]).read_bytes())
    return root.public_bytes(Encoding.DER)


async def test_attestation_is_messagepack_v1_and_its_quote_holds(
    stack: RunningStack, client: Client, intel_root: bytes
) -> None:
    answer = client.call("Attest", {"report_data": "c0ffee", "include_boottime_gpu_evidence": True})
    assert answer["boottime_gpu_evidence"] == []
    document = msgpack.unpackb(bytes.fromhex(answer["attestation"]))
    assert (document["version"], document["platform"]["kind"], document["stack"]["kind"]) == (1, "tdx", "dstack")
    quote = bytes(document["platform"]["data"]["quote"])
    padded = bytes.fromhex("c0ffee").ljust(64, b"\0")
    assert quote[568:632] == bytes(document["stack"]["data"]["report_data"]) == padded
    collateral = await dcap_qvl.get_collateral(stack.services["pccs"], quote)
    verified = dcap_qvl.verify_with_root_ca(quote, collateral, intel_root, int(time.time()))
    assert verified.status == "UpToDate"
    status, _, verdict = over_tcp(f"{stack.services['verifier']}/verify", {"attestation": answer["attestation"]})
    assert (status, json.loads(verdict)["is_valid"]) == (200, True), verdict


def test_quote_binds_the_app_by_its_compose_hash(stack: RunningStack, client: Client) -> None:
    document = msgpack.unpackb(bytes.fromhex(client.call("Attest")["attestation"]))
    quote = bytes(document["platform"]["data"]["quote"])
    mr_config_id = quote[48 + 184 : 48 + 232]
    assert mr_config_id.hex() == "01" + stack.description["app"]["compose_hash"] + "00" * 15


def test_rtmr3_has_the_events_of_0_6(client: Client) -> None:
    document = msgpack.unpackb(bytes.fromhex(client.call("Attest")["attestation"]))
    events = [(event["event"], event["payload"]) for event in document["stack"]["data"]["runtime_events"]]
    assert [name for name, _ in events] == [
        "system-preparing",
        "app-id",
        "compose-hash",
        "gpu-policy-hash",
        "instance-id",
        "boot-mr-done",
        "os-image-hash",
        "key-provider",
        "storage-fs",
        "system-ready",
    ]


def test_report_data_of_more_than_64_bytes_is_refused(client: Client) -> None:
    assert client.refusal("/v1/Attest", {"report_data": "00" * 65}) == (400, "report data is too long")
    assert client.call("Attest", {"report_data": "00" * 64})["attestation"]


def test_gpu_evidence_is_not_available(client: Client) -> None:
    assert client.refusal("/v1/AttestGpu", {"nonce": "00"}) == (
        400,
        "GPU attestation failed: nonce must be exactly 32 bytes, got 1",
    )
    assert client.refusal("/v1/AttestGpu", {"nonce": "00" * 32}) == (
        501,
        "GPU attestation failed: GPU attestation is not available in this image",
    )


def test_certificate_leads_to_the_kms_and_carries_v1_evidence(stack: RunningStack, client: Client) -> None:
    answer = client.call(
        "IssueCert",
        {"subject": "shop", "alt_names": ["shop.example.test"], "usage_ra_tls": True, "usage_server_auth": True},
    )
    leaf, app_ca, root = (x509.load_pem_x509_certificate(pem.encode()) for pem in answer["certificate_chain"])
    leaf.verify_directly_issued_by(app_ca)
    app_ca.verify_directly_issued_by(root)
    assert root.fingerprint(hashes.SHA256()) == x509.load_pem_x509_certificate(
        Path(stack.description["kms_ca"]).read_bytes()
    ).fingerprint(hashes.SHA256())
    key = load_pem_private_key(answer["key"].encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == leaf.public_key()
    (evidence,) = (e for e in leaf.extensions if e.oid.dotted_string == "1.3.6.1.4.1.62397.1.8")
    assert isinstance(evidence.value, x509.UnrecognizedExtension)
    assert b"platform" in evidence.value.value
    assert b"runtime_events" in evidence.value.value


def test_certificate_that_ends_before_it_begins_is_refused(client: Client) -> None:
    request = {"subject": "shop", "not_before": 2_000_000_000, "not_after": 1_900_000_000}
    assert client.refusal("/v1/IssueCert", request) == (400, "not_before must be earlier than not_after")
    assert client.call("IssueCert", {**request, "not_after": 2_100_000_000})["certificate_chain"]


def test_info_has_the_identity_of_the_app(stack: RunningStack, client: Client) -> None:
    info, app = client.call("Info"), stack.description["app"]
    sizes = {"app_id": 20, "compose_hash": 32, "instance_id": 20, "device_id": 32, "os_image_hash": 32}
    assert {name: len(bytes.fromhex(info[name])) for name in sizes} == sizes
    assert {name: info[name] for name in ("app_id", "instance_id", "compose_hash")} == {
        name: app[name] for name in ("app_id", "instance_id", "compose_hash")
    }
    assert json.loads(info["app_compose"])["name"] == info["app_name"] == "app"
    assert json.loads(info["vm_config"])
    assert json.loads(info["key_provider_info"])["name"] == "kms"


def test_grpc_has_the_same_services_by_reflection(stack: RunningStack, client: Client) -> None:
    with reflected(stack.description["grpc"]["app-grpc"]) as agent:
        assert {"dstack.guest.v1.DstackGuest", "dstack.guest.v1.Worker"} <= agent.services()
        assert agent.methods("dstack.guest.v1.DstackGuest") == set(V1_METHODS)
        answer = agent.call("dstack.guest.v1.DstackGuest/GetKey", domain="wallet", algorithm="ed25519")
        assert answer.value == client.call("GetKey", {"domain": "wallet", "algorithm": "ed25519"})
        refusal = agent.call("dstack.guest.v1.DstackGuest/AttestGpu", nonce="00" * 32)
        assert refusal.code == "UNIMPLEMENTED"
