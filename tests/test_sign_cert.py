"""SignCert over the wire: requests of version 1, dates that no certificate can hold, and what else a request can be."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
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


def test_request_of_version_1_is_refused_for_each_thing_that_is_wrong(guest: Guest) -> None:
    key, other = foreign.new_key(), foreign.new_key()
    log = quoted(guest, key)["event_log"]
    lie = json.dumps([{**e, "event_payload": "00"} if e["event"] == "app-id" else e for e in json.loads(log)]).encode()
    stolen = {"quote": bytes.fromhex(quoted(guest, other)["quote"])}
    for changed, said in (
        ({"word": b"please sign this:"}, "Failed to verify csr signature: Invalid confirm word"),
        ({"event_log": b"[]"}, "Quote verification failed: RTMR3 mismatch, quoted: "),
        ({"event_log": lie}, "Quote verification failed: RTMR3 mismatch, quoted: "),
        ({"event_log": b"no JSON"}, "Failed to parse csr: "),
        ({"quote": b"no quote"}, "Failed to parse csr: "),
        ({"quote": b""}, "Failed to parse csr: "),
        (stolen, "Quote verification failed: report data mismatch"),
    ):
        assert sign_cert(guest, signed(key, version_1(guest, key, **changed), 1)).error.startswith(said)
    request = signed(key, version_1(guest, key), 1)
    forged = {**request, "signature": signed(other, bytes.fromhex(request["csr"]), 1)["signature"]}
    assert sign_cert(guest, forged).error == "Failed to verify csr signature: Invalid signature"
    for end in (0, 10, 200, -1):
        assert sign_cert(guest, signed(key, version_1(guest, key)[:end], 1)).error.startswith("Failed to parse csr: ")


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
    answer = dated(guest, date if name == "not_before" else None, date if name == "not_after" else LAST)
    expected = f"a time that X.509 can hold expected (before the year 10000), got {date}"
    assert answer.error == f"Failed to sign certificate: {name}: {expected}"
    with foreign.kms(guest.kms_url, root_ca=guest.root_ca) as connection:
        assert connection.get("/health").status == 200, "the process goes on"


def test_dates_that_x509_can_hold_are_written_as_asked(guest: Guest) -> None:
    for not_before, not_after in ((0, LAST), (1_000_000_000, 2_000_000_000)):
        pem = dated(guest, not_before, not_after).value["certificate_chain"][0]
        leaf = x509.load_pem_x509_certificate(pem.encode())
        assert leaf.not_valid_before_utc.timestamp() == not_before
        assert leaf.not_valid_after_utc.timestamp() == not_after


def test_end_before_the_beginning_is_an_error_answer(guest: Guest) -> None:
    assert dated(guest, 2_000_000_000, 1_000_000_000).error.startswith("Failed to sign certificate: ")


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
