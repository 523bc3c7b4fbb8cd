"""The contents of evidence and collateral, field by field. Nothing is verified here.

Sources of the names: Intel TDX Module ABI specification (TD attributes); Intel SDM volume 1, section 13.1 (the bits of
XFAM).
"""

import datetime
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Final

from cryptography import x509
from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest import certificate as certificates
from dstack_emu.attest.app_info import UNKNOWN_DEVICE_ID, decode_app_info
from dstack_emu.attest.certificate import UNREADABLE
from dstack_emu.attest.collateral import earliest_expiry
from dstack_emu.attest.csr import SigningRequest
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.eventlog import require_unambiguous
from dstack_emu.attest.pck import device_id
from dstack_emu.attest.quote import ATTESTATION_KEY_ECDSA_P256, TEE_TYPE_TDX, Quote, TdReport, qe_report_data
from dstack_emu.attest.verify import DEBUG_BIT
from dstack_emu.inspection.certificate_fields import (
    describe_briefly,
    describe_certificate,
    describe_crl,
    describe_sgx_extension,
    is_emulated,
    is_signed_by,
    name_of,
)
from dstack_emu.inspection.checks import Evidence
from dstack_emu.inspection.description import UNKNOWN_NAME, UNREAD, Description, Named, attempt, load_json
from dstack_emu.inspection.log_fields import describe_app_info, describe_log, describe_replay

_TD_ATTRIBUTES: Final = {
    0: "DEBUG",
    4: "HGS_PLUS_PROF",
    5: "PERF_PROF",
    6: "PMT_PROF",
    16: "ICSSD",
    27: "LASS",
    28: "SEPT_VE_DISABLE",
    29: "MIGRATABLE",
    30: "PKS",
    31: "KL",
    62: "TPA",
    63: "PERFMON",
}
_SEPT_VE_DISABLE: Final = 28
_XFAM: Final = {
    0: "x87",
    1: "SSE",
    2: "AVX",
    3: "BNDREGS",
    4: "BNDCSR",
    5: "opmask",
    6: "ZMM_Hi256",
    7: "Hi16_ZMM",
    8: "PT",
    9: "PKRU",
    10: "PASID",
    11: "CET_U",
    12: "CET_S",
    13: "HDC",
    14: "UINTR",
    15: "LBR",
    16: "HWP",
    17: "XTILECFG",
    18: "XTILEDATA",
}


def describe_evidence(evidence: Evidence) -> Description:
    """Describe a quote and what came with it: log, replay, app info, configuration."""
    out: Description = {}
    ppid, report = b"", None
    try:
        quote = Quote.parse(evidence.quote)
    except FormatError as error:
        out["quote"] = f"{UNREAD}{error}"
    else:
        report = quote.report
        out |= _describe_quote(quote)
        ppid = out["pck_certificate"].get("ppid", b"")
        out["report_data"] = _describe_report_data(evidence, report.report_data)
    attestation = evidence.attestation
    if attestation is None:
        return out
    if attestation.report_data_payload is not None:
        out["report_data_payload"] = attestation.report_data_payload
    out["event_log"] = describe_log(attestation.event_log)
    out["replay"] = describe_replay(attestation, report)
    try:
        require_unambiguous(attestation.runtime_events)
        device = device_id(ppid) if ppid else UNKNOWN_DEVICE_ID
        info = decode_app_info(attestation, vm_config=evidence.vm_config, device_id=device)
        out["app_info"] = describe_app_info(info)
    except AttestError as error:
        out["app_info"] = f"{UNREAD}{error}"
    if config := evidence.vm_config or attestation.config:
        out["config"] = _describe_config(config)
    return out


def describe_request(request: SigningRequest, version: int, signature: bytes | None) -> Description:
    """Describe a signing request without its evidence."""
    out = {"version": version, "confirm": request.confirm, "public_key": request.public_key, **asdict(request.config)}
    return out if signature is None else out | {"signature": signature}


def _describe_quote(quote: Quote) -> Description:
    header, signature, qe = quote.header, quote.signature, quote.signature.qe_report
    key_type = "ECDSA P-256" if header.attestation_key_type == ATTESTATION_KEY_ECDSA_P256 else UNKNOWN_NAME
    named = qe_report_data(signature.attestation_key, signature.qe_authentication_data)
    return {
        "header": {
            "version": header.version,
            "attestation_key_type": Named(header.attestation_key_type, key_type),
            "tee_type": Named(header.tee_type, "TDX" if header.tee_type == TEE_TYPE_TDX else UNKNOWN_NAME),
            "qe_svn": header.qe_svn,
            "pce_svn": header.pce_svn,
            "qe_vendor_id": header.qe_vendor_id,
            "user_data": header.user_data,
        },
        "td_report": _describe_td_report(quote.report),
        "signature_data": {
            "signature": signature.signature,
            "attestation_key": signature.attestation_key,
            "qe_report_signature": signature.qe_report_signature,
            "qe_authentication_data": signature.qe_authentication_data,
            **({"after_the_quote": quote.trailing} if quote.trailing else {}),
        },
        "qe_report": {
            "cpu_svn": qe[0:16],
            "misc_select": qe[16:20],
            "attributes": qe[48:64],
            "mr_enclave": qe[64:96],
            "mr_signer": qe[128:160],
            "isv_prod_id": int.from_bytes(qe[256:258], "little"),
            "isv_svn": int.from_bytes(qe[258:260], "little"),
            "report_data": qe[320:384],
            "names_the_attestation_key": qe[320:384] == named,
        },
        **_describe_pck_chain(signature.pck_chain),
    }


def _describe_td_report(report: TdReport) -> Description:
    out: Description = {}
    for field in fields(report):
        value: bytes = getattr(report, field.name)
        out[field.name] = value
        if field.name == "tee_tcb_svn":
            out["tdx_module"] = f"version {value[1]}, SVN {value[0]}"
        elif field.name == "td_attributes":
            number = int.from_bytes(value, "little")
            out["debug"] = bool(number & DEBUG_BIT)
            out["sept_ve_disable"] = bool(number >> _SEPT_VE_DISABLE & 1)
            out["td_attributes_set"] = _bits(number, _TD_ATTRIBUTES)
        elif field.name == "xfam":
            out["xfam_features"] = _bits(int.from_bytes(value, "little"), _XFAM)
    return out


def _bits(number: int, names: dict[int, str]) -> list[str]:
    return [names.get(bit, f"bit {bit}") for bit in range(number.bit_length()) if number >> bit & 1]


def _describe_pck_chain(pem: bytes) -> Description:
    try:
        chain = x509.load_pem_x509_certificates(pem)
    except UNREADABLE as error:
        return {"pck_certificate": {"chain": f"{UNREAD}{error}"}}
    leaf, root = chain[0], chain[-1]
    described = {
        "subject": name_of(leaf, "subject"),
        "issuer": name_of(leaf, "issuer"),
        "root": name_of(root, "subject"),
        "emulated": is_emulated(root),
        "not_before": attempt(lambda: leaf.not_valid_before_utc),
        "not_after": attempt(lambda: leaf.not_valid_after_utc),
        **describe_sgx_extension(leaf),
    }
    return {"pck_certificate": described, "pck_chain": [describe_briefly(one) for one in chain]}


def _describe_report_data(evidence: Evidence, quoted: bytes) -> Description:
    out: Description = {"quoted": quoted}
    if evidence.stated is not None:
        out |= {"stated": evidence.stated, "stated_equals_quoted": evidence.stated == quoted}
    content = quoted.rstrip(b"\0")
    if content and content.isascii() and content.decode().isprintable():
        out["text"] = content.decode()
    if evidence.binding is not None:
        out |= {"ought_to_bind": evidence.binding.to, "binds_it": evidence.binding.report_data == quoted}
    elif content.startswith(b"dip1::"):
        out["means"] = "the public key that the guest agent's Sign signs with"
    elif not content:
        out["means"] = "binds nothing: the evidence only identifies the domain"
    return out


def _describe_config(text: str) -> Any:
    """Parse a configuration's JSON, including the VM's within it; return the text if it is not JSON."""
    try:
        value = load_json(text)
    except FormatError:
        return text
    if isinstance(value, dict) and isinstance(value.get("vm_config"), str):
        value["vm_config"] = _describe_config(value["vm_config"])
    return value


def describe_certificates(chain: Sequence[x509.Certificate]) -> list[Description]:
    """Describe every certificate of a chain with the evidence in it, and whether the next one signed it."""
    out = [describe_certificate(one) | _describe_evidence_in(one) for one in chain]
    for described, one, issuer in zip(out, chain, chain[1:], strict=False):
        described["signed_by_the_next"] = is_signed_by(one, issuer)
    return out


def _describe_evidence_in(certificate: x509.Certificate) -> Description:
    try:
        evidence = Evidence.of_certificate(certificate)
        packed = certificates.extension_payload(certificate, certificates.OID_EVENT_LOG) or b""
    except FormatError as error:
        return {"evidence": f"{UNREAD}{error}"}
    if evidence is None:
        return {}
    compressed = evidence.stated is None and packed.startswith(certificates.GZIP_MAGIC)
    form = {"event_log_form": "compressed (ELGZv1): dstack's own reader refuses it"} if compressed else {}
    return form | {"evidence": describe_evidence(evidence)}


def describe_collateral(collateral: QuoteCollateralV3) -> Description:
    """Describe the four documents and their issuers."""

    def chain(pem: str) -> Any:
        return attempt(lambda: [describe_briefly(one) for one in x509.load_pem_x509_certificates(pem.encode())])

    def crl(data: bytes) -> Any:
        return attempt(lambda: describe_crl(x509.load_der_x509_crl(data)))

    return {
        "valid_until": attempt(lambda: datetime.datetime.fromtimestamp(earliest_expiry(collateral), datetime.UTC)),
        "tcbInfo": _describe_config(collateral.tcb_info),
        "tcb_info_signature": collateral.tcb_info_signature,
        "tcb_info_issuer_chain": chain(collateral.tcb_info_issuer_chain),
        "enclaveIdentity": _describe_config(collateral.qe_identity),
        "qe_identity_signature": collateral.qe_identity_signature,
        "qe_identity_issuer_chain": chain(collateral.qe_identity_issuer_chain),
        "pck_crl": crl(collateral.pck_crl),
        "pck_crl_issuer_chain": chain(collateral.pck_crl_issuer_chain),
        "root_ca_crl": crl(collateral.root_ca_crl),
    }
