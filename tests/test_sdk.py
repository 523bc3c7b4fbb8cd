"""The published Python SDK, unmodified, before the app of a ready stack of each release: over its sockets and over TCP.

What the SDK gets is checked with what its users check with: dcap-qvl, eth-keys, openssl.
"""

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import dcap_qvl
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from dstack_sdk import (
    AsyncDstackClient,
    AsyncTappdClient,
    DstackClient,
    EnvVar,
    GetQuoteResponse,
    TappdClient,
    encrypt_env_vars_sync,
    verify_env_encrypt_public_key,
    verify_env_encrypt_public_key_legacy,
)
from dstack_sdk.dstack_client import TcbInfoV05x
from eth_keys.datatypes import PrivateKey, Signature
from eth_utils.crypto import keccak

from tests import foreign
from tests.foreign import Guest
from tests.running import RunningStack

ZERO = "00" * 48

_IDENTITY = ["system-preparing", "app-id", "compose-hash"]
_INSTANCE, _KEYS = ["instance-id", "boot-mr-done"], ["os-image-hash", "key-provider", "storage-fs", "system-ready"]
EVENTS = {
    "0.5": [*_IDENTITY, *_INSTANCE, "mr-kms", *_KEYS],
    "0.6": [*_IDENTITY, "gpu-policy-hash", *_INSTANCE, *_KEYS],
}
"""What a guest of each release measures into RTMR3."""


@pytest.fixture(scope="module")
def ready_stack(each_ready_stack: RunningStack) -> RunningStack:
    """A stack of each release: the SDK is older than both, and works with both."""
    return each_ready_stack


@pytest.fixture(scope="module", params=["unix socket", "tcp"])
def endpoint(request: pytest.FixtureRequest, ready_stack: RunningStack) -> str:
    """Where the app's agent answers DstackGuest."""
    socket: str = ready_stack.description["app"]["dstack_sock"]
    return socket if request.param == "unix socket" else ready_stack.services["app"]


@pytest.fixture(scope="module", params=["unix socket", "tcp"])
def tappd_endpoint(request: pytest.FixtureRequest, ready_stack: RunningStack) -> str:
    """Where the app's agent answers Tappd."""
    socket: str = ready_stack.description["app"]["tappd_sock"]
    return socket if request.param == "unix socket" else ready_stack.services["app"]


@pytest.fixture(scope="module")
def client(endpoint: str) -> Iterator[DstackClient]:
    """The SDK's client."""
    client = DstackClient(endpoint)
    with client:  # whose `as` would be the asynchronous client inside it
        yield client


@pytest.fixture(scope="module")
def tappd(tappd_endpoint: str) -> Iterator[TappdClient]:
    """The SDK's client of the old interface."""
    with pytest.deprecated_call():
        client = TappdClient(tappd_endpoint)
    with client:
        yield client


@pytest.fixture(scope="module")
def k256_root(ready_stack: RunningStack) -> str:
    """The KMS's root key (compressed, hex), as GetMeta says it."""
    with foreign.kms(ready_stack.services["kms-src"]) as connection:
        return str(connection.call("GetMeta").value["k256_pubkey"])


@pytest.fixture(scope="module")
def intel_root(ready_stack: RunningStack) -> bytes:
    """The emulated root of quotes, DER."""
    pem = Path(ready_stack.description["root_ca"]).read_bytes()
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def quoted_rtmrs(quote: GetQuoteResponse) -> dict[int, str]:
    """The four registers in a quote (version 4: at 376, 48 bytes each)."""
    data = quote.decode_quote()
    return {index: data[376 + 48 * index : 424 + 48 * index].hex() for index in range(4)}


# ---- identity


def test_info_names_the_app_and_what_it_measures(ready_stack: RunningStack, client: DstackClient) -> None:
    info, app = client.info(), ready_stack.description["app"]
    for name in ("app_id", "instance_id", "compose_hash"):
        assert getattr(info, name) == app[name]
    tcb = info.tcb_info
    assert isinstance(tcb, TcbInfoV05x)
    assert hashlib.sha256(tcb.app_compose.encode()).hexdigest() == info.compose_hash
    assert info.app_name == json.loads(tcb.app_compose)["name"] == "app"
    for name in ("device_id", "os_image_hash", "compose_hash", "mr_aggregated"):
        assert getattr(tcb, name) == getattr(info, name)
    assert len(bytes.fromhex(info.device_id)) == 32
    assert info.os_image_hash == ready_stack.description["kms"]["src"]["os_image_hash"]
    assert json.loads(info.vm_config)["os_image_hash"] == info.os_image_hash
    root = x509.load_pem_x509_certificate(Path(ready_stack.description["kms_ca"]).read_bytes())
    spki = root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert json.loads(info.key_provider_info) == {"name": "kms", "id": spki.hex()}
    assert info.app_cert.count("-----BEGIN CERTIFICATE-----") == 3
    assert client.is_reachable()
    assert client.version().version


def test_info_agrees_with_the_quote_and_the_log(client: DstackClient) -> None:
    tcb, quote = client.info().tcb_info, client.get_quote(b"any")
    assert {0: tcb.rtmr0, 1: tcb.rtmr1, 2: tcb.rtmr2, 3: tcb.rtmr3} == quoted_rtmrs(quote)
    assert tcb.mrtd == quote.decode_quote()[184:232].hex()
    assert [event.model_dump() for event in tcb.event_log] == [e.model_dump() for e in quote.decode_event_log()]


# ---- evidence


def require_event_refused(client: DstackClient, event: str, payload: str | bytes) -> None:
    """Emit an event that release 0.6 refuses, and compare the registers before and after."""
    before = quoted_rtmrs(client.get_quote(b"before"))
    with pytest.raises(httpx.HTTPStatusError, match="400") as refusal:
        client.emit_event(event, payload)
    removed = (
        "EmitEvent was removed in dstack 0.6.0; runtime RTMR3 events are system-owned and cannot be extended by apps"
    )
    assert json.loads(refusal.value.response.text) == {"error": removed}
    assert quoted_rtmrs(client.get_quote(b"after")) == before


@pytest.mark.parametrize("report_data", ["text", b"bytes", b"\0", bytes(range(64))])
async def test_quote_holds_and_replays(
    ready_stack: RunningStack, client: DstackClient, intel_root: bytes, report_data: str | bytes
) -> None:
    quote = client.get_quote(report_data)
    padded = (report_data.encode() if isinstance(report_data, str) else report_data).ljust(64, b"\0")
    assert quote.decode_quote()[568:632] == padded
    assert quote.report_data == padded.hex()
    rtmrs = quote.replay_rtmrs()
    assert rtmrs == quoted_rtmrs(quote)
    assert ZERO not in rtmrs.values()
    events = [event.event for event in quote.decode_event_log() if event.imr == 3]
    assert events[: len(EVENTS[ready_stack.release.name])] == EVENTS[ready_stack.release.name]
    collateral = await dcap_qvl.get_collateral(ready_stack.services["pccs"], quote.decode_quote())
    verified = dcap_qvl.verify_with_root_ca(quote.decode_quote(), collateral, intel_root, int(time.time()))
    assert verified.status == "UpToDate"


def test_attestation_has_the_quote_in_it(client: DstackClient) -> None:
    attestation = client.attest("attested").decode_attestation()
    _, quote = foreign.quote_of(attestation)
    assert quote[568:632] == b"attested".ljust(64, b"\0")


def test_emitted_event_extends_rtmr3_in_0_5_and_is_refused_in_0_6(
    ready_stack: RunningStack, client: DstackClient
) -> None:
    if ready_stack.release.emit_event_removed:
        require_event_refused(client, "deployed", "version 2")
        return
    before = client.get_quote(b"before")
    client.emit_event("deployed", "version 2")
    after = client.get_quote(b"after")
    digest = hashlib.sha384((0x08000001).to_bytes(4, "little") + b":deployed:version 2").digest()
    expected = hashlib.sha384(bytes.fromhex(before.replay_rtmrs()[3]) + digest).hexdigest()
    assert after.replay_rtmrs() == quoted_rtmrs(after) == {**before.replay_rtmrs(), 3: expected}
    last = after.decode_event_log()[-1]
    assert (last.imr, last.event, bytes.fromhex(last.event_payload)) == (3, "deployed", b"version 2")
    assert client.info().tcb_info.rtmr3 == expected


def test_app_still_gets_certificates_after_an_event(ready_stack: RunningStack, client: DstackClient) -> None:
    if ready_stack.release.emit_event_removed:
        require_event_refused(client, "another", b"")
    else:
        client.emit_event("another", b"")
    assert len(client.get_tls_key(subject="after", usage_ra_tls=True).certificate_chain) == 3


def test_evidence_that_cannot_be_given_is_refused(client: DstackClient) -> None:
    with pytest.raises(ValueError, match="less than 64 bytes"):
        client.get_quote(bytes(65))
    with pytest.raises(ValueError, match="event name cannot be empty"):
        client.emit_event("", b"")


# ---- keys


def require_chain(stack: RunningStack, k256_root: str, chain: list[bytes], message: str) -> None:
    """Follow a signature chain: the key, by the app's key, by the KMS's root key."""
    app_key = Signature(chain[0]).recover_public_key_from_msg_hash(keccak(message.encode())).to_compressed_bytes()
    issued = b"dstack-kms-issued:" + bytes.fromhex(stack.description["app"]["app_id"]) + app_key
    root = Signature(chain[1]).recover_public_key_from_msg_hash(keccak(issued))
    assert root.to_compressed_bytes().hex() == k256_root


@pytest.mark.parametrize("algorithm", ["secp256k1", "ed25519"])
def test_key_is_stable_and_leads_to_the_kms_root(
    ready_stack: RunningStack, client: DstackClient, k256_root: str, algorithm: str
) -> None:
    key = client.get_key("path/to/key", "purpose", algorithm)
    secret = key.decode_key()
    assert len(secret) == 32
    if algorithm == "ed25519":
        public = Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    else:
        public = PrivateKey(secret).public_key.to_compressed_bytes()
    require_chain(ready_stack, k256_root, key.decode_signature_chain(), f"purpose:{public.hex()}")
    assert client.get_key("path/to/key", "purpose", algorithm) == key
    other = client.get_key("path/to/key", "another purpose", algorithm)
    assert other.decode_key() == secret
    assert other.signature_chain[0] != key.signature_chain[0]
    assert client.get_key("another path", "purpose", algorithm).decode_key() != secret


def test_key_of_an_unknown_algorithm_is_refused(client: DstackClient) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="400") as refusal:
        client.get_key("path", "purpose", "rsa")
    assert json.loads(refusal.value.response.text) == {"error": "Unsupported algorithm"}
    assert client.get_key("path", "purpose", "k256") == client.get_key("path", "purpose")


@pytest.mark.parametrize("algorithm", ["secp256k1", "ed25519", "secp256k1_prehashed"])
def test_signature_verifies_and_leads_to_the_kms_root(
    ready_stack: RunningStack, client: DstackClient, k256_root: str, algorithm: str
) -> None:
    data = hashlib.sha256(b"message").digest()
    signed = client.sign(algorithm, data)
    signature, public = signed.decode_signature(), signed.decode_public_key()
    assert client.verify(algorithm, data, signature, public).valid
    assert not client.verify(algorithm, bytes(32), signature, public).valid
    if algorithm == "ed25519":
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    else:
        hashed = data if algorithm.endswith("prehashed") else hashlib.sha256(data).digest()
        candidates = [Signature(signature[:64] + bytes([v])).recover_public_key_from_msg_hash(hashed) for v in (0, 1)]
        assert public in [candidate.to_compressed_bytes() for candidate in candidates]
    assert signed.signature_chain[0] == signed.signature
    require_chain(ready_stack, k256_root, signed.decode_signature_chain()[1:], f"signing:{public.hex()}")


# ---- certificates


def verify_chain(stack: RunningStack, chain: list[str], folder: Path, *arguments: str) -> str:
    """What `openssl verify` says of a leaf, its intermediates given, under the root that the KMS has in its folder."""
    leaf, intermediates = folder / "leaf.pem", folder / "intermediates.pem"
    leaf.write_text(chain[0])
    intermediates.write_text("\n".join(chain[1:]))
    trust = ["-CAfile", stack.description["kms_ca"], "-untrusted", str(intermediates)]
    command = ["openssl", "verify", *trust, *arguments, str(leaf)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return run.stdout + run.stderr


def test_tls_key_has_a_certificate_under_the_kms_root(
    ready_stack: RunningStack, client: DstackClient, tmp_path: Path
) -> None:
    names = ["app.example.test", "10.1.2.3"]
    answer = client.get_tls_key(subject="app.example.test", alt_names=names, usage_client_auth=True)
    chain = answer.certificate_chain
    assert verify_chain(ready_stack, chain, tmp_path, "-verify_hostname", names[0]).endswith("leaf.pem: OK\n")
    assert verify_chain(ready_stack, chain, tmp_path, "-verify_ip", names[1]).endswith("leaf.pem: OK\n")
    for purpose in ("sslserver", "sslclient"):
        assert verify_chain(ready_stack, chain, tmp_path, "-purpose", purpose).endswith("leaf.pem: OK\n")
    assert "hostname mismatch" in verify_chain(ready_stack, chain, tmp_path, "-verify_hostname", "other.test")
    key, leaf = load_pem_private_key(answer.key.encode(), None), x509.load_pem_x509_certificate(chain[0].encode())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert leaf.public_key() == key.public_key()
    assert client.get_tls_key(subject="app.example.test").key != answer.key
    assert x509.load_pem_x509_certificate(chain[2].encode()).subject.rfc4514_string() == "CN=Dstack KMS CA,O=Dstack"


def test_tls_key_is_for_servers_alone_unless_asked(
    ready_stack: RunningStack, client: DstackClient, tmp_path: Path
) -> None:
    chain = client.get_tls_key(subject="server").certificate_chain
    assert verify_chain(ready_stack, chain, tmp_path, "-purpose", "sslserver").endswith("leaf.pem: OK\n")
    assert "certificate purpose" in verify_chain(ready_stack, chain, tmp_path, "-purpose", "sslclient")


def test_tls_key_carries_evidence_that_is_bound_to_it(client: DstackClient) -> None:
    plain = x509.load_pem_x509_certificate(client.get_tls_key(subject="app").certificate_chain[0].encode())
    with pytest.raises(x509.ExtensionNotFound):
        plain.extensions.get_extension_for_oid(foreign.OID_ATTESTATION)
    answer = client.get_tls_key(subject="app", usage_ra_tls=True)
    leaf = x509.load_pem_x509_certificate(answer.certificate_chain[0].encode())
    evidence = leaf.extensions.get_extension_for_oid(foreign.OID_ATTESTATION).value
    assert isinstance(evidence, x509.UnrecognizedExtension)
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert foreign.binding_of(spki) in evidence.value


def test_tls_key_is_valid_when_it_was_asked_to_be(client: DstackClient) -> None:
    begin, end = 1_800_000_000, 1_900_000_000
    answer = client.get_tls_key(subject="app", not_before=begin, not_after=end, with_app_info=True)
    leaf = x509.load_pem_x509_certificate(answer.certificate_chain[0].encode())
    assert (leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()) == (begin, end)
    assert leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.9"))
    with pytest.raises(httpx.HTTPStatusError, match="400") as refusal:
        client.get_tls_key(subject="app", not_before=end, not_after=begin)
    assert "not_before must be earlier than not_after" in refusal.value.response.text


def test_calls_and_members_that_0_6_no_longer_has(ready_stack: RunningStack) -> None:
    app, is_0_5 = ready_stack.services["app"], ready_stack.release.name == "0.5"
    assert httpx.post(f"{app}/GpuInfo", json={}).status_code == (200 if is_0_5 else 404)
    quote = httpx.post(f"{app}/GetQuote", json={"report_data": "00"}).json()
    assert ("attestation" in quote) is is_0_5


# ---- secrets for the app, from whoever deploys it


def test_environment_encrypted_with_the_sdk_opens_with_the_released_key(
    ready_stack: RunningStack, k256_root: str
) -> None:
    app_id = ready_stack.description["app"]["app_id"]
    with foreign.kms(ready_stack.services["kms-dst"]) as connection:
        answer = connection.call("GetAppEnvEncryptPubKey", app_id=app_id).value
    public, signature = bytes.fromhex(answer["public_key"]), bytes.fromhex(answer["signature_v1"])
    signer = verify_env_encrypt_public_key(public, signature, app_id, answer["timestamp"])
    assert signer == f"0x{k256_root}"
    with pytest.deprecated_call():
        signer = verify_env_encrypt_public_key_legacy(public, bytes.fromhex(answer["signature"]), app_id)
    assert signer == f"0x{k256_root}"

    sealed = bytes.fromhex(encrypt_env_vars_sync([EnvVar("TOKEN", "secret")], answer["public_key"]))
    released = Guest.of(ready_stack.services["kms-src"], ready_stack.services["app"]).get_app_key().value
    ours = X25519PrivateKey.from_private_bytes(bytes.fromhex(released["env_crypt_key"]))
    shared = ours.exchange(X25519PublicKey.from_public_bytes(sealed[:32]))
    opened = AESGCM(shared).decrypt(sealed[32:44], sealed[44:], None)
    assert json.loads(opened) == {"env": [{"key": "TOKEN", "value": "secret"}]}


# ---- the old interface


def test_tappd_info_and_keys(ready_stack: RunningStack, tappd: TappdClient, tmp_path: Path) -> None:
    assert tappd.info().app_id == ready_stack.description["app"]["app_id"]
    with pytest.deprecated_call():
        first, second = tappd.derive_key("path", "subject"), tappd.derive_key("path")
    assert first.key == second.key
    key = load_pem_private_key(first.key.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    assert key.private_numbers().private_value.to_bytes(32, "big") in first.as_uint8array()
    assert verify_chain(ready_stack, first.certificate_chain, tmp_path).endswith("leaf.pem: OK\n")
    leaf = x509.load_pem_x509_certificate(first.certificate_chain[0].encode())
    assert leaf.subject.rfc4514_string() == "CN=subject"


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512", "sha3-256", "sha3-384", "sha3-512"])
def test_tappd_quote_hashes_its_content(tappd: TappdClient, algorithm: str) -> None:
    with pytest.deprecated_call():
        quote = tappd.tdx_quote(b"content", algorithm)
    digest = hashlib.new(algorithm.replace("sha3-", "sha3_"), b"app-data:content").digest()
    assert quote.decode_quote()[568:632] == digest.ljust(64, b"\0")
    assert quote.replay_rtmrs() == quoted_rtmrs(quote)


def test_tappd_quote_raw(tappd: TappdClient) -> None:
    with pytest.deprecated_call():
        quote = tappd.tdx_quote(bytes(range(64)), "raw")
    assert quote.decode_quote()[568:632] == bytes(range(64))


# ---- how the SDK finds the agent


def test_sdk_finds_the_agent_by_the_printed_environment(
    ready_stack: RunningStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ready_stack.description["env"].items():
        monkeypatch.setenv(name, value)
    app_id = ready_stack.description["app"]["app_id"]
    client = DstackClient()
    with client:
        assert client.info().app_id == app_id
    with pytest.deprecated_call():
        old = TappdClient()
    with old:
        assert old.info().app_id == app_id


async def test_async_clients_get_the_same(ready_stack: RunningStack, client: DstackClient, endpoint: str) -> None:
    async with AsyncDstackClient(endpoint) as same:
        info, key, quote = await same.info(), await same.get_key("path", "purpose"), await same.get_quote(b"async")
    assert info.app_id == ready_stack.description["app"]["app_id"]
    assert key == client.get_key("path", "purpose")
    assert quote.replay_rtmrs() == quoted_rtmrs(quote)


async def test_async_tappd_client_gets_the_same(ready_stack: RunningStack, tappd_endpoint: str) -> None:
    with pytest.deprecated_call():
        client = AsyncTappdClient(tappd_endpoint)
    async with client:
        assert (await client.info()).app_id == ready_stack.description["app"]["app_id"]
