"""`dstack-emu inspect` on recorded bytes of hardware and of the real programs, in every form, and on hostile ones."""

import base64
import hashlib
import json
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import dcap_qvl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest import certificate, der, eventlog
from dstack_emu.attest.certificate import OID_EVENT_LOG, OID_TDX_QUOTE
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.pck import OID_SGX_EXTENSION, PckExtension, device_id, pck_extension_of
from dstack_emu.attest.quote import TD10_FIELDS, Quote, TdReport15
from dstack_emu.attest.report_data import bootstrap_report_data
from dstack_emu.cli.commands.inspect import WIDTH, render
from dstack_emu.inspection.description import as_json
from dstack_emu.inspection.finding import Finding
from dstack_emu.inspection.identify import MAX_INPUT_SIZE, inspect_input
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.vendor_state import VendorState
from tests.evidence_samples import (
    issued,
    legacy_certificate,
    pod,
    signing_request,
    signing_requests_v1,
    with_events_of_version_2,
    with_extensions,
    world,
)
from tests.hardware import (
    BOOTS,
    INTEL_COLLATERAL,
    INTEL_QUOTE,
    LEGACY,
    LITE,
    LITE_GET_QUOTE,
    VERSIONED,
    boot,
    facts,
    intel_pck,
)
from tests.recorded import external_path, golden


def vector(name: str) -> bytes:
    return external_path(name).read_bytes()


def inspect(data: bytes) -> dict[str, Any]:
    """What --json prints of it."""
    found = inspect_input(data)
    shown: dict[str, Any] = json.loads(
        json.dumps({"what": found.what, "sure": found.sure, **as_json(found.description)})
    )
    return shown


def lines_of(found: Finding) -> list[str]:
    return render(found.description, colour=False)


def table(found: Finding, heading: str) -> list[list[str]]:
    """The cells of a table, read as a person does: columns lie two blanks apart or more."""
    lines = lines_of(found)
    start = next(i for i, line in enumerate(lines) if line.strip() == heading)
    rows: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.strip():
            break
        rows.append(re.split(r" {2,}", line.strip()))
    return rows


def ours(version: int = 4, *, td15: bool = False) -> bytes:
    """A quote of our own simulator."""
    report = world().domain.report(bytes(64))
    if td15:
        values = {name: getattr(report, name) for name, _ in TD10_FIELDS}
        report = TdReport15(**values, tee_tcb_svn2=bytes(range(16)), mr_service_td=b"\x07" * 48)
    return world().domain.platform.quote(report, version)


# ---- the PCK extension


QUOTES: dict[str, Callable[[], bytes]] = {
    "emulated": lambda: ours(),
    "emulated, version 5": lambda: ours(5),
    "upstream's mock platform": lambda: bytes.fromhex(golden("attestations.json")["attestations"][0]["tdx_quote"]),
    "Intel's sample": lambda: vector(INTEL_QUOTE),
    "a versioned attestation's": lambda: inspect_evidence(vector(VERSIONED)),
}


def inspect_evidence(data: bytes) -> bytes:
    evidence = inspect_input(data).evidence
    assert evidence is not None
    return evidence.quote


@pytest.mark.parametrize("quote", QUOTES.values(), ids=QUOTES)
def test_pck_extension_reads_as_the_verifier_reads_it(quote: Callable[[], bytes]) -> None:
    chain = Quote.parse(quote()).signature.pck_chain
    theirs = dcap_qvl.parse_pck_extension_from_pem(chain)
    pck = pck_extension_of(x509.load_pem_x509_certificates(chain)[0])
    assert (pck.ppid, pck.cpu_svn, pck.pce_svn, pck.pce_id, pck.fmspc, pck.sgx_type) == (
        theirs.ppid,
        theirs.cpu_svn,
        theirs.pce_svn,
        theirs.pce_id,
        theirs.fmspc,
        theirs.sgx_type,
    )
    assert pck.platform_instance_id == (theirs.platform_instance_id or b"")
    for suffix, flag in (("7.1", pck.dynamic_platform), ("7.2", pck.cached_keys), ("7.3", pck.smt_enabled)):
        value = theirs.get_value(f"1.2.840.113741.1.13.1.{suffix}")
        assert flag is (None if value is None else value == b"\xff")


def test_numbers_of_intels_pck_extension_encode_to_its_bytes() -> None:
    encoded = intel_pck().encode()
    assert hashlib.sha256(encoded).hexdigest() == "3c17fc966c5d41f242ba88f9eb7b4a6cc0bac19188807d73a0233d4b9c15c32c"
    assert PckExtension.parse(encoded) == intel_pck()


def test_pck_extension_of_intel_encodes_to_the_same_bytes() -> None:
    leaf = x509.load_pem_x509_certificates(Quote.parse(vector(INTEL_QUOTE)).signature.pck_chain)[0]
    value = leaf.extensions.get_extension_for_oid(OID_SGX_EXTENSION).value
    assert isinstance(value, x509.UnrecognizedExtension)
    assert PckExtension.parse(value.value).encode() == value.value


def test_pck_extension_survives_encoding_with_and_without_what_is_optional() -> None:
    full = PckExtension(b"p" * 16, b"c" * 16, 300, b"\0\1", b"fmspc!", b"i" * 16, 2, False, True, False, b"d" * 16)
    processor = PckExtension(b"p" * 16, b"c" * 16, 0, b"\0\1", b"fmspc!", b"", 0, None, None, None)
    for extension in (full, processor):
        assert PckExtension.parse(extension.encode()) == extension


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda d: d[:-1], "SGX extension: 550 bytes of content announced, 549 present"),
        (lambda d: d + b"\0", "SGX extension: 1 bytes left over"),
        (lambda d: d.replace(b"\x04\x06" + b"\xb0\xc0o\0\0\0", b"\x02\x06" + b"\xb0\xc0o\0\0\0"), "DER tag 0x04"),
        (lambda d: d.replace(b"\x0d\x01\x04\x04\x06", b"\x0d\x01\x09\x04\x06"), r"13\.1\.4 expected, got none"),
        (lambda d: d.replace(b"\x0d\x01\x04\x04\x06", b"\x0d\x01\x03\x04\x06"), "each OID once expected"),
        (
            lambda d: d.replace(b"\x02\x11\x02\x01\x0b", b"\x02\x11\x02\x01\x8b"),
            r"2\.17: 0 to 65535 expected, got -117",
        ),
        (lambda d: d.replace(b"\x07\x02\x01\x01\xff", b"\x07\x02\x01\x01\x01"), r"7\.2: DER boolean expected, got 01"),
        (lambda d: d.replace(b"\x02\x05\x02\x01\x04", b"\x02\x15\x02\x01\x04"), r"13\.1\.2\.5 expected, got none"),
    ],
)
def test_damaged_pck_extension_is_refused_by_name(change: Callable[[bytes], bytes], refusal: str) -> None:
    data = intel_pck().encode()
    assert change(data) != data
    with pytest.raises(FormatError, match=refusal):
        PckExtension.parse(change(data))


def test_certificate_without_sgx_extension_is_refused() -> None:
    with pytest.raises(FormatError, match="^PCK certificate: one SGX extension expected"):
        pck_extension_of(world().intel.root)


# ---- every kind, and every form of it


def kinds() -> dict[str, tuple[bytes, str]]:
    """Samples that are always at hand, and what they are."""
    w = world()
    request, evidence = signing_request(), w.evidence
    crl = x509.load_der_x509_crl(w.intel.root_ca_crl)
    answer = {"quote": evidence.quote.hex(), "event_log": eventlog.log_to_json(evidence.event_log)}
    attest = {"attestation": evidence.as_v1().encode().hex()}
    sign_cert = {
        "api_version": 2,
        "csr": request.encoded.hex(),
        "signature": request.sign(w.key).hex(),
    }
    leaf, root = issued(), w.intel.root
    collateral = json.loads(w.collateral.to_json())
    return {
        "quote 4": (ours(), "TDX quote, version 4 (TD10)"),
        "quote 5": (ours(5), "TDX quote, version 5 (TD10)"),
        "quote 5 of TD15": (ours(5, td15=True), "TDX quote, version 5 (TD15)"),
        "attestation V0": (evidence.encode(), "versioned attestation V0 (SCALE)"),
        "attestation V1": (evidence.as_v1().encode(), "versioned attestation V1 (msgpack)"),
        "attestation of a pod": (pod(evidence).encode(), "versioned attestation V1 (msgpack), of a pod"),
        "events of version 2": (with_events_of_version_2(evidence).encode(), "versioned attestation V1 (msgpack)"),
        "request 2": (request.encoded, "dstack certificate signing request, version 2"),
        "request 1": (signing_requests_v1()[0], "dstack certificate signing request, version 1"),
        "RA-TLS DER": (leaf.public_bytes(Encoding.DER), "RA-TLS certificate (versioned attestation)"),
        "RA-TLS PEM": (leaf.public_bytes(Encoding.PEM), "RA-TLS certificate (versioned attestation)"),
        "legacy RA-TLS": (
            legacy_certificate().public_bytes(Encoding.DER),
            "RA-TLS certificate (legacy: quote and event log)",
        ),
        "PEM chain": (
            leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM),
            "chain of 2 certificates, first: RA-TLS certificate (versioned attestation)",
        ),
        "DER chain": (
            root.public_bytes(Encoding.DER) + leaf.public_bytes(Encoding.DER),
            "chain of 2 certificates, first: X.509 certificate",
        ),
        "PCK certificate": (w.domain.platform.pck_certificate.public_bytes(Encoding.DER), "PCK certificate"),
        "CRL DER": (w.intel.root_ca_crl, "certificate revocation list (CRL)"),
        "CRL PEM": (crl.public_bytes(Encoding.PEM), "certificate revocation list (CRL)"),
        "TCB info": (w.documents[1].body, "TCB info with its signature, as a PCCS answers"),
        "QE identity": (w.documents[2].body, "QE identity with its signature, as a PCCS answers"),
        "collateral": (json.dumps(collateral).encode(), "collateral (QuoteCollateralV3)"),
        "GetQuote": (json.dumps(answer | {"report_data": ""}).encode(), "GetQuote answer"),
        "quote report": (
            json.dumps(answer | {"event_log": json.loads(answer["event_log"])}).encode(),
            "GetQuote answer",
        ),
        "TdxQuote": (json.dumps(answer | {"hash_algorithm": "raw", "prefix": ""}).encode(), "TdxQuote answer"),
        "Attest": (json.dumps(attest).encode(), "Attest answer: versioned attestation V1 (msgpack)"),
        "SignCert": (
            json.dumps(sign_cert).encode(),
            "SignCert request: dstack certificate signing request, version 2",
        ),
        "event log": (answer["event_log"].encode(), "event log"),
        "AttestationInfo": (
            json.dumps(
                {"device_id": "", "mr_aggregated": "", "os_image_hash": "", "tee_variant": "dstack-tdx"}
            ).encode(),
            "AttestationInfo answer",
        ),
    }


@pytest.mark.parametrize("name", kinds())
def test_every_kind_is_recognised(name: str) -> None:
    data, what = kinds()[name]
    found = inspect_input(data)
    assert (found.what, found.sure) == (what, True)
    assert not re.search(r"cannot be read", json.dumps(as_json(found.description)))


def wrappings(data: bytes) -> dict[str, bytes]:
    text = data.hex()
    return {
        "hex": text.encode(),
        "upper-case hex with 0x": b"0x" + text.upper().encode(),
        "hex in lines": b"\n".join(text[at : at + 60].encode() for at in range(0, len(text), 60)) + b"\n",
        "hex in groups": " ".join(text[at : at + 4] for at in range(0, len(text), 4)).encode(),
        "base64": base64.b64encode(data),
        "base64 in lines": base64.encodebytes(data),
        "base64url without padding": base64.urlsafe_b64encode(data).rstrip(b"="),
        "JSON text": json.dumps(text).encode(),
        "hex of base64": base64.b64encode(data).hex().encode(),
        "with a byte order mark": b"\xef\xbb\xbf" + text.encode(),
    }


@pytest.mark.parametrize("name", kinds())
def test_every_form_tells_the_same(name: str) -> None:
    data, _ = kinds()[name]
    plain = inspect_input(data).description
    for form, wrapped in wrappings(data).items():
        assert inspect_input(wrapped).description == plain, form


RECORDED = {
    VERSIONED: "versioned attestation V0 (SCALE)",
    INTEL_QUOTE: "TDX quote, version 4 (TD10)",
    INTEL_COLLATERAL: "collateral (QuoteCollateralV3)",
    LEGACY: "GetQuote answer",
    LITE_GET_QUOTE: "GetQuote answer",
    LITE: "Attest answer: versioned attestation V0 (SCALE)",
}


def test_recorded_bytes_of_hardware_are_recognised_and_fit_a_hundred_columns() -> None:
    for name, what in RECORDED.items():
        data = vector(name)
        assert inspect_input(data).what == what
        assert_fits_and_shortens_nothing(data)


# ---- what is shown is what stands there


def assert_fields_as_the_verifier_reads_them(data: bytes, *more: str) -> None:
    theirs, shown = dcap_qvl.parse_quote(data), inspect(data)
    for name in ("version", "qe_svn", "pce_svn"):
        assert shown["header"][name] == getattr(theirs.header, name)
    for name in ("qe_vendor_id", "user_data"):
        assert shown["header"][name] == getattr(theirs.header, name).hex()
    for name in (*(name for name, _ in TD10_FIELDS), *more):
        assert shown["td_report"][name] == getattr(theirs.report, name).hex(), name
    assert shown["pck_certificate"]["fmspc"].upper() == theirs.fmspc()
    assert shown["qe_report"]["names_the_attestation_key"] is True


def test_quote_fields_are_those_the_verifier_reads() -> None:
    assert_fields_as_the_verifier_reads_them(ours())
    assert_fields_as_the_verifier_reads_them(ours(5))
    assert_fields_as_the_verifier_reads_them(ours(5, td15=True), "tee_tcb_svn2", "mr_service_td")


def test_emulated_quote_is_told_from_hardwares() -> None:
    assert inspect(ours())["pck_certificate"]["emulated"] is True
    assert "yes: EMULATED, it proves nothing" in "\n".join(lines_of(inspect_input(ours())))


def test_quote_of_hardware_shows_what_the_verifier_reads_and_is_not_emulated() -> None:
    assert_fields_as_the_verifier_reads_them(vector(INTEL_QUOTE))
    real = inspect(vector(INTEL_QUOTE))
    assert real["pck_certificate"]["emulated"] is False
    assert real["signature_data"]["after_the_quote"] == bytes(70).hex()
    ppid = bytes.fromhex(real["pck_certificate"]["ppid"])
    assert real["pck_certificate"]["device_id"] == device_id(ppid).hex()


def test_td_attributes_are_decoded() -> None:
    attributes = bytes.fromhex(facts(INTEL_QUOTE)["td_report"]["td_attributes"])
    report = inspect(ours()[:168] + attributes + ours()[176:])["td_report"]
    assert (report["debug"], report["sept_ve_disable"], report["td_attributes_set"]) == (
        False,
        True,
        ["SEPT_VE_DISABLE"],
    )
    data = bytearray(ours())
    data[168:176] = bytes.fromhex("0100000000000080")
    report = inspect(bytes(data))["td_report"]
    assert (report["debug"], report["sept_ve_disable"], report["td_attributes_set"]) == (
        True,
        False,
        ["DEBUG", "PERFMON"],
    )
    assert report["xfam_features"][:3] == ["x87", "SSE", "AVX"]


def evidence_of(name: str) -> bytes:
    """A hardware boot's evidence in the form of its file, its quote signed by an emulated platform."""
    known = boot(name)
    if name == VERSIONED:
        return known.attestation().encode()
    if name == LITE:
        return json.dumps({"attestation": known.attestation().encode().hex()}).encode()
    return json.dumps(known.get_quote()).encode()


@pytest.mark.parametrize("name", [VERSIONED, LITE_GET_QUOTE])
def test_log_of_hardware_replays_to_every_register(name: str) -> None:
    found = inspect_input(evidence_of(name))
    assert [row[-1] for row in table(found, "Replay")] == ["equal"] * 4
    shown = inspect(evidence_of(name))["replay"]
    assert [row["replayed"] for row in shown] == [row["quoted"] for row in shown]


@pytest.mark.parametrize("name", BOOTS)
def test_recorded_evidence_of_hardware_shows_its_registers(name: str) -> None:
    shown = inspect(vector(name))
    assert {field: shown["td_report"][field] for field, _ in TD10_FIELDS} == facts(name)["td_report"]
    in_part = ["cannot: the log lacks events"] * 3
    assert [row["result"] for row in shown["replay"]] == [*(in_part if name == LITE else ["equal"] * 3), "equal"]


def test_log_that_lacks_an_event_differs_in_its_register_alone() -> None:
    answer = boot(LITE_GET_QUOTE).get_quote()
    log = json.loads(answer["event_log"])
    for imr in range(4):
        short = [event for event in log if event is not next(e for e in log if e["imr"] == imr)]
        found = inspect_input(json.dumps(answer | {"event_log": json.dumps(short)}).encode())
        assert [row[-1] for row in table(found, "Replay")] == ["differs" if i == imr else "equal" for i in range(4)]


def test_stripped_log_is_not_replayed_where_it_lacks_events() -> None:
    rows = table(inspect_input(evidence_of(LITE)), "Replay")
    assert [row[-1] for row in rows] == ["cannot: the log lacks events"] * 3 + ["equal"]


def test_event_log_is_a_table_with_names_and_decoded_payloads() -> None:
    rows = table(inspect_input(world().evidence.encode()), "Event log")
    assert rows[0][:5] == ["0", "0", "EFI_HANDOFF_TABLES2", "-", "TdxTable"]
    assert rows[2][2:5] == ["EFI_VARIABLE_DRIVER_CONFIG", "-", "SecureBoot"]
    assert rows[16][2:5] == ["EVENT_TAG", "-", "LOADED_IMAGE::LoadOptions"]
    rows = table(inspect_input(evidence_of(VERSIONED)), "Event log")
    assert len(rows) == 33
    assert rows[25][1:5] == ["3", "dstack runtime event", "app-id", "5bb4ff9a3837…"]
    assert rows[31][3:5] == ["storage-fs", "zfs"]


def test_event_log_of_hardware_is_a_table_with_names_of_its_payloads() -> None:
    rows = table(inspect_input(vector(VERSIONED)), "Event log")
    assert len(rows) == 33
    assert rows[0][:5] == ["0", "0", "EFI_HANDOFF_TABLES2", "-", "TdxTable"]
    assert rows[4][2:5] == ["EFI_VARIABLE_DRIVER_CONFIG", "-", "SecureBoot"]
    assert rows[20][2:5] == ["EVENT_TAG", "-", "LOADED_IMAGE::LoadOptions"]


def test_digest_that_is_not_of_its_event_is_marked() -> None:
    log = json.loads(eventlog.log_to_json(world().evidence.event_log))
    assert log[-1]["event"] == "system-ready"
    log[-1]["event"] = "system-unready"
    rows = table(inspect_input(json.dumps(log).encode()), "Event log")
    assert [row[-1].endswith("WRONG") for row in rows] == [False] * (len(rows) - 1) + [True]


def test_app_info_is_what_upstream_decodes() -> None:
    for case in golden("attestations.json")["attestations"]:
        shown, want = inspect(bytes.fromhex(case["full_bytes"]))["app_info"], case["app_info_runtime"]
        for key in ("app_id", "compose_hash", "instance_id", "mr_system", "mr_aggregated", "os_image_hash"):
            assert shown[key] == want[key], key
        assert shown["key_provider"] == json.loads(bytes.fromhex(want["key_provider_info"]))


def test_hardware_app_info_has_the_true_device_and_the_published_aggregate() -> None:
    shown = inspect(evidence_of(VERSIONED))
    assert shown["app_info"]["mr_aggregated"] == "85334a62c97d0f8bf82d0245d31b539d17a2d7c258e2a13efc928aaea0e107cb"
    assert shown["app_info"]["device_id"] == shown["pck_certificate"]["device_id"]
    assert shown["app_info"]["key_provider"]["name"] == "kms"
    assert shown["config"]["vm_config"]["image"] == "dstack-0.6.0"


def test_report_data_says_what_it_binds() -> None:
    assert inspect(evidence_of(LITE_GET_QUOTE))["report_data"]["text"].startswith("dip1::secp256k1c-pk:A5")
    assert (
        inspect(evidence_of(VERSIONED))["report_data"]["means"]
        == "binds nothing: the evidence only identifies the domain"
    )
    leaf = inspect(kinds()["RA-TLS DER"][0])["certificates"][0]["evidence"]["report_data"]
    assert (leaf["ought_to_bind"], leaf["binds_it"]) == ("this certificate's key (ratls-cert)", True)
    request = inspect(kinds()["request 2"][0])["report_data"]
    assert (request["ought_to_bind"], request["binds_it"]) == ("the key of this request (ratls-cert)", True)


def test_bootstrap_answer_says_whether_it_binds_the_keys() -> None:
    w, keys = world(), (b"ca key", b"k256 key")
    attestation = w.domain.attest(bootstrap_report_data(*keys)).encode()
    answer = {"ca_pubkey": keys[0].hex(), "k256_pubkey": keys[1].hex(), "attestation": attestation.hex()}
    assert inspect(json.dumps(answer).encode())["report_data"]["binds_it"] is True
    answer["ca_pubkey"] = b"another".hex()
    assert inspect(json.dumps(answer).encode())["report_data"]["binds_it"] is False


def golden_certificates(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["pem"]] if "pem" in value else [])
        value = list(value.values())
    for one in value if isinstance(value, list) else []:
        yield from golden_certificates(one)


def openssl(*arguments: str, stdin: bytes) -> str:
    done = subprocess.run(["openssl", *arguments], input=stdin, capture_output=True, timeout=30, check=True)
    return done.stdout.decode()


def test_certificates_show_what_openssl_shows() -> None:
    pems = list(golden_certificates(golden("certificates.json")["certificates"]))
    assert len(pems) >= 20
    for pem in pems:
        (shown,) = inspect(pem.encode())["certificates"]
        text = openssl("x509", "-noout", "-serial", "-fingerprint", "-sha256", "-text", stdin=pem.encode())
        serial, fingerprint = re.findall(r"^(?:serial|sha256 Fingerprint)=(.*)$", text, re.M)
        assert int(shown["serial_number"], 16) == int(serial, 16)
        assert shown["sha256"] == fingerprint.replace(":", "").lower()
        assert ("CA:TRUE" in text) is shown.get("ca", False)
        names = re.findall(r"(?:DNS|IP Address):([^,\n]+)", text)
        assert [name.strip() for name in names] == shown.get("alternative_names", [])
        assert ("TLS Web Client Authentication" in text) is ("client auth" in shown.get("extended_key_usage", []))
        for oid in re.findall(r"^ +(1\.3\.6\.1\.4\.1\.62397[\d.]*):", text, re.M):
            assert oid in [extension["oid"] for extension in shown["extensions"]]


def test_certificates_show_dstack_extensions_as_recorded() -> None:
    recorded = golden("certificates.json")["certificates"]
    (rpc,) = inspect(recorded["KMS with root set roots1 of keys.json: rpc.crt"]["pem"].encode())["certificates"]
    assert rpc["usage"] == "kms:rpc"
    assert rpc["evidence"]["report_data"]["binds_it"] is True
    chain = "".join(one["pem"] for one in recorded["SignCert chain of CSR plain (csr.json), [leaf, app CA, root CA]"])
    leaf, app_ca, root = inspect(chain.encode())["certificates"]
    assert (leaf["usage"], app_ca["usage"], "usage" in root) == ("app:custom", "app:ca", False)
    assert leaf["app_id"] == app_ca["app_id"] == bytes(range(20)).hex()
    assert (leaf["signed_by_the_next"], app_ca["signed_by_the_next"]) == (True, True)
    assert (app_ca["path_length"], root["path_length"]) == (0, 1)


def test_chain_in_the_wrong_order_is_said_to_be_unsigned() -> None:
    recorded = golden("certificates.json")["certificates"]
    chain = recorded["SignCert chain of CSR plain (csr.json), [leaf, app CA, root CA]"]
    wrong = "".join(one["pem"] for one in reversed(chain))
    assert [one.get("signed_by_the_next") for one in inspect(wrong.encode())["certificates"]] == [False, False, None]


def test_app_info_extension_is_opened() -> None:
    (shown,) = inspect(issued().public_bytes(Encoding.DER))["certificates"]
    domain = world().domain
    assert shown["app_info"]["app_id"] == domain.app_id.hex()
    assert shown["app_info"]["key_provider"] == {"name": "kms", "id": "00"}
    assert shown["app_info"]["device_id_means"] == "unknown: SHA-256 of nothing"


def test_legacy_certificate_with_compressed_log_is_opened_and_noted() -> None:
    evidence = world().evidence
    log = eventlog.log_to_json(evidence.event_log).encode()
    packer = zlib.compressobj(wbits=31)
    packed = b"ELGZv1" + packer.compress(log) + packer.flush()
    values = {OID_TDX_QUOTE: der.octet_string(evidence.quote), OID_EVENT_LOG: der.octet_string(packed)}
    data = with_extensions(values).public_bytes(Encoding.DER)
    (shown,) = inspect(data)["certificates"]
    assert shown["event_log_form"] == "compressed (ELGZv1): dstack's own reader refuses it"
    assert shown["evidence"]["event_log"] == inspect(log)["event_log"]
    values[OID_EVENT_LOG] = der.octet_string(packed[:60])
    (shown,) = inspect(with_extensions(values).public_bytes(Encoding.DER))["certificates"]
    assert shown["evidence"].startswith("cannot be read: Failed to create attestation from TDX quote")


def emulated_lists() -> Iterator[bytes]:
    """Emulated revocation lists: nobody's, a machine's, and a CA's."""
    intel = Intel(Seed.of("revocation lists"))
    yield intel.pck_crl.body
    intel.platform("one").state = PlatformState(pck_revoked=True)
    intel.state = VendorState(pck_ca_revoked=True)
    yield intel.pck_crl.body
    yield intel.root_ca_crl


def recorded_lists() -> Iterator[bytes]:
    """Intel's."""
    recorded = json.loads(vector(INTEL_COLLATERAL))
    yield bytes.fromhex(recorded["pck_crl"])
    yield bytes.fromhex(recorded["root_ca_crl"])


@pytest.mark.parametrize("lists", [emulated_lists, recorded_lists])
def test_revocation_lists_show_what_openssl_shows(lists: Callable[[], Iterator[bytes]]) -> None:
    revoked = 0
    for data in lists():
        shown = inspect(data)["crl"]
        text = openssl("crl", "-inform", "DER", "-noout", "-text", stdin=data)
        assert len(shown["revoked"]) == text.count("Serial Number:")
        for one in shown["revoked"]:
            assert one["serial_number"].upper() in text.replace("\n", "")
        last = openssl("crl", "-inform", "DER", "-noout", "-lastupdate", "-dateopt", "iso_8601", stdin=data)
        assert last.strip() == f"lastUpdate={shown['last_update'].replace('T', ' ')}"
        revoked += len(shown["revoked"])
    assert revoked > 0


def test_collateral_shows_its_documents() -> None:
    data, platform = world().collateral.to_json().encode(), world().domain.platform
    shown = inspect(data)
    assert (shown["tcbInfo"]["fmspc"].lower(), shown["enclaveIdentity"]["id"]) == (platform.fmspc.hex(), "TD_QE")
    assert "CN=" in shown["pck_crl_issuer_chain"][0]["subject"]
    rows = table(inspect_input(data), "TcbLevels")
    assert rows[0][0] == "UpToDate"
    document = json.loads(json.loads(data)["tcb_info"])
    bare = inspect_input(json.dumps(document).encode())
    assert (bare.what, bare.sure, bare.description["tcbInfo"]) == ("TCB info without its signature", False, document)


def test_collateral_of_intel_shows_its_documents() -> None:
    shown = inspect(vector(INTEL_COLLATERAL))
    assert (shown["tcbInfo"]["fmspc"], shown["enclaveIdentity"]["id"]) == ("B0C06F000000", "TD_QE")
    assert shown["pck_crl_issuer_chain"][0]["subject"].endswith("CN=Intel SGX PCK Platform CA")
    assert shown["valid_until"] == "2025-07-19T10:00:35Z"
    rows = table(inspect_input(vector(INTEL_COLLATERAL)), "TcbLevels")
    assert rows[0] == ["UpToDate", "2024-03-13", "2.2.2.2.3.1.0.5", "11", "5.0.2", "-"]


def test_signing_requests_show_what_was_asked() -> None:
    for case in golden("csr.json")["csrs"]:
        body = {"api_version": case["api_version"], "csr": case["csr"], "signature": case["signature"]}
        shown = inspect(json.dumps(body).encode())["signing_request"]
        assert (shown["version"], shown["signature"]) == (case["api_version"], case["signature"])
        if want := case.get("config"):
            assert (shown["subject"], shown["alt_names"]) == (want["subject"], want["subject_alt_names"])
            assert (shown["not_before"], shown["not_after"]) == (want["not_before"], want["not_after"])


def test_signing_request_with_another_confirm_word_is_not_sure() -> None:
    data = signing_request().encoded
    found = inspect_input(data.replace(b"please sign cert:", b"please sing cert:"))
    assert (found.what, found.sure) == ("dstack certificate signing request, version 2", False)


def test_answer_with_a_chain_shows_its_certificates_and_no_key() -> None:
    key, chain = "-----BEGIN PRIVATE KEY-----\n" + "secret" * 20, [certificate.pem(issued())]
    found = inspect_input(json.dumps({"key": key, "certificate_chain": chain}).encode())
    assert found.what == ("JSON with 1 known part, first: RA-TLS certificate (versioned attestation)")
    assert found.description["parts"][0]["at"] == "$.certificate_chain[0]"
    assert "secret" not in json.dumps(as_json(found.description))


def test_key_in_a_pem_file_is_named_and_not_shown() -> None:
    key = "-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0\n-----END EC PRIVATE KEY-----\n"
    with pytest.raises(FormatError, match="^PEM of certificates or a CRL expected, got EC PRIVATE KEY$"):
        inspect_input(key.encode())
    found = inspect_input((key + certificate.pem(issued())).encode())
    assert found.description["not_shown"] == ["EC PRIVATE KEY"]
    assert "c2VjcmV0" not in "\n".join(lines_of(found))


def test_attestation_info_tells_whether_the_device_is_of_the_ppid() -> None:
    ppid = b"p" * 16
    info = {
        "device_id": device_id(ppid).hex(),
        "mr_aggregated": "",
        "attestation_mode": "dstack-tdx",
        "ppid": ppid.hex(),
    }
    assert inspect(json.dumps(info).encode())["attestation_info"]["device_id_is_sha256_of_ppid"] is True
    info["ppid"] = bytes(16).hex()
    assert inspect(json.dumps(info).encode())["attestation_info"]["device_id_is_sha256_of_ppid"] is False


# ---- damaged, hostile, unknown


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"", "^unknown input: a quote, .* expected .*, got nothing$"),
        (b"hello world", "^unknown input: .*, got 11 bytes beginning 68656c6c6f20776f$"),
        (b"\xff" * 40, "^unknown input: .*, got 40 bytes beginning ffffffffffffffff$"),
        (b"{}", "^unknown input: .*, got 2 bytes beginning 7b7d$"),
        (b'{"a": ', "^looks like JSON, but Expecting value"),
        (b"[" * 40 + b"]" * 40, "^looks like JSON, but at most 32 levels of JSON expected, got more$"),
        (b"[" * 100_000, "^looks like JSON, but "),
        (b'{"quote": "z!"}', "^looks like a GetQuote answer, but quote: hex text expected, got 'z!'$"),
        (b'{"quote": 5}', "^looks like a GetQuote answer, but quote: hex text expected, got int$"),
        (b'{"attestation": "00"}', "^looks like an answer with an attestation, but Failed to decode legacy"),
        (b'{"csr": "00"}', "^looks like a SignCert request, but "),
        (b'[{"imr": 0, "event_type": -1}]', "^looks like an event log, but event: event_type: 32-bit number expected"),
        (b"0\x82\xff\xff", "^looks like DER, but DER: 65535 bytes of content announced, 0 present$"),
        (b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", "^looks like PEM, but "),
        (b"-----BEGIN nothing", "^PEM of certificates or a CRL expected, got no whole label$"),
        (b"a" * (MAX_INPUT_SIZE + 1), f"^input of at most {MAX_INPUT_SIZE} bytes expected, got more$"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(data: bytes, refusal: str) -> None:
    with pytest.raises(FormatError, match=refusal) as refused:
        inspect_input(data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "size", "refusal"),
    [
        ("quote 4", 700, "looks like a quote, but quote: "),
        ("quote 5 of TD15", 640, "looks like a quote, but quote: 648 bytes expected"),
        ("attestation V0", 900, "looks like a versioned attestation, but Failed to decode legacy VersionedAttestation"),
        ("attestation V1", 900, "looks like a versioned attestation, but failed to decode attestation from msgpack"),
        ("request 2", 200, "looks like a dstack signing request, but as version 2: .*; as version 1: "),
        ("RA-TLS DER", 900, "looks like DER, but DER: "),
    ],
)
def test_what_is_cut_short_is_still_named(name: str, size: int, refusal: str) -> None:
    with pytest.raises(FormatError, match=f"^{refusal}"):
        inspect_input(kinds()[name][0][:size])


def test_quote_inside_evidence_that_cannot_be_read_leaves_the_rest() -> None:
    evidence = world().evidence
    broken = evidence.encode().replace(evidence.quote[:8], b"\x09" + evidence.quote[1:8], 1)
    found = inspect_input(broken)
    assert found.sure is False
    assert found.description["quote"].startswith("cannot be read: quote: version 4 or 5")
    assert len(found.description["event_log"]) == len(evidence.event_log)


def test_texts_of_others_cannot_play_tricks_on_a_terminal() -> None:
    log = [{"imr": 3, "event_type": 1, "event": "\x1b[2J\u202e\ud83d\ude00", "event_payload": "1b5b324a"}]
    text = "\n".join(lines_of(inspect_input(json.dumps(log).encode())))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"\x1b[2J\u202e" in text


def samples() -> Iterator[bytes]:
    yield from (data for data, _ in kinds().values())
    yield from (evidence_of(name) for name in BOOTS)
    yield from (pem.encode() for pem in golden_certificates(golden("certificates.json")["certificates"]))


def test_lines_fit_a_hundred_columns_and_json_shortens_nothing() -> None:
    for data in samples():
        assert_fits_and_shortens_nothing(data)


def assert_fits_and_shortens_nothing(data: bytes) -> None:
    found = inspect_input(data)
    assert max(map(len, lines_of(found))) <= WIDTH
    assert "…" not in json.dumps(as_json(found.description), ensure_ascii=False)


def test_hostile_tables_and_names_fit_too() -> None:
    wide = {f"{i:040}": "x" * 900 for i in range(40)}
    document = {"tcbInfo": {"a" * 500: "b" * 5000, "c" * 300: [wide, wide], "d": {"e" * 200: {"f" * 200: "g" * 300}}}}
    assert max(map(len, lines_of(inspect_input(json.dumps(document).encode())))) <= WIDTH
