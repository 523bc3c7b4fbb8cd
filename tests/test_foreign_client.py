"""Keys for a client that has nothing of ours, and every refusal on the way, in the protocol's words.

The client is `tests.foreign`; what the keys must be is computed here once more, from the root keys in the state folder.
"""

import hashlib
import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from coincurve import PrivateKey, PublicKey
from Crypto.Hash import keccak
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from tests import foreign
from tests.foreign import Guest
from tests.running import RunningStack

Policy = dict[str, Any]

# ---- the derivations of the protocol, written down a second time


def hkdf(secret: bytes, *context: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 under dstack's salt."""
    return HKDF(hashes.SHA256(), 32, b"RATLS", b"".join(context)).derive(secret)


def dh_secret(scalar: int, *context: bytes) -> bytes:
    """SHA-256 of a derived P-256 key's PKCS#8 DER."""
    child = ec.derive_private_key(int.from_bytes(hkdf(scalar.to_bytes(32, "big"), *context), "big"), ec.SECP256R1())
    return hashlib.sha256(child.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())).digest()


def keccak256(data: bytes) -> bytes:
    """Ethereum's hash."""
    return bytes(keccak.new(digest_bits=256, data=data).digest())


def recovered(signature: str, message: bytes) -> str:
    """Compressed public key (hex) that made a 65-byte recoverable signature."""
    key = PublicKey.from_signature_and_message(bytes.fromhex(signature), keccak256(message), hasher=None)
    return key.format().hex()


class RootKeys:
    """The root keys of a KMS, read from its folder."""

    def __init__(self, folder: Path) -> None:
        key = load_pem_private_key((folder / "root-ca.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.scalar = key.private_numbers().private_value
        self.k256 = (folder / "root-k256.key").read_bytes()

    def app_keys(self, app_id: bytes, instance_id: bytes) -> dict[str, str]:
        """What GetAppKey must answer for one instance."""
        return {
            "disk_crypt_key": dh_secret(self.scalar, app_id, instance_id, b"app-disk-crypt-key").hex(),
            "env_crypt_key": dh_secret(self.scalar, app_id, b"env-encrypt-key").hex(),
            "k256_key": hkdf(self.k256, app_id, b"app-key").hex(),
        }


def test_own_derivation_agrees_with_the_published_vector() -> None:
    scalar = 0xF57527CEA4AB7FFB49AF99B158CDC0E3EC06398F528349EA236B7D2AFE19CEC1
    expected = "663afd58820be8ad645f9c035e93199d114ab16f738db62393bc1d7d623e8813"
    assert dh_secret(scalar, b"context one", b"context two").hex() == expected


@pytest.fixture(scope="module")
def ready_stack(each_ready_stack: RunningStack) -> RunningStack:
    """A stack of each release."""
    return each_ready_stack


@pytest.fixture
def guest(ready_stack: RunningStack) -> Guest:
    """A guest with the app's agent, before the source KMS."""
    return Guest.of(ready_stack.services["kms-src"], ready_stack.description["app"]["dstack_sock"])


def root_keys(stack: RunningStack, side: str) -> RootKeys:
    return RootKeys(Path(stack.description["state"], f"kms-{side}", "certs"))


def of_app(stack: RunningStack, policy: Policy) -> dict[str, Any]:
    """The app's entry in a policy."""
    entry: dict[str, Any] = policy["apps"][f"0x{stack.description['app']['app_id']}"]
    return entry


# ---- keys


@pytest.mark.parametrize("over", ["unix socket", "tcp"])
def test_app_keys_are_released_to_a_foreign_client(ready_stack: RunningStack, over: str) -> None:
    app = ready_stack.description["app"]
    agent = app["dstack_sock"] if over == "unix socket" else ready_stack.services["app"]
    guest = Guest.of(ready_stack.services["kms-src"], agent)
    answer = guest.get_app_key().value
    expected = root_keys(ready_stack, "src").app_keys(bytes.fromhex(app["app_id"]), bytes.fromhex(app["instance_id"]))
    assert {name: answer[name] for name in expected} == expected
    assert answer["os_image_hash"] == ready_stack.description["kms"]["src"]["os_image_hash"]
    assert (answer["gateway_app_id"], answer["tproxy_app_id"]) == ("any", "any")
    assert answer["ca_cert"] == guest.root_ca == Path(ready_stack.description["kms_ca"]).read_text()


def test_app_keys_are_the_same_for_every_form_of_evidence(ready_stack: RunningStack, guest: Guest) -> None:
    """v0's Attest gives V0; GetQuote of 0.5 or v1's Attest gives V1; GetQuote the two extensions of old releases."""
    key = foreign.new_key()
    request = {"report_data": foreign.binding_of(foreign.spki_of(key)).hex()}
    answer = foreign.ask_agent(guest.agent, "GetQuote", request)
    quote, log = bytes.fromhex(answer["quote"]), answer["event_log"].encode()
    if ready_stack.release.guest_api_v1:
        assert "attestation" not in answer
        v1 = bytes.fromhex(foreign.ask_agent(guest.agent, "v1/Attest", request)["attestation"])
    else:
        v1 = bytes.fromhex(answer["attestation"])
    forms = {
        "v0": guest.get_app_key(),
        "v1": guest.get_app_key(guest.temp_ca.issue(key, v1)),
        "legacy": guest.get_app_key(
            guest.temp_ca.issue_with(key, {foreign.OID_QUOTE: quote, foreign.OID_EVENT_LOG: log}),
            vm_config=answer["vm_config"],
        ),
    }
    assert v1[0] >= 0x80
    assert {form: given.value for form, given in forms.items()} == dict.fromkeys(forms, forms["v0"].value)


def test_app_keys_of_another_app_are_its_own(ready_stack: RunningStack) -> None:
    guest = Guest.of(ready_stack.services["kms-src"], ready_stack.services["agent-dst"])
    info = foreign.ask_agent(guest.agent, "Info")
    assert guest.get_app_key().error == "App not allowed: Boot denied: app not registered"

    def register(policy: Policy) -> None:
        policy["apps"][f"0x{info['app_id']}"] = {"composeHashes": [f"0x{info['compose_hash']}"], "allowAnyDevice": True}

    with ready_stack.policy_changed("src", register):
        answer = guest.get_app_key().value
    keys = root_keys(ready_stack, "src")
    expected = keys.app_keys(bytes.fromhex(info["app_id"]), bytes.fromhex(info["instance_id"]))
    assert {name: answer[name] for name in expected} == expected
    app = ready_stack.description["app"]
    of_the_app = keys.app_keys(bytes.fromhex(app["app_id"]), bytes.fromhex(app["instance_id"]))
    assert not set(of_the_app.values()) & set(expected.values())


def test_k256_signature_recovers_the_root_key_of_getmeta(ready_stack: RunningStack, guest: Guest) -> None:
    answer = guest.get_app_key().value
    app_key = PrivateKey(bytes.fromhex(answer["k256_key"])).public_key.format()
    message = b"dstack-kms-issued:" + bytes.fromhex(ready_stack.description["app"]["app_id"]) + app_key
    with foreign.kms(guest.kms_url) as connection:
        meta = connection.call("GetMeta").value
    assert recovered(answer["k256_signature"], message) == meta["k256_pubkey"]
    assert meta["k256_pubkey"] == PrivateKey(root_keys(ready_stack, "src").k256).public_key.format().hex()


def test_app_keys_are_the_same_from_both_kms(ready_stack: RunningStack, guest: Guest) -> None:
    onboarded = Guest.of(ready_stack.services["kms-dst"], guest.agent)
    names = ("disk_crypt_key", "env_crypt_key", "k256_key", "k256_signature")
    answers = [asked.get_app_key().value for asked in (guest, onboarded, guest.at(onboarded.kms_url))]
    assert {name: answers[0][name] for name in names} == {name: answers[1][name] for name in names}
    assert {name: answers[0][name] for name in names} == {name: answers[2][name] for name in names}


def test_env_encrypt_key_is_the_public_half_of_the_released_one(ready_stack: RunningStack, guest: Guest) -> None:
    released = bytes.fromhex(guest.get_app_key().value["env_crypt_key"])
    app_id = bytes.fromhex(ready_stack.description["app"]["app_id"])
    with foreign.kms(guest.kms_url) as connection:
        answer = connection.call("GetAppEnvEncryptPubKey", app_id=app_id.hex()).value
        root = connection.call("GetMeta").value["k256_pubkey"]
        assert connection.call("GetAppEnvEncryptPubKey", app_id="00").error == "app_id must be 20 bytes"
    public = bytes.fromhex(answer["public_key"])
    assert public == X25519PrivateKey.from_private_bytes(released).public_key().public_bytes_raw()
    prefix, dated = b"dstack-env-encrypt-pubkey:", answer["timestamp"].to_bytes(8, "big")
    assert recovered(answer["signature"], prefix + app_id + public) == root
    assert recovered(answer["signature_v1"], prefix + app_id + dated + public) == root


def test_root_keys_go_to_a_kms_and_to_no_app(ready_stack: RunningStack, guest: Guest) -> None:
    receiver = Guest.of(guest.kms_url, ready_stack.services["agent-dst"])
    with foreign.kms(guest.kms_url, identity=receiver.identity(), root_ca=guest.root_ca) as connection:
        answer = connection.call("GetKmsKey").value
    certs = Path(ready_stack.description["state"], "kms-src", "certs")
    assert answer["keys"] == [
        {"ca_key": (certs / "root-ca.key").read_text(), "k256_key": (certs / "root-k256.key").read_bytes().hex()}
    ]
    assert answer["temp_ca_key"] == (certs / "tmp-ca.key").read_text()
    with foreign.kms(guest.kms_url, identity=guest.identity(), root_ca=guest.root_ca) as connection:
        assert connection.call("GetKmsKey").error == "Boot denied: aggregated MR not allowed"
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        assert connection.call("GetKmsKey").error == "No attestation provided"


# ---- certificates


def test_certificate_is_signed_for_a_foreign_request(ready_stack: RunningStack, guest: Guest) -> None:
    key = foreign.new_key()
    request = foreign.signing_request(key, foreign.attest(guest.agent, foreign.spki_of(key)), "foreign.example.test")
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        chain = connection.call("SignCert", **request).value["certificate_chain"]
    leaf, app_ca, root = (x509.load_pem_x509_certificate(text.encode()) for text in chain)
    leaf.verify_directly_issued_by(app_ca)
    app_ca.verify_directly_issued_by(root)
    assert chain[2] == guest.root_ca
    assert foreign.spki_of(key) == leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["foreign.example.test"]
    app_id = bytes.fromhex(ready_stack.description["app"]["app_id"])
    oid = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.3")
    for certificate in (leaf, app_ca):
        extension = certificate.extensions.get_extension_for_oid(oid).value
        assert isinstance(extension, x509.UnrecognizedExtension)
        assert extension.value == foreign.der_octet_string(app_id)
    # The app CA's key is the one that anybody with the root key can derive.
    scalar = int.from_bytes(hkdf(root_keys(ready_stack, "src").scalar.to_bytes(32, "big"), app_id, b"app-ca"), "big")
    assert app_ca.public_key() == ec.derive_private_key(scalar, ec.SECP256R1()).public_key()


def test_certificate_is_refused_to_whom_the_policy_denies(ready_stack: RunningStack, guest: Guest) -> None:
    key, other = foreign.new_key(), foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    request = foreign.signing_request(key, evidence, "foreign.example.test")
    stolen = foreign.signing_request(other, evidence, "foreign.example.test")
    forged = {**request, "signature": stolen["signature"]}
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        with ready_stack.policy_changed("src", lambda policy: policy["apps"].clear()):
            assert connection.call("SignCert", **request).error == "Boot denied: app not registered"
        with ready_stack.policy_changed("src", lambda policy: policy["kms"].update(mrAggregated=[])):
            refusal = connection.call("SignCert", **request).error
            assert refusal == "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"
        assert connection.call("SignCert", **stolen).error == "Quote verification failed: report data mismatch"
        assert connection.call("SignCert", **forged).error.startswith("Failed to verify csr signature: ")
        assert connection.call("SignCert", **{**request, "api_version": 3}).error == "Unsupported API version: 3"
        assert connection.call("SignCert", **request).status == 200


# ---- refusals: what the client shows


def test_getappkey_refused_without_attestation(ready_stack: RunningStack, guest: Guest) -> None:
    without = "App not allowed: No attestation provided"
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        assert connection.call("GetAppKey", api_version=1).error == without
    bare = guest.temp_ca.issue(foreign.new_key(), None)
    if ready_stack.release.any_client_certificate_issuer:
        with pytest.raises(ssl.SSLError, match="ALERT_HANDSHAKE_FAILURE"):
            guest.get_app_key(bare)
    else:
        assert guest.get_app_key(bare).error == without
    assert guest.get_app_key().status == 200


def test_every_rpc_refused_with_the_attestation_of_another_key(guest: Guest) -> None:
    mismatch = "invalid quote: report data mismatch"
    evidence = foreign.attest(guest.agent, foreign.spki_of(foreign.new_key()))
    thief = guest.temp_ca.issue(foreign.new_key(), evidence)
    with foreign.kms(guest.kms_url, identity=thief, root_ca=guest.root_ca) as connection:
        assert connection.call("GetAppKey", api_version=1).error == mismatch
        used = connection.socket
        assert connection.call("GetMeta").error == mismatch
        assert connection.call("NoSuchMethod").error == mismatch
        assert connection.get("/health").status == 200
        assert connection.socket is used
    assert guest.get_app_key().status == 200


SIGNED = {
    "header, PCE version": (10, "ISV enclave report signature is invalid"),
    "header, QE vendor": (12, "Unknown QE vendor ID"),
    "header, user data": (28, "ISV enclave report signature is invalid"),
    "tee_tcb_svn": (48, "ISV enclave report signature is invalid"),
    "mr_seam": (64, "ISV enclave report signature is invalid"),
    "td_attributes, debug": (168, "ISV enclave report signature is invalid"),
    "mr_td": (184, "ISV enclave report signature is invalid"),
    "mr_config_id": (232, "ISV enclave report signature is invalid"),
    "rt_mr0": (376, "ISV enclave report signature is invalid"),
    "rt_mr3": (520, "ISV enclave report signature is invalid"),
    "report_data": (568, "ISV enclave report signature is invalid"),
    "report_data, last byte": (631, "ISV enclave report signature is invalid"),
    "signature": (636, "ISV enclave report signature is invalid"),
    "attestation key": (700, "QE report hash mismatch"),
    "QE report, cpusvn": (770, "Signature is invalid for qe_report in quote"),
    "QE report, report_data": (770 + 320, "Signature is invalid for qe_report in quote"),
    "QE report signature": (1154, "Signature is invalid for qe_report in quote"),
    "QE authentication data": (1220, "QE report hash mismatch"),
}


@pytest.mark.parametrize("field", SIGNED)
def test_quote_refused_with_one_bit_changed(guest: Guest, field: str) -> None:
    offset, reason = SIGNED[field]
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    start, quote = foreign.quote_of(evidence)
    assert quote[1258:].startswith(b"-----BEGIN CERTIFICATE-----"), "the offsets are those of a v4 quote"
    changed = bytearray(evidence)
    changed[start + offset] ^= 1
    refusal = guest.get_app_key(guest.temp_ca.issue(key, bytes(changed))).error
    assert refusal == f"invalid quote: failed to verify TDX quote: {reason}"
    assert guest.get_app_key(guest.temp_ca.issue(key, evidence)).status == 200


def test_quote_refused_with_a_platform_certificate_that_nobody_signed(guest: Guest) -> None:
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    chain = evidence[evidence.index(b"-----BEGIN CERTIFICATE-----") :]
    pck = chain[: chain.index(b"-----BEGIN CERTIFICATE-----", 1)]
    der = bytearray(x509.load_pem_x509_certificate(pck).public_bytes(Encoding.DER))
    der[-1] ^= 1  # the end of its signature
    changed = x509.load_der_x509_certificate(bytes(der)).public_bytes(Encoding.PEM)
    assert len(changed) == len(pck)
    refusal = guest.get_app_key(guest.temp_ca.issue(key, evidence.replace(pck, changed))).error
    reason = "Failed to verify certificate chain: InvalidSignatureForPublicKey"
    assert refusal == f"invalid quote: failed to verify TDX quote: {reason}"
    assert guest.get_app_key(guest.temp_ca.issue(key, evidence)).status == 200


def test_getappkey_refused_with_another_runtime_event(ready_stack: RunningStack, guest: Guest) -> None:
    compose_hash = bytes.fromhex(ready_stack.description["app"]["compose_hash"])
    lie = bytes(32)
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    head, found, tail = evidence.rpartition(compose_hash)  # its last place is among the runtime events
    assert found
    assert compose_hash in head
    log = json.loads(foreign.ask_agent(guest.agent, "GetQuote", {"report_data": "00"})["event_log"])
    digests = {line["event"]: bytes.fromhex(line["digest"]) for line in log if line["imr"] == 3}
    assert digests["compose-hash"] == event_digest("compose-hash", compose_hash)
    quoted, replayed = fold(digests), fold({**digests, "compose-hash": event_digest("compose-hash", lie)})
    _, quote = foreign.quote_of(evidence)
    assert quote[520:568] == quoted
    refusal = guest.get_app_key(guest.temp_ca.issue(key, head + lie + tail)).error
    assert refusal == f"invalid quote: RTMR3 mismatch, quoted: {quoted.hex()}, replayed: {replayed.hex()}"
    assert guest.get_app_key(guest.temp_ca.issue(key, evidence)).status == 200


def event_digest(name: str, payload: bytes) -> bytes:
    """The digest of a runtime event."""
    return hashlib.sha384((0x08000001).to_bytes(4, "little") + b":" + name.encode() + b":" + payload).digest()


def fold(digests: dict[str, bytes]) -> bytes:
    """The register that a list of digests was measured into."""
    register = bytes(48)
    for digest in digests.values():
        register = hashlib.sha384(register + digest).digest()
    return register


def test_getappkey_refused_with_a_quote_that_is_another_keys(guest: Guest) -> None:
    """The claim beside the quote binds this key, the quote itself binds the one it was stolen from."""
    victim, thief = foreign.new_key(), foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(victim))
    theirs, mine = (foreign.binding_of(foreign.spki_of(key)) for key in (victim, thief))
    head, _, tail = evidence.rpartition(theirs)
    assert theirs in head, "the quote has it too, and before the claim"
    identity = guest.temp_ca.issue(thief, head + mine + tail)
    assert guest.get_app_key(identity).error == "invalid quote: tdx report_data mismatch"
    assert guest.get_app_key(guest.temp_ca.issue(victim, evidence)).status == 200


def test_every_rpc_refused_with_bytes_that_are_no_attestation(ready_stack: RunningStack, guest: Guest) -> None:
    identity = guest.temp_ca.issue(foreign.new_key(), b"\x17 no attestation")
    if ready_stack.release.any_client_certificate_issuer:
        ended = pytest.raises(ssl.SSLError, match="ALERT_HANDSHAKE_FAILURE")
        with foreign.kms(guest.kms_url, identity=identity) as connection, ended:
            connection.get("/health")
        assert guest.get_app_key().status == 200
        return
    with foreign.kms(guest.kms_url, identity=identity) as connection:
        refusal = "Failed to decode attestation from cert extension: Unknown attestation wire format"
        assert connection.call("GetAppKey", api_version=1).error == refusal
        assert connection.call("GetMeta").error == refusal
        assert connection.get("/health").status == 200
    assert guest.get_app_key().status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("issuer", ["a stranger", "a namesake of the temporary CA"])
def test_certificate_of_another_ca_is_refused_in_the_handshake_by_0_5_alone(
    ready_stack: RunningStack, guest: Guest, issuer: str, version: ssl.TLSVersion
) -> None:
    key = foreign.new_key()
    name = "Dstack Client Temp CA" if issuer.startswith("a namesake") else issuer
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    context = foreign.tls_context(foreign.Authority.invent(name).issue(key, evidence), guest.root_ca)
    context.minimum_version = context.maximum_version = version
    target = urlsplit(guest.kms_url)
    assert target.hostname
    assert target.port
    plain = socket.create_connection((target.hostname, target.port), timeout=foreign.TIMEOUT)
    channel = context.wrap_socket(plain, server_hostname=target.hostname, do_handshake_on_connect=False)
    if ready_stack.release.any_client_certificate_issuer:
        with channel:
            channel.sendall(b"GET /health HTTP/1.1\r\nHost: kms\r\n\r\n")
            assert channel.recv(17) == b"HTTP/1.1 200 OK\r\n"
        return
    with channel, pytest.raises(ssl.SSLError) as refusal:
        channel.recv(1)  # with TLS 1.3 the handshake is over here before the server judges; this does it and reads on
    assert refusal.value.reason == "TLSV1_ALERT_UNKNOWN_CA"
    assert guest.get_app_key().status == 200


def test_unsupported_api_version_is_judged_before_the_kms_itself(ready_stack: RunningStack, guest: Guest) -> None:
    assert guest.get_app_key(api_version=2).error == "Unsupported API version: 2"
    with ready_stack.policy_changed("src", lambda policy: policy["kms"].update(mrAggregated=[])):
        assert guest.get_app_key(api_version=2).error == "Unsupported API version: 2"
    for version in (0, 1):
        assert guest.get_app_key(api_version=version).status == 200


# ---- refusals: what the policy says


def _deny_compose(stack: RunningStack, policy: Policy) -> None:
    of_app(stack, policy)["composeHashes"] = [f"0x{'00' * 32}"]


def _deny_device(stack: RunningStack, policy: Policy) -> None:
    of_app(stack, policy).update(allowAnyDevice=False, devices=[f"0x{'00' * 32}"])


def _deny_measurement(stack: RunningStack, policy: Policy) -> None:
    policy["kms"].update(mrAggregated=[f"0x{stack.description['kms']['dst']['mr_aggregated']}"])


def _deny_kms_device(stack: RunningStack, policy: Policy) -> None:
    policy["kms"].update(allowAnyDevice=False, devices=[f"0x{stack.description['kms']['dst']['device_id']}"])


OF_APP, OF_KMS = "App not allowed: Boot denied: ", "KMS self authorization failed: KMS is not allowed: "
POLICIES: dict[str, tuple[Callable[[RunningStack, Policy], object], str]] = {
    "app not registered": (lambda stack, policy: policy["apps"].clear(), OF_APP + "app not registered"),
    "another compose hash": (_deny_compose, OF_APP + "compose hash not allowed"),
    "another device for the app": (_deny_device, OF_APP + "app is not allowed to boot on this device"),
    "another measurement for the KMS": (
        _deny_measurement,
        OF_KMS + "aggregated MR not allowed",
    ),
    "another device for the KMS": (_deny_kms_device, OF_KMS + "KMS is not allowed to boot on this device"),
    "no OS image": (lambda stack, policy: policy.update(osImages=[]), OF_KMS + "OS image is not allowed"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_getappkey_follows_the_policy_on_one_connection(ready_stack: RunningStack, guest: Guest, name: str) -> None:
    change, refusal = POLICIES[name]
    with foreign.kms(guest.kms_url, identity=guest.identity(), root_ca=guest.root_ca) as connection:
        assert connection.call("GetAppKey", api_version=1).status == 200
        with ready_stack.policy_changed("src", lambda policy: change(ready_stack, policy)):
            assert connection.call("GetAppKey", api_version=1).error == refusal
        assert connection.call("GetAppKey", api_version=1).status == 200


def test_getappkey_refused_while_there_is_no_policy(ready_stack: RunningStack, guest: Guest) -> None:
    path = ready_stack.policies["src"]
    away = path.rename(path.with_suffix(".away"))
    try:
        assert guest.get_app_key().error == f"{OF_KMS}config file not found: {path}"
    finally:
        away.rename(path)
    assert guest.get_app_key().status == 200


def test_device_allowed_by_its_id(ready_stack: RunningStack, guest: Guest) -> None:
    device_id = foreign.ask_agent(guest.agent, "Info")["device_id"]

    def only(policy: Policy) -> None:
        of_app(ready_stack, policy).update(allowAnyDevice=False, devices=[f"0x{device_id}"])

    with ready_stack.policy_changed("src", only):
        assert guest.get_app_key().status == 200


def test_os_image_of_the_request_is_judged(ready_stack: RunningStack, guest: Guest) -> None:
    image = "ab" * 32
    claim = json.dumps({"os_image_hash": image, "tdx_attestation_variant": "lite"})
    refusal = "App not allowed: Boot denied: OS image is not allowed"
    old = guest.identity_without_vm_config()
    assert guest.get_app_key(old, vm_config=claim).error == refusal
    twice = "Failed to verify os image hash: Failed to verify os image hash"
    measured = f"App not allowed: {twice}: tdx lite attestation requires vm_config.tdx_measurement"
    with ready_stack.policy_changed("src", lambda policy: policy["osImages"].append(f"0x{image}")):
        assert guest.get_app_key(old, vm_config=claim).error == measured
    assert guest.get_app_key(old, vm_config=claim).error == refusal
    assert guest.get_app_key().status == 200


def test_policy_of_one_kms_is_not_the_others(ready_stack: RunningStack, guest: Guest) -> None:
    other = guest.at(ready_stack.services["kms-dst"])
    with ready_stack.policy_changed("src", lambda policy: policy["apps"].clear()):
        assert guest.get_app_key().error == "App not allowed: Boot denied: app not registered"
        assert other.get_app_key().status == 200
    assert guest.get_app_key().status == 200
