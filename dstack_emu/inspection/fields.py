"""The contents of evidence, certificates and collateral, field by field.

A description is plain data (dicts, lists, texts, numbers, bytes, dates, `Named`), complete and in the protocol's words;
`cli.commands.inspect` renders it for a terminal. Nothing is verified here. A part that cannot be read is replaced by a
text that says why.

Sources of the names: TCG PC Client Platform Firmware Profile 1.06, section 10.4.1 (event types); Intel TDX Module ABI
specification (TD attributes); Intel SDM volume 1, section 13.1 (the bits of XFAM).
"""

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest import certificate as certificates
from dstack_emu.attest.app_info import UNKNOWN_DEVICE_ID, AppInfo, decode_app_info
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import UNREADABLE
from dstack_emu.attest.collateral import earliest_expiry
from dstack_emu.attest.csr import SigningRequest
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.eventlog import TdxEvent, require_unambiguous
from dstack_emu.attest.pck import OID_SGX_EXTENSION, SGX_TYPES, device_id, pck_extension_of
from dstack_emu.attest.quote import ATTESTATION_KEY_ECDSA_P256, TEE_TYPE_TDX, Quote, TdReport, qe_report_data
from dstack_emu.attest.verify import DEBUG_BIT
from dstack_emu.inspection.checks import Evidence, replayed
from dstack_emu.simulator.intel import EMULATED

Description = dict[str, Any]

MAX_NESTING: Final = 32

UNREAD: Final = "cannot be read: "
UNKNOWN_NAME: Final = "?"
NO_DEVICE: Final = "unknown: SHA-256 of nothing"

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

_EVENT_TAG: Final = 0x6
_VARIABLES: Final = (0x80000001, 0x80000002, 0x8000000C, 0x800000E0)
_BLOBS: Final = (0x8000000A, 0x8000000B)
_EVENT_TYPES: Final = {
    0x0: "PREBOOT_CERT",
    0x1: "POST_CODE",
    0x3: "NO_ACTION",
    0x4: "SEPARATOR",
    0x5: "ACTION",
    _EVENT_TAG: "EVENT_TAG",
    0x7: "S_CRTM_CONTENTS",
    0x8: "S_CRTM_VERSION",
    0x9: "CPU_MICROCODE",
    0xA: "PLATFORM_CONFIG_FLAGS",
    0xB: "TABLE_OF_DEVICES",
    0xC: "COMPACT_HASH",
    0xD: "IPL",
    0xE: "IPL_PARTITION_DATA",
    0x12: "NONHOST_INFO",
    0x13: "OMIT_BOOT_DEVICE_EVENTS",
    0x08000001: "dstack runtime event",
    0x80000001: "EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EFI_VARIABLE_BOOT",
    0x80000003: "EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EFI_GPT_EVENT",
    0x80000007: "EFI_ACTION",
    0x80000008: "EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EFI_HANDOFF_TABLES",
    0x8000000A: "EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EFI_HANDOFF_TABLES2",
    0x8000000C: "EFI_VARIABLE_BOOT2",
    0x80000010: "EFI_HCRTM_EVENT",
    0x800000E0: "EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EFI_SPDM_FIRMWARE_CONFIG",
}
_BINARY_EVENTS: Final = ("app-id", "compose-hash", "instance-id", "os-image-hash", "mr-kms", "init-script-hash")
"""Runtime events whose payload is a hash or an identifier, even if its bytes happen to be letters."""

_OWN_EXTENSIONS: Final = {
    certificates.OID_TDX_QUOTE: "TDX quote (legacy)",
    certificates.OID_EVENT_LOG: "event log (legacy)",
    certificates.OID_APP_ID: "app id",
    certificates.OID_USAGE: "special usage",
    certificates.OID_ATTESTATION: "versioned attestation",
    certificates.OID_APP_INFO: "app info",
    OID_SGX_EXTENSION: "SGX extension",
}
_KEY_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)
_PURPOSES: Final = {ExtendedKeyUsageOID.SERVER_AUTH: "server auth", ExtendedKeyUsageOID.CLIENT_AUTH: "client auth"}


@dataclass(frozen=True, slots=True)
class Named:
    """A number of the protocol and its name."""

    value: int
    name: str


def as_json(value: Any) -> Any:
    """Return a description as JSON can hold it: bytes in hex, dates in ISO 8601, a `Named` as {value, name}."""
    if isinstance(value, dict):
        return {key: as_json(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(child) for child in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime.datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%SZ")
    return asdict(value) if isinstance(value, Named) else value


def load_json(text: str | bytes) -> Any:
    """Parse JSON of bounded depth; raise `FormatError` for anything else."""
    try:
        # Numbers with a point occur in none of these documents; kept as text, not one of them is infinite.
        value = json.loads(text, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise FormatError(str(error)) from error
    level = [value]
    for _ in range(MAX_NESTING):
        nested = [one for one in level if isinstance(one, (dict, list))]
        level = [child for one in nested for child in (one.values() if isinstance(one, dict) else one)]
    if any(isinstance(one, (dict, list)) for one in level):
        raise FormatError(f"at most {MAX_NESTING} levels of JSON expected, got more")
    return value


# ---- evidence


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
        out["app_info"] = _describe_app_info(info)
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
        "subject": _name_of(leaf, "subject"),
        "issuer": _name_of(leaf, "issuer"),
        "root": _name_of(root, "subject"),
        "emulated": _is_emulated(root),
        "not_before": _attempt(lambda: leaf.not_valid_before_utc),
        "not_after": _attempt(lambda: leaf.not_valid_after_utc),
        **_describe_sgx_extension(leaf),
    }
    return {"pck_certificate": described, "pck_chain": [_describe_briefly(one) for one in chain]}


def _describe_sgx_extension(certificate: x509.Certificate) -> Description:
    try:
        pck = pck_extension_of(certificate)
    except FormatError as error:
        return {"sgx_extension": f"{UNREAD}{error}"}
    return {
        "ppid": pck.ppid,
        "device_id": device_id(pck.ppid),
        "fmspc": pck.fmspc,
        "cpu_svn": pck.cpu_svn,
        "component_svns": list(pck.component_svns or pck.cpu_svn),
        "pce_svn": pck.pce_svn,
        "pce_id": pck.pce_id,
        "sgx_type": Named(pck.sgx_type, SGX_TYPES[pck.sgx_type] if pck.sgx_type < len(SGX_TYPES) else UNKNOWN_NAME),
        "platform_instance_id": pck.platform_instance_id,
        "dynamic_platform": pck.dynamic_platform,
        "cached_keys": pck.cached_keys,
        "smt_enabled": pck.smt_enabled,
    }


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


def describe_log(log: Iterable[TdxEvent]) -> list[Description]:
    """Describe every event, with the digest that a replay computes for runtime events."""
    out = []
    for index, event in enumerate(log):
        line: Description = {
            "index": index,
            "imr": event.imr,
            "event_type": Named(event.event_type, _EVENT_TYPES.get(event.event_type, UNKNOWN_NAME)),
            "event": event.event,
            "payload": event.event_payload,
            "payload_text": _payload_text(event),
            "digest": event.digest,
            "version": event.version,
        }
        if event.is_runtime:
            line["computed_digest"] = computed = event.runtime().digest()
            line["digest_agrees"] = None if not event.digest else event.digest == computed
        if event.preimage is not None:
            line["preimage"] = event.preimage
        out.append(line)
    return out


def _payload_text(event: TdxEvent) -> str | None:
    """Return a payload as readable text, or None if it is best shown as bytes."""
    data = event.event_payload
    if event.is_runtime and event.event in _BINARY_EVENTS:
        return None
    if event.event_type in _VARIABLES:  # GUID[16], length of the name u64, of the data u64, name in UTF-16
        size = 2 * int.from_bytes(data[16:24], "little")
        data = data[32 : 32 + size].decode("utf-16-le", errors="replace").encode()
    elif event.event_type in _BLOBS:  # length of the description u8, description
        data = data[1 : 1 + data[0]] if data else b""
    elif event.event_type == _EVENT_TAG:  # id u32, length u32, content
        data = data[8:]
    try:
        text = data.rstrip(b"\0").replace(b"\0", b" ").decode()
    except UnicodeDecodeError:
        return None
    return text if text and text.isprintable() else None


def describe_replay(attestation: Attestation, report: TdReport | None) -> list[Description]:
    """Compare what the log replays to with each quoted register."""
    out = []
    for imr in range(4):
        register, quoted = replayed(attestation, imr), report.rtmrs[imr] if report else None
        if register is None:
            result = "cannot: the log lacks events"
        elif quoted is None:
            result = "nothing to compare with"
        else:
            result = "equal" if register == quoted else "differs"
        line: Description = {"register": f"RTMR{imr}", "replayed": register, "quoted": quoted, "result": result}
        out.append(line | {"events": sum(event.imr == imr for event in attestation.event_log)})
    return out


def _describe_app_info(info: AppInfo) -> Description:
    out = asdict(info)
    provider = out.pop("key_provider_info")
    try:
        out["key_provider"] = load_json(provider)
    except FormatError:
        out["key_provider"] = provider
    if info.device_id == UNKNOWN_DEVICE_ID:
        out["device_id_means"] = NO_DEVICE
    if not info.init_script_hashes:
        del out["init_script_hashes"]
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


# ---- certificates and collateral


def describe_certificates(chain: Sequence[x509.Certificate]) -> list[Description]:
    """Describe every certificate of a chain, and whether the next one signed it."""
    out = [_describe_certificate(one) for one in chain]
    for described, one, issuer in zip(out, chain, chain[1:], strict=False):
        described["signed_by_the_next"] = _is_signed_by(one, issuer)
    return out


def _describe_certificate(certificate: x509.Certificate) -> Description:
    out: Description = {
        "kind": _attempt(lambda: _kind(certificate)),
        "subject": _name_of(certificate, "subject"),
        "issuer": _name_of(certificate, "issuer"),
        **({"emulated": True} if _is_emulated(certificate) else {}),
        "serial_number": f"{certificate.serial_number:x}",
        "not_before": _attempt(lambda: certificate.not_valid_before_utc),
        "not_after": _attempt(lambda: certificate.not_valid_after_utc),
        "public_key": _attempt(lambda: _key_name(certificate)),
        "spki": _attempt(lambda: certificates.certificate_spki(certificate)),
        "sha256": certificate.fingerprint(hashes.SHA256()),
    }
    try:
        out |= _describe_extensions(certificate)
    except UNREADABLE as error:
        return out | {"extensions": f"{UNREAD}{error}"}
    return out | _describe_evidence_in(certificate)


def _kind(certificate: x509.Certificate) -> str:
    oids = {extension.oid for extension in certificate.extensions}
    if certificates.OID_ATTESTATION in oids:
        return "RA-TLS certificate (versioned attestation)"
    if certificates.OID_TDX_QUOTE in oids:
        return "RA-TLS certificate (legacy: quote and event log)"
    return "PCK certificate" if OID_SGX_EXTENSION in oids else "X.509 certificate"


def _describe_extensions(certificate: x509.Certificate) -> Description:
    """Describe the standard extensions and dstack's small ones by their content, and all in a table."""
    out: Description = {}
    table = []
    for extension in certificate.extensions:
        value = extension.value
        match value:
            case x509.BasicConstraints():
                out |= {"ca": value.ca, "path_length": value.path_length}
            case x509.KeyUsage():
                out["key_usage"] = [name for name in _KEY_USAGES if getattr(value, name)]
            case x509.ExtendedKeyUsage():
                out["extended_key_usage"] = [_PURPOSES.get(oid, oid.dotted_string) for oid in value]
            case x509.SubjectAlternativeName():
                out["alternative_names"] = [str(name.value) for name in value]
            case x509.UnrecognizedExtension() if value.oid == OID_SGX_EXTENSION:
                out |= _describe_sgx_extension(certificate)
            case x509.UnrecognizedExtension() if value.oid in _OWN:
                key, read = _OWN[value.oid]
                out[key] = _attempt(partial(read, certificate))
        name = _OWN_EXTENSIONS.get(extension.oid, UNKNOWN_NAME)
        table.append(
            {
                "oid": extension.oid.dotted_string,
                "name": name if isinstance(value, x509.UnrecognizedExtension) else type(value).__name__,
                "critical": extension.critical,
                "bytes": len(value.value) if isinstance(value, x509.UnrecognizedExtension) else None,
            }
        )
    return out | {"extensions": table}


def _app_info(certificate: x509.Certificate) -> Description | None:
    info = certificates.app_info_of(certificate)
    return None if info is None else _describe_app_info(info)


_OWN: Final[dict[x509.ObjectIdentifier, tuple[str, Callable[[x509.Certificate], Any]]]] = {
    certificates.OID_USAGE: ("usage", certificates.usage_of),
    certificates.OID_APP_ID: ("app_id", certificates.app_id_of),
    certificates.OID_APP_INFO: ("app_info", _app_info),
}


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


def _describe_briefly(certificate: x509.Certificate) -> Description:
    return {
        "subject": _name_of(certificate, "subject"),
        "issuer": _name_of(certificate, "issuer"),
        "not_after": _attempt(lambda: certificate.not_valid_after_utc),
        "sha256": certificate.fingerprint(hashes.SHA256()),
    }


def describe_crl(crl: x509.CertificateRevocationList) -> Description:
    """Describe a revocation list."""
    return {
        "issuer": _name_of(crl, "issuer"),
        "emulated": _is_emulated(crl),
        "last_update": _attempt(lambda: crl.last_update_utc),
        "next_update": _attempt(lambda: crl.next_update_utc),
        "number": _attempt(lambda: crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number),
        "sha256": hashlib.sha256(crl.public_bytes(Encoding.DER)).digest(),
        "revoked": _attempt(
            lambda: [{"serial_number": f"{one.serial_number:x}", "date": one.revocation_date_utc} for one in crl]
        ),
    }


def describe_collateral(collateral: QuoteCollateralV3) -> Description:
    """Describe the four documents and their issuers."""

    def chain(pem: str) -> Any:
        return _attempt(lambda: [_describe_briefly(one) for one in x509.load_pem_x509_certificates(pem.encode())])

    def crl(data: bytes) -> Any:
        return _attempt(lambda: describe_crl(x509.load_der_x509_crl(data)))

    return {
        "valid_until": _attempt(lambda: datetime.datetime.fromtimestamp(earliest_expiry(collateral), datetime.UTC)),
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


def _attempt(read: Callable[[], Any]) -> Any:
    """Read a field; return a text if it is malformed."""
    try:
        return read()
    except (*UNREADABLE, x509.ExtensionNotFound, AttestError) as error:
        return f"{UNREAD}{error}"


def _name_of(document: x509.Certificate | x509.CertificateRevocationList, which: str) -> str:
    text: str = _attempt(lambda: getattr(document, which).rfc4514_string())
    return text


def _is_emulated(document: x509.Certificate | x509.CertificateRevocationList) -> bool:
    """Return whether the issuer's name is this emulator's; no signature is checked."""
    return EMULATED in _name_of(document, "issuer")


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*UNREADABLE, InvalidSignature):
        return False
    return True


def _key_name(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return f"RSA {key.key_size}" if isinstance(key, rsa.RSAPublicKey) else type(key).__name__
