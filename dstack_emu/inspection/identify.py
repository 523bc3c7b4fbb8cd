"""Identifies an input: a quote, an attestation, certificates, a signing request, collateral, an event log, a document.

The input may be binary, hex, base64, PEM, or inside JSON. It is identified by decoding it: the name of a file has no
influence, and nothing is verified. `inspection.fields` describes the contents. Private keys are never shown.
"""

import base64
import binascii
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from cryptography import x509
from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest import der
from dstack_emu.attest.app_info import UNKNOWN_DEVICE_ID
from dstack_emu.attest.attestation import Attestation, decode, from_quote_and_log
from dstack_emu.attest.certificate import UNREADABLE, load_der
from dstack_emu.attest.csr import CONFIRM, SigningRequest
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import log_from_json
from dstack_emu.attest.pck import device_id
from dstack_emu.attest.quote import QE_VENDOR_ID, Quote, TdReport15
from dstack_emu.attest.report_data import bootstrap_report_data
from dstack_emu.inspection.certificate_fields import describe_crl
from dstack_emu.inspection.checks import Binding, Evidence
from dstack_emu.inspection.description import Description, load_json
from dstack_emu.inspection.documents import describe_document
from dstack_emu.inspection.fields import describe_certificates, describe_collateral, describe_evidence, describe_request
from dstack_emu.inspection.log_fields import NO_DEVICE, describe_log, describe_replay

MAX_INPUT_SIZE: Final = 10 * 1024 * 1024
MAX_WRAPPINGS: Final = 3
"""How many encodings may be nested: base64 of hex of a quote has two."""
SMALLEST_PART: Final = 64
"""Characters of a text inside JSON below which it is not examined."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The kind of an input, and its contents.

    If `sure` is false, it decodes as that kind, but could also be something else. `form` lists its encodings,
    outermost first (none: binary). If there is no `evidence`, `obstacle` may say why the evidence in it cannot be read.
    """

    what: str
    description: Description
    evidence: Evidence | None = None
    sure: bool = True
    form: tuple[str, ...] = ()
    obstacle: str = ""


def inspect_input(data: bytes) -> Finding:
    """Identify and describe the input; raise `FormatError`, with one line of text, if it is of no known kind."""
    if len(data) > MAX_INPUT_SIZE:
        raise FormatError(f"input of at most {MAX_INPUT_SIZE} bytes expected, got more")
    if described := describe_document(data):  # before its texts are searched for parts
        return Finding(*described, form=("JSON",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from cryptography, about odd certificates: they are shown as they are
        found = _recognise(data, 0)
    if found:
        return found
    got = f"{len(data)} bytes beginning {data[:8].hex()}" if data else "nothing"  # too few to reveal a key
    raise FormatError(
        "unknown input: a quote, versioned attestation, certificate, CRL, signing request, collateral, event log, "
        f"app-compose or boot info expected (tried binary, hex, base64, PEM and JSON), got {got}"
    )


def _recognise(data: bytes, depth: int) -> Finding | None:
    """Try every kind; return None if none fits, raise `FormatError` if the input is a damaged one of a known kind."""
    for read in (_read_quote, _read_attestation, _read_signing_request, _read_der):
        if found := read(data):
            return found
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None
    if depth >= MAX_WRAPPINGS:
        return None
    if text.startswith(("{", "[", '"')):
        return _read_json(text, depth)
    if "-----BEGIN " in text:
        return _read_pem(text)
    compact = "".join(text.split())
    for form, decode_text in (("hex", _from_hex), ("base64", _from_base64)):
        inner = decode_text(compact)
        if inner and (found := _recognise(inner, depth + 1)):
            return replace(found, form=(form, *found.form))
    return None


def _looks_like(what: str, error: Exception) -> NoReturn:
    raise FormatError(f"looks like {what}, but {error}") from error


def _from_hex(text: str) -> bytes:
    try:
        return binascii.unhexlify(text[2:] if text[:2] in ("0x", "0X") else text)
    except ValueError:
        return b""


def _from_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, padded or not."""
    body = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except ValueError:
        return b""


# ---- binary


def _read_quote(data: bytes) -> Finding | None:
    if data[12:28] != QE_VENDOR_ID and not (data[:2] in (b"\4\0", b"\5\0") and data[4:8] == b"\x81\0\0\0"):
        return None
    try:
        quote = Quote.parse(data)
    except FormatError as error:
        _looks_like("a quote", error)
    body = "TD15" if isinstance(quote.report, TdReport15) else "TD10"
    evidence = Evidence(quote=data)
    return Finding(f"TDX quote, version {quote.header.version} ({body})", describe_evidence(evidence), evidence)


def _read_attestation(data: bytes) -> Finding | None:
    try:
        attestation = decode(data)
    except FormatError as error:
        # Few bytes lead to a quote's in V0; V1 begins with a map and the name of its first key.
        if (data[:2] == b"\0\0" and b"\x02\0\x81\0\0\0" in data[:16]) or b"\xa7version" in data[:16]:
            _looks_like("a versioned attestation", error)
        return None
    return _attestation_found(attestation)


def _attestation_found(attestation: Attestation, binding: Binding | None = None) -> Finding:
    form = "V0 (SCALE)" if attestation.wire == 0 else "V1 (msgpack)"
    kind = "" if attestation.report_data_payload is None else ", of a pod"
    evidence = Evidence.of_attestation(attestation, binding)
    description = describe_evidence(evidence)
    return Finding(f"versioned attestation {form}{kind}", description, evidence, sure="quote" not in description)


def _read_signing_request(data: bytes) -> Finding | None:
    refusals = []
    for version in (2, 1):
        try:
            return _request_found(SigningRequest.parse(data, version), version)
        except FormatError as error:
            refusals.append(f"as version {version}: {error}")
    if data[1 : 1 + len(CONFIRM)] == CONFIRM.encode():
        _looks_like("a dstack signing request", FormatError("; ".join(refusals)))
    return None


def _request_found(request: SigningRequest, version: int, signature: bytes | None = None) -> Finding:
    evidence = Evidence.of_request(request, version, signature)
    described = {"signing_request": describe_request(request, version, signature)}
    return Finding(
        f"dstack certificate signing request, version {version}",
        described | describe_evidence(evidence),
        evidence,
        sure=request.confirm == CONFIRM,
    )


def _read_der(data: bytes) -> Finding | None:
    """Read one certificate or several in a row, or one CRL."""
    elements, rest = [], data if data[:1] == bytes((der.SEQUENCE,)) else b""
    while rest:
        try:
            _, after = der.read(rest, der.SEQUENCE, "DER")
        except FormatError as error:
            if data[1:2] in (b"\x81", b"\x82", b"\x83"):  # no text has these, so it is not hex that begins with a 0
                _looks_like("DER", error)
            return None
        elements.append(rest[: len(rest) - len(after)])
        rest = after
    try:
        return _chain_found([load_der(one) for one in elements], "DER") if elements else None
    except FormatError:
        pass
    try:
        return _crl_found(x509.load_der_x509_crl(data), "DER")
    except UNREADABLE:
        return None


def _chain_found(chain: list[x509.Certificate], form: str) -> Finding:
    described = describe_certificates(chain)
    evidence, obstacle = None, ""
    try:
        evidence = next((found for one in chain if (found := Evidence.of_certificate(one))), None)
    except FormatError as error:
        obstacle = str(error)  # no other certificate's evidence replaces what cannot be read
    several = f"chain of {len(chain)} certificates, first: " if len(chain) > 1 else ""
    description = {"certificates": described}
    return Finding(several + described[0]["kind"], description, evidence, form=(form,), obstacle=obstacle)


def _crl_found(crl: x509.CertificateRevocationList, form: str) -> Finding:
    return Finding("certificate revocation list (CRL)", {"crl": describe_crl(crl)}, form=(form,))


# ---- text


def _read_pem(text: str) -> Finding:
    labels = re.findall(r"-----BEGIN ([A-Z0-9 ]{1,40})-----", text)
    try:
        if "CERTIFICATE" in labels:
            found = _chain_found(x509.load_pem_x509_certificates(text.encode()), "PEM")
            others = [label for label in labels if label != "CERTIFICATE"]
            return replace(found, description=found.description | {"not_shown": others}) if others else found
        if "X509 CRL" in labels:
            return _crl_found(x509.load_pem_x509_crl(text.encode()), "PEM")
    except UNREADABLE as error:
        _looks_like("PEM", error)
    raise FormatError(f"PEM of certificates or a CRL expected, got {', '.join(labels[:4]) or 'no whole label'}")


def _read_json(text: str, depth: int) -> Finding | None:
    try:
        value = load_json(text)
    except FormatError as error:
        if text.startswith('"'):
            return None
        _looks_like("JSON", error)
    if isinstance(value, str):
        found = _recognise(_utf8(value), depth + 1)
    elif isinstance(value, dict):
        found = next((found for read in _OBJECTS if (found := read(value))), None) or _read_parts(value, depth)
    else:
        found = _read_log(value) or _read_parts(value, depth)
    return replace(found, form=("JSON", *found.form)) if found else None


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")  # JSON's escapes can spell half of a surrogate pair


def _octets(value: Description, key: str) -> bytes:
    """Read hex (or base64) at one key; return no bytes if it is absent, null or empty."""
    text = value.get(key) or ""
    if not isinstance(text, str):
        raise FormatError(f"{key}: hex text expected, got {type(text).__name__}")
    compact = "".join(text.split())
    data = _from_hex(compact) or _from_base64(compact)
    if not data and compact not in ("", "0x"):
        raise FormatError(f"{key}: hex text expected, got {text[:16]!r}")
    return data


def _text(value: Description, key: str) -> str:
    text = value.get(key) or ""
    if not isinstance(text, str):
        raise FormatError(f"{key}: text expected, got {type(text).__name__}")
    return text


def _read_log(value: list[Any]) -> Finding | None:
    if not (value and isinstance(value[0], dict) and {"imr", "event_type"} <= value[0].keys()):
        return None
    try:
        log = log_from_json(json.dumps(value))
    except FormatError as error:
        _looks_like("an event log", error)
    runtime = tuple(event.runtime() for event in log if event.is_runtime)
    replay = describe_replay(Attestation(b"", log, runtime, b"", ""), None)
    return Finding("event log", {"event_log": describe_log(log), "replay": replay})


def _read_pccs_answer(value: Description) -> Finding | None:
    for key, what in (("tcbInfo", "TCB info"), ("enclaveIdentity", "QE identity")):
        if isinstance(value.get(key), dict):
            shown = {key: value[key], "signature": value.get("signature")}
            return Finding(f"{what} with its signature, as a PCCS answers", shown)
    if "tcbLevels" in value and "id" in value:
        is_tcb_info = "fmspc" in value
        what, key = ("TCB info", "tcbInfo") if is_tcb_info else ("QE identity", "enclaveIdentity")
        return Finding(f"{what} without its signature", {key: value}, sure=False)
    return None


def _read_collateral(value: Description) -> Finding | None:
    if not {"tcb_info", "qe_identity", "pck_crl"} <= value.keys():
        return None
    try:
        collateral = QuoteCollateralV3.from_json(json.dumps(value))
    except ValueError as error:
        _looks_like("collateral (QuoteCollateralV3)", error)
    return Finding("collateral (QuoteCollateralV3)", describe_collateral(collateral))


def _read_quote_answer(value: Description) -> Finding | None:
    if "quote" not in value:
        return None
    what = "TdxQuote answer" if "hash_algorithm" in value else "GetQuote answer"
    try:
        quote, log, vm_config = _octets(value, "quote"), value.get("event_log"), _text(value, "vm_config")
        Quote.parse(quote)
        attestation = None
        if log:
            text = json.dumps(log) if isinstance(log, list) else _text(value, "event_log")
            attestation = replace(from_quote_and_log(quote, _utf8(text)), config=vm_config)
        other = _octets(value, "attestation")
        evidence = Evidence(
            quote=quote,
            attestation=attestation,
            stated=_octets(value, "report_data") or None,
            vm_config=vm_config,
            other=decode(other) if other else None,
        )
    except FormatError as error:
        _looks_like(f"a {what}", error)
    return Finding(what if attestation else f"{what} without event log", describe_evidence(evidence), evidence)


def _read_sign_cert(value: Description) -> Finding | None:
    if "csr" not in value:
        return None
    try:
        csr, signature = _octets(value, "csr"), _octets(value, "signature") or None
        version = 1 if value.get("api_version") == 1 else 2
        found = _request_found(SigningRequest.parse(csr, version), version, signature)
    except FormatError as error:
        _looks_like("a SignCert request", error)
    return replace(found, what=f"SignCert request: {found.what}")


def _read_attest_answer(value: Description) -> Finding | None:
    if "attestation" not in value:
        return None
    what, binding = "Attest answer", None
    keys: Description = {}
    try:
        attestation = decode(_octets(value, "attestation"))
        if {"ca_pubkey", "k256_pubkey"} <= value.keys():
            what, keys = "Bootstrap answer", {key: _octets(value, key) for key in ("ca_pubkey", "k256_pubkey")}
            binding = Binding("the KMS's root keys (ca_pubkey, k256_pubkey)", bootstrap_report_data(*keys.values()))
    except FormatError as error:
        _looks_like("an answer with an attestation", error)
    found = _attestation_found(attestation, binding)
    return replace(found, what=f"{what}: {found.what}", description=keys | found.description)


def _read_attestation_info(value: Description) -> Finding | None:
    if not {"device_id", "mr_aggregated"} <= value.keys() or not {"attestation_mode", "tee_variant"} & value.keys():
        return None
    shown, ppid, device = dict(value), _from_hex(str(value.get("ppid", ""))), _from_hex(str(value["device_id"]))
    if ppid:
        shown["device_id_is_sha256_of_ppid"] = device_id(ppid) == device
    elif device == UNKNOWN_DEVICE_ID:
        shown["device_id_means"] = NO_DEVICE
    return Finding("AttestationInfo answer", {"attestation_info": shown})


_OBJECTS: Final[tuple[Callable[[Description], Finding | None], ...]] = (
    _read_pccs_answer,
    _read_collateral,
    _read_quote_answer,
    _read_sign_cert,
    _read_attest_answer,
    _read_attestation_info,
)
"""Objects that are known by their keys, in the order in which they are tried."""


def _read_parts(value: Any, depth: int) -> Finding | None:
    """Search the texts in any other JSON, such as the `certificate_chain` of an answer."""
    parts = []
    for path, text in _texts(value, "$"):
        try:
            found = _recognise(_utf8(text), depth + 1) if len(text) >= SMALLEST_PART else None
        except FormatError:
            continue  # for example a private key, which is refused by itself
        if found:
            parts.append((path, found))
    if not parts:
        return None
    described = [{"at": path, "what": found.what, **found.description} for path, found in parts]
    first = next((found for _, found in parts if found.evidence or found.obstacle), parts[0][1])
    what = f"JSON with {len(parts)} known part{'s' if len(parts) > 1 else ''}, first: {parts[0][1].what}"
    sure = all(found.sure for _, found in parts)
    return Finding(what, {"parts": described}, first.evidence, sure=sure, obstacle=first.obstacle)


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _texts(child, f"{path}.{key}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _texts(child, f"{path}[{index}]")
