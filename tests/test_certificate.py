"""Certificates and signing requests against those that upstream's programs issued."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from dstack_emu.attest import certificate as c
from dstack_emu.attest import issuing
from dstack_emu.attest.csr import SigningRequest
from dstack_emu.attest.errors import AttestError, FormatError, VerificationError
from dstack_emu.attest.kdf import load_p256_pem, p256_key
from dstack_emu.attest.verify import require_bound_to_key
from tests.recorded import golden

NOW = 1_795_264_581


def _all(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value] if "extensions_in_order" in value else [x for v in value.values() for x in _all(v)]
    return [x for v in value for x in _all(v)] if isinstance(value, list) else []


def _reissue(recorded: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Ask our own CA for what a recorded certificate is, from its decoded content alone."""
    extensions: dict[x509.ObjectIdentifier, Any] = {e.oid: e.value for e in recorded.extensions}
    san = extensions.get(ExtensionOID.SUBJECT_ALTERNATIVE_NAME)
    purposes = list(extensions.get(ExtensionOID.EXTENDED_KEY_USAGE, []))
    constraints: Any = extensions.get(ExtensionOID.BASIC_CONSTRAINTS)
    attribute, of_issuer = _texts(recorded.subject), _texts(recorded.issuer)
    public = recorded.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    request = issuing.CertificateRequest(
        public_key=public,
        subject=attribute[x509.NameOID.COMMON_NAME],
        organization=attribute.get(x509.NameOID.ORGANIZATION_NAME),
        alt_names=[str(n.value) for n in san] if isinstance(san, x509.SubjectAlternativeName) else (),
        ca_path_length=constraints.path_length if constraints else None,
        server_auth=ExtendedKeyUsageOID.SERVER_AUTH in purposes,
        client_auth=ExtendedKeyUsageOID.CLIENT_AUTH in purposes,
        app_id=c.extension_payload(recorded, c.OID_APP_ID),
        app_info=c.app_info_of(recorded),
        usage=c.usage_of(recorded),
        attestation=c.attestation_of(recorded),
        not_before=int(recorded.not_valid_before_utc.timestamp()),
        not_after=int(recorded.not_valid_after_utc.timestamp()),
    )
    issuer = issuing.self_signed(
        issuing.CertificateRequest(
            public_key=key.public_key(),
            subject=of_issuer[x509.NameOID.COMMON_NAME],
            organization=of_issuer.get(x509.NameOID.ORGANIZATION_NAME),
            ca_path_length=1,
        ),
        key,
        NOW,
    )
    return issuer.issue(request, NOW)


def _texts(name: x509.Name) -> dict[x509.ObjectIdentifier, str]:
    return {attribute.oid: str(attribute.value) for attribute in name}


def test_golden_certificates_are_issued_again_to_the_byte_but_for_the_issuers_key() -> None:
    key, seen = p256_key(b"\x07" * 32), 0
    for entry in _all(golden("certificates.json")):
        recorded = x509.load_pem_x509_certificate(entry["pem"].encode())
        if not entry["serial_is_sha256_of_uncompressed_point_first20_with_top_bit_cleared"]:
            continue  # made by hand for the recording, not by upstream's code
        ours = _reissue(recorded, key)
        assert ours.subject.public_bytes() == bytes.fromhex(entry["subject_der"])
        assert ours.serial_number == recorded.serial_number
        assert ours.not_valid_after_utc == recorded.not_valid_after_utc
        assert [(e.oid.dotted_string, e.critical, e.value.public_bytes().hex()) for e in ours.extensions] == [
            (e["oid"], e["critical"], e["extn_value_der"]) for e in entry["extensions_in_order"]
        ]
        assert ours.tbs_certificate_bytes == recorded.tbs_certificate_bytes
        seen += 1
    assert seen >= 20


def test_key_usage_is_a_bit_string_of_two_bytes_that_openssl_reads(tmp_path: Path) -> None:
    key = p256_key(b"\x07" * 32)
    request = issuing.CertificateRequest(public_key=key.public_key(), subject="x", ca_path_length=0)
    authority = issuing.self_signed(request, key, NOW)
    leaf = authority.issue(
        issuing.CertificateRequest(public_key=key.public_key(), subject="y", alt_names=["y.test"]), NOW
    )
    for certificate, encoded, names in (
        (authority.certificate, "0303078600", "Digital Signature, Certificate Sign, CRL Sign"),
        (leaf, "0303078000", "Digital Signature"),
    ):
        assert bytes.fromhex(f"0603551d0f0101ff0405{encoded}") in certificate.public_bytes(Encoding.DER)
        path = tmp_path / "certificate.pem"
        path.write_bytes(certificate.public_bytes(Encoding.PEM))
        command = ("openssl", "x509", "-in", str(path), "-noout", "-ext", "keyUsage")
        shown = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        assert [line.strip() for line in shown.splitlines()] == ["X509v3 Key Usage: critical", names]


def test_golden_signing_requests_decode_and_verify_and_bind_their_key() -> None:
    for case in golden("csr.json")["csrs"]:
        data, signature = bytes.fromhex(case["csr"]), bytes.fromhex(case["signature"])
        request = SigningRequest.parse(data, case["api_version"])
        if "badconfirm" in case["name"]:
            with pytest.raises(VerificationError, match="^Invalid confirm word$"):
                request.verify_signature(signature)
            continue
        request.verify_signature(signature)
        require_bound_to_key(request.attestation, request.public_key)
        want, config = case.get("config"), request.config
        if want is None:
            continue  # version 1: the recording holds the bytes alone
        assert (config.subject, list(config.alt_names), config.organization) == (
            want["subject"],
            want["subject_alt_names"],
            want["org_name"],
        )
        assert (config.server_auth, config.client_auth, config.with_attestation, config.with_app_info) == (
            want["usage_server_auth"],
            want["usage_client_auth"],
            want["ext_quote"],
            want.get("ext_app_info", False),
        )
        assert (config.not_before, config.not_after) == (want.get("not_before"), want.get("not_after"))
        if case["api_version"] == 2:
            again = SigningRequest.make(request.public_key, config, request.attestation)
            assert again.encoded == data


def test_signing_request_with_another_signature_is_refused() -> None:
    case = golden("csr.json")["csrs"][0]
    request = SigningRequest.parse(bytes.fromhex(case["csr"]), case["api_version"])
    for signature in (b"", bytes.fromhex(case["signature"])[:-1] + b"\x00"):
        with pytest.raises(VerificationError, match="^Invalid signature$"):
            request.verify_signature(signature)


def test_signing_request_cut_short_is_refused_with_the_field() -> None:
    data = bytes.fromhex(golden("csr.json")["csrs"][0]["csr"])
    for size, what in ((3, "confirm"), (40, "pubkey"), (150, "ext_quote|not_before|subject")):
        with pytest.raises(AttestError, match=what):
            SigningRequest.parse(data[:size], 2)


def test_date_that_x509_cannot_hold_is_a_refusal() -> None:
    key = p256_key(b"\x07" * 32)
    request = issuing.CertificateRequest(public_key=key.public_key(), subject="x", not_after=2**63)
    with pytest.raises(FormatError, match="^Failed to sign certificate: not_after: a time that X.509 can hold"):
        issuing.self_signed(request, key, NOW)


def test_same_request_and_time_give_the_same_bytes() -> None:
    key = load_p256_pem(golden("keys.json")["root_sets"][0]["root_ca_key_pem"], "root CA key")
    request = issuing.CertificateRequest(public_key=key.public_key(), subject="x", alt_names=["a.example", "10.0.0.1"])
    first, second = (issuing.self_signed(request, key, NOW).certificate.public_bytes(Encoding.DER) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "algorithm", ["EC -pkeyopt ec_paramgen_curve:P-256", "EC -pkeyopt ec_paramgen_curve:P-384", "RSA"]
)
@pytest.mark.parametrize("version", [1, 3])
def test_key_is_cut_out_of_a_certificate_as_openssl_reads_it(algorithm: str, version: int, tmp_path: Path) -> None:
    def openssl(*arguments: str) -> bytes:
        return subprocess.run(("openssl", *arguments), cwd=tmp_path, capture_output=True, check=True).stdout

    openssl("genpkey", "-algorithm", *algorithm.split(), "-out", "key.pem")
    openssl("req", "-new", "-key", "key.pem", "-subj", "/CN=somebody", "-out", "request.pem")
    # Without extensions openssl 3.0 makes version 1, later ones do with them removed; with extensions it is version 3.
    (tmp_path / "extensions").write_text("basicConstraints=CA:FALSE" if version == 3 else "")
    extended = ("-extfile", "extensions") if version == 3 else ()
    data = openssl("x509", "-req", "-in", "request.pem", "-signkey", "key.pem", *extended, "-outform", "DER")
    spki = openssl("pkey", "-in", "key.pem", "-pubout", "-outform", "DER")
    assert c.spki_of_der(data) == spki
    for size in (0, 1, 3, 10, len(data) // 2):
        with pytest.raises(FormatError, match="certificate: "):
            c.spki_of_der(data[:size])
