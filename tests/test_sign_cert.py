"""SignCert over the wire: requests of version 1, dates that no certificate can hold, and what else a request can be."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests import foreign
from tests.foreign import Answer, Guest
from tests.running import RunningStack

WORD = b"please sign cert:"
NAME = "foreign.example.test"


@pytest.fixture
def guest(ready_stack: RunningStack) -> Guest:
    """A guest with the app's agent, before the source KMS."""
    return Guest.of(ready_stack.services["kms-src"], ready_stack.description["app"]["dstack_sock"])


def compact(number: int) -> bytes:
    """SCALE's compact integer."""
    if number < 1 << 6:
        return bytes([number << 2])
    return (number << 2 | 1).to_bytes(2, "little") if number < 1 << 14 else (number << 2 | 2).to_bytes(4, "little")


def vec(data: bytes) -> bytes:
    """SCALE's vector of bytes."""
    return compact(len(data)) + data


def head(key: ec.EllipticCurvePrivateKey, word: bytes = WORD) -> bytes:
    """What both versions begin with: word, key, and a configuration that wants evidence in the certificate."""
    config = b"\0" + vec(NAME.encode()) + compact(1) + vec(NAME.encode()) + b"\1\0\1"
    return vec(word) + vec(foreign.spki_of(key)) + config


def signed(key: ec.EllipticCurvePrivateKey, csr: bytes, version: int, **more: Any) -> dict[str, Any]:
    """The arguments of SignCert for a request."""
    signature = key.sign(csr, ec.ECDSA(hashes.SHA256()))
    return {"api_version": version, "csr": csr.hex(), "signature": signature.hex(), **more}


def sign_cert(guest: Guest, arguments: dict[str, Any]) -> Answer:
    """Ask the KMS."""
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        return connection.call("SignCert", **arguments)


def quoted(guest: Guest, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    """What GetQuote answers for a key."""
    return foreign.ask_agent(guest.agent, "GetQuote", {"report_data": foreign.binding_of(foreign.spki_of(key)).hex()})


def version_1(guest: Guest, key: ec.EllipticCurvePrivateKey, **changed: bytes) -> bytes:
    """A request of version 1: a bare quote and its event log."""
    answer = quoted(guest, key)
    parts = {"quote": bytes.fromhex(answer["quote"]), "event_log": answer["event_log"].encode(), **changed}
    return head(key, parts.get("word", WORD)) + vec(parts["quote"]) + vec(parts["event_log"])


# ---- version 1


def test_request_of_version_1_gets_a_certificate(ready_stack: RunningStack, guest: Guest) -> None:
    key = foreign.new_key()
    vm_config = quoted(guest, key)["vm_config"]
    answer = sign_cert(guest, signed(key, version_1(guest, key), 1, vm_config=vm_config))
    leaf, app_ca, root = (x509.load_pem_x509_certificate(pem.encode()) for pem in answer.value["certificate_chain"])
    leaf.verify_directly_issued_by(app_ca)
    app_ca.verify_directly_issued_by(root)
    assert root.public_bytes(Encoding.PEM).decode() == guest.root_ca
    assert leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == foreign.spki_of(key)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME]
    evidence = leaf.extensions.get_extension_for_oid(foreign.OID_ATTESTATION).value
    assert isinstance(evidence, x509.UnrecognizedExtension)
    assert bytes.fromhex(quoted(guest, key)["quote"])[48:632] in evidence.value, "the report, in the versioned form"


def test_request_of_version_1_without_vm_config_names_no_image(ready_stack: RunningStack, guest: Guest) -> None:
    key = foreign.new_key()
    arguments = signed(key, version_1(guest, key), 1)
    assert sign_cert(guest, arguments).error == "Boot denied: OS image is not allowed"
    with ready_stack.policy_changed("src", lambda policy: policy["osImages"].append("0x")):
        assert sign_cert(guest, arguments).error.startswith("Failed to verify os image hash: ")
    assert sign_cert(guest, arguments | {"vm_config": quoted(guest, key)["vm_config"]}).status == 200


def test_request_of_version_1_is_refused_for_each_thing_that_is_wrong(guest: Guest) -> None:
    key, other = foreign.new_key(), foreign.new_key()
    log = quoted(guest, key)["event_log"]
    lie = json.dumps([{**e, "event_payload": "00"} if e["event"] == "app-id" else e for e in json.loads(log)]).encode()
    stolen = {"quote": bytes.fromhex(quoted(guest, other)["quote"])}
    for changed, said in (
        ({"word": b"please sign this:"}, "Failed to verify csr signature: Invalid confirm word"),
        ({"event_log": b"[]"}, "Quote verification failed: RTMR3 mismatch, quoted: "),
        ({"event_log": lie}, "Quote verification failed: RTMR3 mismatch, quoted: "),
        ({"event_log": b"no JSON"}, "Failed to upgrade csr v1 to v2: Failed to parse tdx_event_log: "),
        ({"event_log": b"{}"}, "Failed to upgrade csr v1 to v2: Failed to parse tdx_event_log: "),
        ({"event_log": b"no JSON", "quote": b""}, "Failed to upgrade csr v1 to v2: Failed to parse tdx_event_log: "),
        ({"quote": b"no quote"}, "Failed to upgrade csr v1 to v2: Invalid TDX quote: "),
        ({"quote": b""}, "Failed to upgrade csr v1 to v2: Invalid TDX quote: "),
        (stolen, "Quote verification failed: report data mismatch"),
    ):
        assert sign_cert(guest, signed(key, version_1(guest, key, **changed), 1)).error.startswith(said)
    request = signed(key, version_1(guest, key), 1)
    unreadable = signed(key, version_1(guest, key, event_log=b"no JSON", quote=b""), 1)
    for arguments in (request, unreadable):  # the signature comes before quote and event log
        forged = {**arguments, "signature": signed(other, bytes.fromhex(arguments["csr"]), 1)["signature"]}
        assert sign_cert(guest, forged).error == "Failed to verify csr signature: Invalid signature"
    for end in (0, 10, 200, -1):
        assert sign_cert(guest, signed(key, version_1(guest, key)[:end], 1)).error.startswith("Failed to parse csr: ")
    assert sign_cert(guest, request | {"vm_config": quoted(guest, key)["vm_config"]}).status == 200


# ---- dates


def dated(guest: Guest, not_before: int | None, not_after: int | None) -> Answer:
    """Ask for a certificate with those dates, by a request of version 2."""
    key = foreign.new_key()
    dates = b"".join(b"\0" if date is None else b"\1" + date.to_bytes(8, "little") for date in (not_before, not_after))
    csr = head(key) + b"\0" + dates + foreign.attest(guest.agent, foreign.spki_of(key))
    return sign_cert(guest, signed(key, csr, 2))


LAST = 253_402_300_799
"""9999-12-31T23:59:59Z, the last moment that X.509 can name."""


@pytest.mark.parametrize("date", [LAST + 1, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("name", ["not_before", "not_after"])
def test_date_that_x509_cannot_hold_is_an_error_answer(guest: Guest, name: str, date: int) -> None:
    answer = dated(guest, date if name == "not_before" else None, date if name == "not_after" else None)
    expected = f"a time that X.509 can hold expected (before the year 10000), got {date}"
    assert answer.error == f"Failed to sign certificate: Failed to sign certificate: {name}: {expected}"
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        assert connection.get("/health").status == 200, "the process goes on"
    assert dated(guest, LAST if name == "not_before" else None, LAST if name == "not_after" else None).status == 200


def test_dates_that_x509_can_hold_are_written_as_asked(guest: Guest) -> None:
    for not_before, not_after in ((0, LAST), (1_000_000_000, 2_000_000_000)):
        pem = dated(guest, not_before, not_after).value["certificate_chain"][0]
        leaf = x509.load_pem_x509_certificate(pem.encode())
        assert leaf.not_valid_before_utc.timestamp() == not_before
        assert leaf.not_valid_after_utc.timestamp() == not_after


def test_end_before_the_beginning_is_issued_in_0_5_alone(each_ready_stack: RunningStack, tmp_path: Path) -> None:
    guest = Guest.of(each_ready_stack.services["kms-src"], each_ready_stack.description["app"]["dstack_sock"])
    for not_before, not_after in ((2_000_000_000, 1_000_000_000), (4_000_000_000, 4_000_000_000), (LAST, 0)):
        answer = dated(guest, not_before, not_after)
        if each_ready_stack.release.name == "0.6":
            assert answer.error == "Failed to sign certificate: not_before must be earlier than not_after"
            continue
        leaf, app_ca, _ = (x509.load_pem_x509_certificate(pem.encode()) for pem in answer.value["certificate_chain"])
        leaf.verify_directly_issued_by(app_ca)
        dates = (leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp())
        assert dates == (not_before, not_after)
        (tmp_path / "leaf.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
        (tmp_path / "ca.pem").write_bytes(app_ca.public_bytes(Encoding.PEM))
        # openssl reads it, holds the signature for good, and the dates for bad.
        verify = ("openssl", "verify", "-partial_chain", "-CAfile", "ca.pem")
        said = subprocess.run((*verify, "leaf.pem"), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert said.returncode
        assert ("has expired" in said.stderr) or ("not yet valid" in said.stderr)
        timeless = subprocess.run(
            (*verify, "-no_check_time", "leaf.pem"), cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert timeless.returncode == 0, timeless.stderr
    assert dated(guest, 1_000_000_000, 2_000_000_000).status == 200


# ---- keys and names


def request_for(guest: Guest, key: Any, spki: bytes, alt_name: bytes = NAME.encode(), subject: str = NAME) -> Answer:
    """Ask for a certificate for a key as it is encoded there, with an alternative name, by a request of version 2."""
    config = b"\0" + vec(subject.encode()) + compact(1) + vec(alt_name) + b"\1\0\1\0\0\0"
    csr = vec(WORD) + vec(spki) + config + foreign.attest(guest.agent, spki)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        signature = key.sign(csr, ec.ECDSA(hashes.SHA256()))
    elif isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(csr, padding.PKCS1v15(), hashes.SHA256())
    else:
        signature = key.sign(csr)
    return sign_cert(guest, {"api_version": 2, "csr": csr.hex(), "signature": signature.hex()})


def spki_of(key: Any) -> bytes:
    encoded: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def compressed(spki: bytes) -> bytes:
    """The same P-256 key with a compressed point, which ring does not read."""
    point = spki[-65:]
    return (
        bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200") + bytes([2 + point[-1] % 2]) + point[1:33]
    )


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1, ec.SECP256K1, ec.BrainpoolP256R1])
def test_key_of_another_curve_has_an_invalid_signature(guest: Guest, curve: type[ec.EllipticCurve]) -> None:
    key = ec.generate_private_key(curve())
    assert request_for(guest, key, spki_of(key)).error == "Failed to verify csr signature: Invalid signature"
    of_p256 = foreign.new_key()
    assert request_for(guest, of_p256, spki_of(of_p256)).status == 200


def test_key_is_refused_for_what_it_is(guest: Guest) -> None:
    key = foreign.new_key()
    good = spki_of(key)
    others = (rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate())
    for other in others:
        assert (
            request_for(guest, other, spki_of(other)).error == "Failed to verify csr signature: Unsupported algorithm"
        )
    assert serialization.load_der_public_key(compressed(good)) == key.public_key()
    assert request_for(guest, key, compressed(good)).error == "Failed to verify csr signature: Invalid signature"
    longer = b"\x30\x81" + good[1:]  # its length is not the shortest, so it is no DER
    for spki in (b"", b"\x30", good[:-1], b"\x31" + good[1:], b"no key", longer):
        assert request_for(guest, key, spki).error.startswith(
            "Failed to verify csr signature: Failed to parse pubkey: "
        )
    # What follows the key is bound by the evidence and signed, so the certificate is where it is refused.
    said = "Failed to sign certificate: Failed to parse signature: "
    assert request_for(guest, key, good + b"\0").error.startswith(said)
    assert request_for(guest, key, good).status == 200


@pytest.mark.parametrize("name", ["bücher.example", "✓", "a\u00a0b"])
def test_alternative_name_has_to_be_ascii(guest: Guest, name: str) -> None:
    key = foreign.new_key()
    answer = request_for(guest, key, spki_of(key), name.encode())
    said = "Failed to sign certificate: Failed to sign certificate: Invalid IA5String"
    assert answer.error.startswith(said)
    pem = request_for(guest, key, spki_of(key), subject=name).value["certificate_chain"][0]
    leaf = x509.load_pem_x509_certificate(pem.encode())
    assert leaf.subject.rfc4514_string() == f"CN={name}"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("10.0.0.1", x509.IPAddress),
        ("fe80::1", x509.IPAddress),
        ("fe80::1%eth0", x509.DNSName),
        ("1.2.3", x509.DNSName),
    ],
)
def test_alternative_name_is_an_address_if_it_is_one_for_rust(guest: Guest, name: str, kind: type[Any]) -> None:
    key = foreign.new_key()
    pem = request_for(guest, key, spki_of(key), name.encode()).value["certificate_chain"][0]
    leaf = x509.load_pem_x509_certificate(pem.encode())
    (found,) = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert (type(found), str(found.value)) == (kind, name)


# ---- GetTempCaCert


def test_temporary_ca_is_the_stored_one_with_its_key(ready_stack: RunningStack, guest: Guest) -> None:
    certs = Path(ready_stack.description["kms_ca"]).parent
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        answer = connection.call("GetTempCaCert").value
    stored = {"temp_ca_cert": "tmp-ca.crt", "temp_ca_key": "tmp-ca.key", "ca_cert": "root-ca.crt"}
    assert answer == {name: (certs / file).read_text() for name, file in stored.items()}
    certificate = x509.load_pem_x509_certificate(answer["temp_ca_cert"].encode())
    certificate.verify_directly_issued_by(certificate)
    assert certificate.subject.rfc4514_string() == "CN=Dstack Client Temp CA,O=Dstack"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
