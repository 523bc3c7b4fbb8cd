"""What some bytes are, and what stands in them: quotes, attestations, certificates, requests, collateral.

They may come in binary, hex, base64, PEM, or inside JSON; what they are is found by decoding. A description is plain
data (dicts, lists, texts, numbers, bytes, `Named`), complete and in the protocol's words; how it looks on a terminal is
`stack.commands.inspect`'s business. Nothing is verified here, and private keys are named at most, never shown.

Sources of the names: TCG PC Client Platform Firmware Profile 1.06 (event types), Intel TDX Module ABI specification
(TD attributes), Intel SDM volume 1, section 13.1 (the bits of XFAM).
"""

import base64
import binascii
import datetime
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, NoReturn

import dcap_qvl
import msgpack
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from attest import attestation as attestations
from attest import certificate as certificates
from attest import der
from attest.app_info import UNKNOWN_DEVICE_ID, AppInfo, decode_app_info
from attest.attestation import Attestation, from_quote_and_log
from attest.certificate import UNREADABLE
from attest.collateral import earliest_expiry
from attest.csr import CONFIRM, SigningRequest
from attest.errors import AttestError, FormatError
from attest.eventlog import RUNTIME_EVENT_TYPE, TdxEvent, log_from_json, replay_register, replay_runtime
from attest.pck import OID_SGX_EXTENSION, SGX_TYPES, device_id, pck_extension_of
from attest.quote import QE_VENDOR_ID, Quote, TdReport, TdReport15, qe_report_data
from attest.report_data import bootstrap_report_data, ratls_report_data
from simulator.intel import EMULATED

MAX_SIZE: Final = 10 * 1024 * 1024
MAX_NESTING: Final = 32
MAX_LEGACY_LOG: Final = 16 * 1024

Description = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Named:
    """A number of the protocol and what it is called."""

    value: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What the report_data ought to say, and what that would bind."""

    to: str
    report_data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verifier could judge: a quote, and what came with it.

    `attestation` is None for a bare quote. `stated` is the report_data that the input names beside the quote, `other`
    the same evidence in a second form, `signature` a signing request's own.
    """

    quote: bytes
    attestation: Attestation | None = None
    stated: bytes | None = None
    binding: Binding | None = None
    vm_config: str = ""
    other: Attestation | None = None
    request: SigningRequest | None = None
    signature: bytes | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What some input is.

    Without `sure` it decodes as that, but has little to tell it from something else. `form` is the encodings, outermost
    first (none: binary). Without `evidence`, `obstacle` may say why evidence that is there cannot be read.
    """

    what: str
    description: Description
    evidence: Evidence | None = None
    sure: bool = True
    form: tuple[str, ...] = ()
    obstacle: str = ""


def inspect_input(data: bytes) -> Finding:
    """Find out what the input is, and describe it; raise `FormatError`, in one line, for what it cannot be."""
    if len(data) > MAX_SIZE:
        raise FormatError(f"input of at most {MAX_SIZE} bytes expected, got more")
    if found := _recognise(data):
        return found
    got = f"{len(data)} bytes beginning {data[:8].hex()}" if data else "nothing"
    raise FormatError(
        "unknown input: a quote, versioned attestation, certificate, CRL, signing request, collateral or event log "
        f"expected (tried binary, hex, base64, PEM, JSON), got {got}"
    )


def replayed(attestation: Attestation, imr: int) -> bytes | None:
    """Replay a register from the log; None where the log lacks the events, as one cut down for a certificate does."""
    if imr == 3:
        return replay_runtime(attestation.runtime_events)
    log = attestation.event_log
    if all(event.is_acpi_data for event in log if event.imr == imr):
        return None
    return replay_register(log, imr)


# ---- recognising


def _recognise(data: bytes, depth: int = 0) -> Finding | None:
    for reader in (_read_quote, _read_attestation, _read_signing_request, _read_der):
        if found := reader(data):
            return found
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None
    if text[:1] in ("{", "[", '"'):
        return _read_json(text, depth)
    if "-----BEGIN " in text:
        return _read_pem(text)
    for form, decode in (("hex", _from_hex), ("base64", _from_base64)):
        inner = decode("".join(text.split()))
        if inner and depth < 3 and (found := _recognise(inner, depth + 1)):
            return replace(found, form=(form, *found.form))
    return None


def _from_hex(text: str) -> bytes:
    try:
        return binascii.unhexlify(text.removeprefix("0x").removeprefix("0X"))
    except ValueError:
        return b""


def _from_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, padded or not."""
    body = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except ValueError:
        return b""


def _looks_like(what: str, error: Exception) -> NoReturn:
    raise FormatError(f"looks like {what}, but {error}") from error


def _read_quote(data: bytes) -> Finding | None:
    if data[12:28] != QE_VENDOR_ID and not (data[:2] in (b"\4\0", b"\5\0") and data[4:8] == b"\x81\0\0\0"):
        return None
    try:
        quote = Quote.parse(data)
    except FormatError as error:
        _looks_like("a quote", error)
    evidence = Evidence(quote=data)
    return Finding(_quote_name(quote), _describe_evidence(evidence), evidence)


def _quote_name(quote: Quote) -> str:
    return f"TDX quote, version {quote.header.version} ({'TD15' if isinstance(quote.report, TdReport15) else 'TD10'})"


def _read_attestation(data: bytes) -> Finding | None:
    try:
        attestation = attestations.decode(data)
    except FormatError as error:
        if (data[:2] == b"\0\0" and b"\x02\0\x81\0\0\0" in data[:16]) or b"\xa7version" in data[:16]:
            _looks_like("a versioned attestation", error)
        return None
    return _attestation_finding(attestation)


def _attestation_finding(attestation: Attestation, binding: Binding | None = None) -> Finding:
    evidence = Evidence(
        quote=attestation.quote, attestation=attestation, stated=attestation.report_data, binding=binding
    )
    form = "V0 (SCALE)" if attestation.wire == 0 else "V1 (msgpack)"
    kind = "" if attestation.report_data_payload is None else ", of a pod"
    return Finding(
        f"versioned attestation {form}{kind}",
        _describe_evidence(evidence),
        evidence,
        sure=not isinstance(_quote_or_reason(attestation.quote), str),
    )


def _read_signing_request(data: bytes) -> Finding | None:
    errors = []
    for version in (2, 1):
        try:
            return _request_finding(SigningRequest.parse(data, version), version)
        except FormatError as error:
            errors.append(f"as version {version}: {error}")
    if data[1 : 1 + len(CONFIRM)] == CONFIRM.encode():
        _looks_like("a dstack signing request", FormatError("; ".join(errors)))
    return None


def _request_finding(request: SigningRequest, version: int, signature: bytes | None = None) -> Finding:
    evidence = Evidence(
        quote=request.attestation.quote,
        attestation=request.attestation,
        stated=request.attestation.report_data if version == 2 else None,
        binding=_binding_to_key("the requested certificate's key", request.public_key),
        request=request,
        signature=signature,
    )
    description: Description = {
        "signing_request": {
            "version": version,
            "confirm": request.confirm,
            "public_key": request.public_key,
            **asdict(request.config),
        }
    }
    if signature is not None:
        description["signing_request"]["signature"] = signature
    return Finding(
        f"dstack certificate signing request, version {version}",
        description | _describe_evidence(evidence),
        evidence,
        sure=request.confirm == CONFIRM,
    )


def _binding_to_key(whose: str, spki: bytes) -> Binding:
    return Binding(to=f"{whose} (ratls-cert)", report_data=ratls_report_data(spki))


def _read_der(data: bytes) -> Finding | None:
    if data[:1] != b"\x30":
        return None
    elements, rest = [], data
    while rest:
        try:
            content, after = der.read(rest, der.SEQUENCE, "DER")
        except FormatError as error:
            if data[1:2] in (b"\x81", b"\x82", b"\x83"):  # no text has these: it is not hex that begins with a 0
                _looks_like("DER", error)
            return None
        elements.append(rest[: len(rest) - len(after)])
        rest = after
        del content
    try:
        return replace(_certificates_finding([certificates.load_der(one) for one in elements]), form=("DER",))
    except FormatError:
        return _crl_finding(elements[0], "DER") if len(elements) == 1 else None


def _crl_finding(data: bytes, form: str) -> Finding | None:
    try:
        crl = x509.load_pem_x509_crl(data) if form == "PEM" else x509.load_der_x509_crl(data)
    except UNREADABLE:
        return None
    return Finding("certificate revocation list (CRL)", {"crl": _describe_crl(crl)}, form=(form,))


def _read_pem(text: str) -> Finding | None:
    labels = re.findall(r"-----BEGIN ([A-Z0-9 ]{1,40})-----", text)
    if "CERTIFICATE" in labels:
        try:
            found = _certificates_finding(x509.load_pem_x509_certificates(text.encode()))
        except UNREADABLE as error:
            _looks_like("PEM certificates", error)
        others = [label for label in labels if label != "CERTIFICATE"]
        description = found.description | ({"beside_them_not_shown": others} if others else {})
        return replace(found, description=description, form=("PEM",))
    if "X509 CRL" in labels and (crl := _crl_finding(text.encode(), "PEM")):
        return crl
    raise FormatError(f"PEM of certificates or a CRL expected, got {', '.join(labels) or 'no whole label'}")


def _certificates_finding(chain: Sequence[x509.Certificate]) -> Finding:
    described = [_describe_certificate(one) for one in chain]
    for index, (one, following) in enumerate(zip(chain, chain[1:], strict=False)):
        described[index]["signed_by_the_next"] = _is_signed_by(one, following)
    evidence, obstacle = None, ""
    for one in chain:
        try:
            evidence = evidence or _certificate_evidence(one)
        except FormatError as error:
            obstacle = obstacle or str(error)
    what = f"chain of {len(chain)} certificates, the first of them: " if len(chain) > 1 else ""
    return Finding(what + described[0]["kind"], {"certificates": described}, evidence, obstacle=obstacle)


def _certificate_evidence(certificate: x509.Certificate) -> Evidence | None:
    attestation = certificates.attestation_of(certificate)
    if attestation is None:
        return None
    is_versioned = certificates.extension_payload(certificate, certificates.OID_ATTESTATION) is not None
    return Evidence(
        quote=attestation.quote,
        attestation=attestation,
        stated=attestation.report_data if is_versioned else None,
        binding=_binding_to_key("this certificate's key", certificates.certificate_spki(certificate)),
    )


# ---- recognising JSON


def _read_json(text: str, depth: int) -> Finding | None:
    try:
        # Numbers with a point occur in none of these documents; kept as text, not one of them is infinite.
        value = json.loads(text, parse_float=str, parse_constant=str)
        _require_shallow(value)
    except (ValueError, RecursionError, FormatError) as error:
        if text.startswith('"'):
            return None
        _looks_like("JSON", error)
    if isinstance(value, str):
        found = _recognise(value.encode(errors="replace"), depth + 1) if depth < 3 else None
    elif isinstance(value, list):
        found = _read_log(value) or _read_parts(value, depth)
    else:
        found = next((found for read in _OBJECTS if (found := read(value))), None) or _read_parts(value, depth)
    return found and replace(found, form=("JSON", *found.form))


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING):
        nested = [one for one in level if isinstance(one, (dict, list))]
        level = [child for one in nested for child in (one.values() if isinstance(one, dict) else one)]
    if any(isinstance(one, (dict, list)) for one in level):
        raise FormatError(f"at most {MAX_NESTING} levels expected, got more")


def _read_log(value: list[Any]) -> Finding | None:
    if not (value and isinstance(value[0], dict) and {"imr", "event_type"} <= value[0].keys()):
        return None
    try:
        log = log_from_json(json.dumps(value))
    except FormatError as error:
        _looks_like("an event log", error)
    runtime = tuple(event.runtime() for event in log if event.is_runtime)
    attestation = Attestation(b"", log, runtime, bytes(64), "")
    return Finding("event log", {"event_log": _describe_log(log), "replay": _describe_replay(attestation, None)})


def _read_quote_answer(value: Description) -> Finding | None:
    if "quote" not in value:
        return None
    what = "TdxQuote answer" if "hash_algorithm" in value else "GetQuote answer"
    try:
        quote, stated = _octets(value, "quote"), _octets(value, "report_data")
        log, vm_config, other = value.get("event_log"), value.get("vm_config") or "", _octets(value, "attestation")
        if not isinstance(vm_config, str):
            raise FormatError(f"vm_config: text expected, got {type(vm_config).__name__}")
        if log and not isinstance(log, (str, list)):
            raise FormatError(f"event_log: JSON text or an array expected, got {type(log).__name__}")
        attestation = None
        if log:
            text = log if isinstance(log, str) else json.dumps(log)
            attestation = replace(from_quote_and_log(quote, text.encode(errors="replace")), config=vm_config)
        else:
            Quote.parse(quote)
        evidence = Evidence(
            quote=quote,
            attestation=attestation,
            stated=stated or None,
            vm_config=vm_config,
            other=attestations.decode(other) if other else None,
        )
    except FormatError as error:
        _looks_like(f"a {what}", error)
    return Finding(f"{what} (quote{', event log' if attestation else ''})", _describe_evidence(evidence), evidence)


def _read_sign_cert(value: Description) -> Finding | None:
    if "csr" not in value:
        return None
    data, signature = _octets(value, "csr"), _octets(value, "signature")
    if "api_version" not in value:
        found = _read_signing_request(data)
        if found is None or found.evidence is None or found.evidence.request is None:
            raise FormatError("looks like a SignCert request, but its csr is none")
        return _request_finding(
            found.evidence.request, found.description["signing_request"]["version"], signature or None
        )
    try:
        version = 1 if value["api_version"] == 1 else 2
        return _request_finding(SigningRequest.parse(data, version), version, signature or None)
    except FormatError as error:
        _looks_like("a SignCert request", error)


def _read_attest_answer(value: Description) -> Finding | None:
    if "attestation" not in value:
        return None
    try:
        attestation, binding, what = attestations.decode(_octets(value, "attestation")), None, "Attest answer"
        if {"ca_pubkey", "k256_pubkey"} <= value.keys():
            what = "Bootstrap answer of a KMS"
            keys = _octets(value, "ca_pubkey"), _octets(value, "k256_pubkey")
            binding = Binding(
                to="the KMS's new root keys (ca_pubkey, k256_pubkey)", report_data=bootstrap_report_data(*keys)
            )
    except FormatError as error:
        _looks_like("an answer with an attestation", error)
    found = _attestation_finding(attestation, binding)
    keys_shown = {key: _octets(value, key) for key in ("ca_pubkey", "k256_pubkey") if binding}
    return replace(found, what=f"{what}: {found.what}", description=keys_shown | found.description)


def _read_attestation_info(value: Description) -> Finding | None:
    if not {"device_id", "mr_aggregated", "os_image_hash"} <= value.keys() or "event_log" in value:
        return None
    shown = dict(value)
    ppid, device = _from_hex(str(value.get("ppid", ""))), _from_hex(str(value["device_id"]))
    if ppid:
        shown["device_id_is_sha256_of_ppid"] = device_id(ppid) == device
    elif device == UNKNOWN_DEVICE_ID:
        shown["device_id_means"] = "unknown: SHA-256 of nothing"
    return Finding("AttestationInfo answer", {"attestation_info": shown})


def _read_pccs_answer(value: Description) -> Finding | None:
    for key, what in (("tcbInfo", "TCB info"), ("enclaveIdentity", "QE identity")):
        if isinstance(value.get(key), dict):
            signature = _from_hex(str(value.get("signature", "")))
            return Finding(f"{what}, signed: a PCCS answer", {key: value[key], "signature": signature})
        if "tcbLevels" in value and (value.get("id") in ("TDX", "SGX")) == (key == "tcbInfo"):
            return Finding(f"{what} without its signature", {key: value}, sure=False)
    return None


def _read_collateral(value: Description) -> Finding | None:
    if not {"tcb_info", "qe_identity", "pck_crl"} <= value.keys():
        return None
    try:
        collateral = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(value))
    except ValueError as error:
        _looks_like("collateral (QuoteCollateralV3)", error)
    return Finding("collateral (QuoteCollateralV3)", _describe_collateral(collateral))


_OBJECTS: Final[tuple[Callable[[Description], Finding | None], ...]] = (
    _read_pccs_answer,
    _read_collateral,
    _read_quote_answer,
    _read_sign_cert,
    _read_attest_answer,
    _read_attestation_info,
)


def _read_parts(value: Any, depth: int) -> Finding | None:
    """Look for things to show in the texts of any other JSON, such as `certificate_chain` in an answer."""
    parts: list[Finding] = []
    described: list[Description] = []
    for path, text in _texts(value, "$"):
        try:
            found = _recognise(text.encode(errors="replace"), depth + 1) if len(text) >= 64 and depth < 3 else None
        except FormatError:
            continue  # a private key, say; an input of its own would be told why
        if found:
            parts.append(found)
            described.append({"at": path, "what": found.what, **found.description})
    if not parts:
        return None
    first = next((part for part in parts if part.evidence), parts[0])
    what = f"JSON with {len(parts)} part{'s' if len(parts) > 1 else ''} to show, the first of them: {parts[0].what}"
    return Finding(what, {"parts": described}, first.evidence, sure=False, obstacle=first.obstacle)


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _texts(child, f"{path}.{key}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _texts(child, f"{path}[{index}]")


def _octets(value: Description, key: str) -> bytes:
    """Read hex (or base64) of one key, nothing where it is absent or null."""
    text = value.get(key) or ""
    if not isinstance(text, str):
        raise FormatError(f"{key}: hex text expected, got {type(text).__name__}")
    compact = "".join(text.split())
    data = _from_hex(compact) or _from_base64(compact)
    if compact.removeprefix("0x") and not data:
        raise FormatError(f"{key}: hex text expected, got {text[:16]!r}")
    return data


# ---- describing evidence


def _describe_evidence(evidence: Evidence) -> Description:
    quote, attestation = _quote_or_reason(evidence.quote), evidence.attestation
    out: Description = {}
    ppid = b""
    if isinstance(quote, Quote):
        out |= _describe_quote(quote)
        ppid = out["pck_certificate"].get("ppid", b"")
        out["report_data"] = _describe_report_data(evidence, quote.report.report_data)
    else:
        out["quote"] = quote
    if attestation is None:
        return out
    if attestation.report_data_payload is not None:
        out["report_data_payload"] = attestation.report_data_payload
    out["event_log"] = _describe_log(attestation.event_log)
    out["replay"] = _describe_replay(attestation, quote.report if isinstance(quote, Quote) else None)
    try:
        device = device_id(ppid) if ppid else UNKNOWN_DEVICE_ID
        info = decode_app_info(attestation, vm_config=evidence.vm_config, device_id=device)
        out["app_info"] = _describe_app_info(info)
    except FormatError as error:
        out["app_info"] = f"cannot be read: {error}"
    if attestation.config:
        out["config"] = _describe_config(attestation.config)
    return out


def _quote_or_reason(data: bytes) -> Quote | str:
    try:
        return Quote.parse(data)
    except FormatError as error:
        return f"cannot be read: {error}"


def _describe_quote(quote: Quote) -> Description:
    header, signature = quote.header, quote.signature
    qe = signature.qe_report
    report_data = qe_report_data(signature.attestation_key, signature.qe_authentication_data)
    out: Description = {
        "header": {
            "version": header.version,
            "attestation_key_type": Named(
                header.attestation_key_type, _KEY_TYPES.get(header.attestation_key_type, "?")
            ),
            "tee_type": Named(header.tee_type, "TDX"),
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
            "names_the_attestation_key": qe[320:384] == report_data,
        },
    }
    out |= _describe_pck_chain(signature.pck_chain)
    if quote.trailing:
        out["after_the_quote"] = quote.trailing
    return out


def _describe_td_report(report: TdReport) -> Description:
    out: Description = {}
    for field in fields(report):
        value: bytes = getattr(report, field.name)
        out[field.name] = value
        if field.name == "tee_tcb_svn":
            out["tdx_module"] = f"version {value[1]}, SVN {value[0]}"
        elif field.name == "td_attributes":
            out["debug"] = bool(value[0] & 1)
            out["sept_ve_disable"] = bool(value[3] & 0x10)
            out["td_attributes_set"] = _bits(value, _TD_ATTRIBUTES)
        elif field.name == "xfam":
            out["xfam_features"] = _bits(value, _XFAM)
    return out


def _bits(value: bytes, names: dict[int, str]) -> list[str]:
    number = int.from_bytes(value, "little")
    return [names.get(bit, f"bit {bit}") for bit in range(number.bit_length()) if number >> bit & 1]


def _describe_pck_chain(pem: bytes) -> Description:
    try:
        chain = x509.load_pem_x509_certificates(pem)
    except UNREADABLE as error:
        return {"pck_certificate": {"chain": f"cannot be read: {error}"}}
    leaf = chain[0]
    out = {
        "subject": _attempt(lambda: _name(leaf.subject)),
        "issuer": _attempt(lambda: _name(leaf.issuer)),
        "root": _attempt(lambda: _name(chain[-1].subject)),
        "emulated": _is_emulated(chain[-1]),
        "not_before": _attempt(lambda: leaf.not_valid_before_utc),
        "not_after": _attempt(lambda: leaf.not_valid_after_utc),
        **_describe_pck_extension(leaf),
    }
    return {"pck_certificate": out, "pck_chain": [_describe_briefly(one) for one in chain]}


def _describe_pck_extension(certificate: x509.Certificate) -> Description:
    try:
        pck = pck_extension_of(certificate)
    except FormatError as error:
        return {"sgx_extension": f"cannot be read: {error}"}
    name = SGX_TYPES[pck.sgx_type] if pck.sgx_type < len(SGX_TYPES) else "?"
    components = pck.component_svns or pck.cpu_svn
    return {
        "ppid": pck.ppid,
        "device_id": device_id(pck.ppid),
        "fmspc": pck.fmspc,
        "cpu_svn": pck.cpu_svn,
        "component_svns": list(components),
        "pce_svn": pck.pce_svn,
        "pce_id": pck.pce_id,
        "sgx_type": Named(pck.sgx_type, name),
        "platform_instance_id": pck.platform_instance_id,
        "dynamic_platform": pck.dynamic_platform,
        "cached_keys": pck.cached_keys,
        "smt_enabled": pck.smt_enabled,
    }


def _is_emulated(certificate: x509.Certificate) -> bool:
    """Whether it names itself as one of this emulator's. Its names say so; nobody checked a signature."""
    return EMULATED in str(_attempt(lambda: certificate.issuer.rfc4514_string()))


def _describe_report_data(evidence: Evidence, quoted: bytes) -> Description:
    out: Description = {"quoted": quoted}
    if evidence.stated is not None:
        out |= {"stated": evidence.stated, "stated_equals_quoted": evidence.stated == quoted}
    text = quoted.rstrip(b"\0")
    if text.isascii() and text.decode().isprintable() and text:
        out["text"] = text.decode()
        kind, _, key = out["text"].partition("-pk:")
        if kind.startswith("dip1::") and key:
            out["text_names_key"] = _from_base64(key)
    if evidence.binding is not None:
        out |= {"ought_to_bind": evidence.binding.to, "binds_it": evidence.binding.report_data == quoted}
    elif not any(quoted):
        out["means"] = "no key or nonce: the domain was only asked who it is"
    return out


def _describe_log(log: Iterable[TdxEvent]) -> list[Description]:
    out = []
    for index, event in enumerate(log):
        line: Description = {
            "index": index,
            "imr": event.imr,
            "event_type": Named(event.event_type, _EVENT_TYPES.get(event.event_type, "?")),
            "event": event.event,
            "payload": event.event_payload,
            "payload_text": _payload_text(event),
            "digest": event.digest,
            "version": event.version,
        }
        if event.is_runtime:
            line["computed_digest"] = event.runtime().digest()
            line["digest_is_computed"] = not event.digest or event.digest == line["computed_digest"]
        if event.preimage is not None:
            line["preimage"] = event.preimage
        out.append(line)
    return out


def _payload_text(event: TdxEvent) -> str | None:
    """What a payload says to a person, or None where it is best shown as bytes."""
    data = event.event_payload
    if event.is_runtime and event.event in _BINARY_EVENTS:
        return None
    if event.event_type in _VARIABLES:  # GUID[16], name length u64, data length u64, name in UTF-16
        size = int.from_bytes(data[16:24], "little")
        data = data[32 : 32 + 2 * size].decode("utf-16-le", errors="replace").encode()
    elif event.event_type in _DESCRIBED:  # description length u8, description
        data = data[1 : 1 + data[0]] if data else b""
    elif event.event_type == _EVENT_TAG:  # id u32, length u32, content
        data = data[8:]
    try:
        text = data.rstrip(b"\0").replace(b"\0", b" ").decode()
    except UnicodeDecodeError:
        return None
    return text if text and text.isprintable() else None


def _describe_replay(attestation: Attestation, report: TdReport | None) -> list[Description]:
    out = []
    for imr in range(4):
        register = replayed(attestation, imr)
        quoted = report.rtmrs[imr] if report else None
        count = sum(event.imr == imr for event in attestation.event_log)
        if register is None:
            result = "cannot: the log lacks the events"
        elif quoted is None:
            result = "nothing to compare with"
        else:
            result = "equal" if register == quoted else "differs"
        out.append(
            {"register": f"RTMR{imr}", "events": count, "replayed": register, "quoted": quoted, "result": result}
        )
    return out


def _describe_app_info(info: AppInfo) -> Description:
    out = asdict(info)
    provider = out.pop("key_provider_info")
    try:
        decoded = json.loads(provider)
        _require_shallow(decoded)
    except (ValueError, RecursionError, FormatError):
        decoded = provider
    out["key_provider"] = decoded
    if info.device_id == UNKNOWN_DEVICE_ID:
        out["device_id_means"] = "unknown: SHA-256 of nothing"
    if not info.init_script_hashes:
        del out["init_script_hashes"]
    return out


def _describe_config(text: str) -> Any:
    """A configuration as its JSON says, that of the VM within it opened too; as it stands where it is none."""
    try:
        value = json.loads(text, parse_float=str, parse_constant=str)
        _require_shallow(value)
    except (ValueError, RecursionError, FormatError):
        return text
    if isinstance(value, dict) and isinstance(value.get("vm_config"), str):
        value["vm_config"] = _describe_config(value["vm_config"])
    return value


# ---- describing certificates and collateral


def _attempt(read: Callable[[], Any]) -> Any:
    """Read a field of X.509, which may turn out malformed only now."""
    try:
        return read()
    except (*UNREADABLE, AttestError) as error:
        return f"cannot be read: {error}"


def _name(name: x509.Name) -> str:
    return name.rfc4514_string()


def _describe_briefly(certificate: x509.Certificate) -> Description:
    return {
        "subject": _attempt(lambda: _name(certificate.subject)),
        "issuer": _attempt(lambda: _name(certificate.issuer)),
        "not_after": _attempt(lambda: certificate.not_valid_after_utc),
        "sha256": certificate.fingerprint(hashes.SHA256()),
    }


def _describe_certificate(certificate: x509.Certificate) -> Description:
    out: Description = {
        "kind": _attempt(lambda: _certificate_kind(certificate)),
        "subject": _attempt(lambda: _name(certificate.subject)),
        "issuer": _attempt(lambda: _name(certificate.issuer)),
        "emulated": _is_emulated(certificate),
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
        out["extensions"] = f"cannot be read: {error}"
    return out


def _certificate_kind(certificate: x509.Certificate) -> str:
    oids = {extension.oid for extension in certificate.extensions}
    if certificates.OID_ATTESTATION in oids:
        return "RA-TLS certificate (versioned attestation)"
    if certificates.OID_TDX_QUOTE in oids:
        return "RA-TLS certificate (legacy extensions: quote and event log)"
    if OID_SGX_EXTENSION in oids:
        return "PCK certificate"
    return "X.509 certificate"


def _key_name(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return f"RSA {key.key_size}" if isinstance(key, rsa.RSAPublicKey) else type(key).__name__


def _describe_extensions(certificate: x509.Certificate) -> Description:
    out: Description = {}
    table = []
    for extension in certificate.extensions:
        value = extension.value
        own = _OWN_EXTENSIONS.get(extension.oid)
        table.append(
            {
                "oid": extension.oid.dotted_string,
                "name": own or ("?" if isinstance(value, x509.UnrecognizedExtension) else type(value).__name__),
                "critical": extension.critical,
                "bytes": len(_attempt(value.public_bytes)),
            }
        )
        match value:
            case x509.BasicConstraints():
                out |= {"ca": value.ca, "path_length": value.path_length}
            case x509.KeyUsage():
                out["key_usage"] = [name for name in _KEY_USAGES if getattr(value, name)]
            case x509.ExtendedKeyUsage():
                out["extended_key_usage"] = [_PURPOSES.get(oid, oid.dotted_string) for oid in value]
            case x509.SubjectAlternativeName():
                out["alternative_names"] = [str(name.value) for name in value]
    if OID_SGX_EXTENSION in {extension.oid for extension in certificate.extensions}:
        out["sgx_extension"] = _describe_pck_extension(certificate)
    return out | {"extensions": table} | _describe_own_extensions(certificate)


def _describe_own_extensions(certificate: x509.Certificate) -> Description:
    """dstack's extensions: usage, app id, app info, and the evidence."""

    def payload(oid: x509.ObjectIdentifier) -> bytes | None:
        return certificates.extension_payload(certificate, oid)

    out: Description = {
        "usage": _attempt(lambda: certificates.usage_of(certificate)),
        "app_id": _attempt(lambda: payload(certificates.OID_APP_ID)),
        "app_info_extension": _attempt(lambda: _open_app_info(payload(certificates.OID_APP_INFO))),
    }
    out = {key: value for key, value in out.items() if value is not None}
    try:
        evidence = _certificate_evidence(certificate) or None
    except FormatError as error:
        evidence = _compressed_evidence(certificate)
        note = "compressed (ELGZv1), which dstack no longer reads" if evidence else f"cannot be read: {error}"
        out["evidence_note"] = note
    if evidence:
        out["evidence"] = _describe_evidence(evidence)
    return out


def _open_app_info(packed: bytes | None) -> Description | bytes | None:
    if packed is None:
        return None
    try:
        values = msgpack.unpackb(packed)
        return _describe_app_info(AppInfo(*values[:8], tuple(values[8])))
    except (ValueError, TypeError, IndexError, msgpack.UnpackException):
        return packed


def _compressed_evidence(certificate: x509.Certificate) -> Evidence | None:
    """Evidence of a legacy certificate whose event log is gzip after a magic word."""
    try:
        quote = certificates.extension_payload(certificate, certificates.OID_TDX_QUOTE)
        packed = certificates.extension_payload(certificate, certificates.OID_EVENT_LOG) or b""
        if quote is None or not packed.startswith(_COMPRESSED):
            return None
        log = zlib.decompressobj(wbits=31).decompress(packed[len(_COMPRESSED) :], MAX_LEGACY_LOG)
        attestation = from_quote_and_log(quote, log)
        spki = certificates.certificate_spki(certificate)
    except (FormatError, zlib.error):
        return None
    return Evidence(quote=quote, attestation=attestation, binding=_binding_to_key("this certificate's key", spki))


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # noqa: BLE001 - placeholder
        return False
    return True


def _describe_crl(crl: x509.CertificateRevocationList) -> Description:
    return {
        "issuer": _attempt(lambda: _name(crl.issuer)),
        "emulated": EMULATED in str(_attempt(lambda: _name(crl.issuer))),
        "last_update": _attempt(lambda: crl.last_update_utc),
        "next_update": _attempt(lambda: crl.next_update_utc),
        "number": _attempt(lambda: _crl_number(crl)),
        "sha256": hashlib.sha256(crl.public_bytes(Encoding.DER)).digest(),
        "revoked": _attempt(
            lambda: [{"serial_number": f"{one.serial_number:x}", "date": one.revocation_date_utc} for one in crl]
        ),
    }


def _crl_number(crl: x509.CertificateRevocationList) -> int | None:
    return next((e.value.crl_number for e in crl.extensions if isinstance(e.value, x509.CRLNumber)), None)


def _describe_collateral(collateral: dcap_qvl.QuoteCollateralV3) -> Description:
    out: Description = {"valid_until": _attempt(lambda: _moment(earliest_expiry(collateral)))}
    for key, name in (("tcbInfo", "tcb_info"), ("enclaveIdentity", "qe_identity")):
        out[key] = _describe_config(getattr(collateral, name))
        out[f"{name}_signature"] = bytes(getattr(collateral, f"{name}_signature"))
        out[f"{name}_issuer_chain"] = _describe_chain(getattr(collateral, f"{name}_issuer_chain"))
    for name in ("pck_crl", "root_ca_crl"):
        found = _crl_finding(bytes(getattr(collateral, name)), "DER")
        out[name] = found.description["crl"] if found else "cannot be read: DER CRL expected"
    out["pck_crl_issuer_chain"] = _describe_chain(collateral.pck_crl_issuer_chain)
    return out


def _describe_chain(pem: str) -> Any:
    return _attempt(lambda: [_describe_briefly(one) for one in x509.load_pem_x509_certificates(pem.encode())])


def _moment(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
