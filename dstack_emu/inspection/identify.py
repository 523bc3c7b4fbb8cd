"""Identifies an input: a quote, an attestation, certificates, a signing request, collateral, an event log, a document.

The input may be binary, hex, base64, PEM, or inside JSON. It is identified by decoding it: the name of a file has no
influence, and nothing is verified. `inspection.fields` describes the contents. Private keys are never shown.
"""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from cryptography import x509

from dstack_emu.attest import der
from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.certificate import UNREADABLE, load_der
from dstack_emu.attest.csr import CONFIRM, SigningRequest
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import log_from_json
from dstack_emu.attest.quote import QE_VENDOR_ID, Quote, TdReport15
from dstack_emu.inspection.answers import identify_object
from dstack_emu.inspection.certificate_fields import describe_crl
from dstack_emu.inspection.checks import Evidence
from dstack_emu.inspection.description import load_json
from dstack_emu.inspection.documents import describe_document
from dstack_emu.inspection.fields import describe_certificates, describe_evidence
from dstack_emu.inspection.finding import Finding, attestation_found, looks_like, request_found
from dstack_emu.inspection.log_fields import describe_log, describe_replay
from dstack_emu.inspection.texts import as_utf8, from_base64, from_hex

MAX_INPUT_SIZE: Final = 10 * 1024 * 1024
MAX_WRAPPINGS: Final = 3
"""How many encodings may be nested: base64 of hex of a quote has two."""
SMALLEST_PART: Final = 64
"""Characters of a text inside JSON below which it is not examined."""


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
    for form, decode_text in (("hex", from_hex), ("base64", from_base64)):
        inner = decode_text(compact)
        if inner and (found := _recognise(inner, depth + 1)):
            return replace(found, form=(form, *found.form))
    return None


# ---- binary


def _read_quote(data: bytes) -> Finding | None:
    if data[12:28] != QE_VENDOR_ID and not (data[:2] in (b"\4\0", b"\5\0") and data[4:8] == b"\x81\0\0\0"):
        return None
    try:
        quote = Quote.parse(data)
    except FormatError as error:
        looks_like("a quote", error)
    body = "TD15" if isinstance(quote.report, TdReport15) else "TD10"
    evidence = Evidence(quote=data)
    return Finding(f"TDX quote, version {quote.header.version} ({body})", describe_evidence(evidence), evidence)


def _read_attestation(data: bytes) -> Finding | None:
    try:
        attestation = decode(data)
    except FormatError as error:
        # Few bytes lead to a quote's in V0; V1 begins with a map and the name of its first key.
        if (data[:2] == b"\0\0" and b"\x02\0\x81\0\0\0" in data[:16]) or b"\xa7version" in data[:16]:
            looks_like("a versioned attestation", error)
        return None
    return attestation_found(attestation)


def _read_signing_request(data: bytes) -> Finding | None:
    refusals = []
    for version in (2, 1):
        try:
            return request_found(SigningRequest.parse(data, version), version)
        except FormatError as error:
            refusals.append(f"as version {version}: {error}")
    if data[1 : 1 + len(CONFIRM)] == CONFIRM.encode():
        looks_like("a dstack signing request", FormatError("; ".join(refusals)))
    return None


def _read_der(data: bytes) -> Finding | None:
    """Read one certificate or several in a row, or one CRL."""
    elements, rest = [], data if data[:1] == bytes((der.SEQUENCE,)) else b""
    while rest:
        try:
            _, after = der.read(rest, der.SEQUENCE, "DER")
        except FormatError as error:
            if data[1:2] in (b"\x81", b"\x82", b"\x83"):  # no text has these, so it is not hex that begins with a 0
                looks_like("DER", error)
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
        looks_like("PEM", error)
    raise FormatError(f"PEM of certificates or a CRL expected, got {', '.join(labels[:4]) or 'no whole label'}")


def _read_json(text: str, depth: int) -> Finding | None:
    try:
        value = load_json(text)
    except FormatError as error:
        if text.startswith('"'):
            return None
        looks_like("JSON", error)
    if isinstance(value, str):
        found = _recognise(as_utf8(value), depth + 1)
    elif isinstance(value, dict):
        found = identify_object(value) or _read_parts(value, depth)
    else:
        found = _read_log(value) or _read_parts(value, depth)
    return replace(found, form=("JSON", *found.form)) if found else None


def _read_log(value: list[Any]) -> Finding | None:
    if not (value and isinstance(value[0], dict) and {"imr", "event_type"} <= value[0].keys()):
        return None
    try:
        log = log_from_json(json.dumps(value))
    except FormatError as error:
        looks_like("an event log", error)
    runtime = tuple(event.runtime() for event in log if event.is_runtime)
    replay = describe_replay(Attestation(b"", log, runtime, b"", ""), None)
    return Finding("event log", {"event_log": describe_log(log), "replay": replay})


def _read_parts(value: Any, depth: int) -> Finding | None:
    """Search the texts in any other JSON, such as the `certificate_chain` of an answer."""
    parts = []
    for path, text in _texts(value, "$"):
        try:
            found = _recognise(as_utf8(text), depth + 1) if len(text) >= SMALLEST_PART else None
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
