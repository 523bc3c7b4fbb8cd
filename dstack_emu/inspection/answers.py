"""Identifies JSON objects by their keys: what programs of dstack and a PCCS answer, and requests to them."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest.app_info import UNKNOWN_DEVICE_ID
from dstack_emu.attest.attestation import decode, from_quote_and_log
from dstack_emu.attest.csr import SigningRequest
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.pck import device_id
from dstack_emu.attest.quote import Quote
from dstack_emu.attest.report_data import bootstrap_report_data
from dstack_emu.inspection.checks import Binding, Evidence
from dstack_emu.inspection.description import Description
from dstack_emu.inspection.fields import describe_collateral, describe_evidence
from dstack_emu.inspection.finding import Finding, attestation_found, looks_like, request_found
from dstack_emu.inspection.log_fields import NO_DEVICE
from dstack_emu.inspection.texts import as_utf8, from_base64, from_hex


def identify_object(value: Description) -> Finding | None:
    """Return what an object is, None if it is of no known kind; raise `FormatError` if it is a damaged one of these."""
    return next((found for read in _OBJECTS if (found := read(value))), None)


def _octets(value: Description, key: str) -> bytes:
    """Read hex (or base64) at one key; return no bytes if it is absent, null or empty."""
    text = value.get(key) or ""
    if not isinstance(text, str):
        raise FormatError(f"{key}: hex text expected, got {type(text).__name__}")
    compact = "".join(text.split())
    data = from_hex(compact) or from_base64(compact)
    if not data and compact not in ("", "0x"):
        raise FormatError(f"{key}: hex text expected, got {text[:16]!r}")
    return data


def _text(value: Description, key: str) -> str:
    text = value.get(key) or ""
    if not isinstance(text, str):
        raise FormatError(f"{key}: text expected, got {type(text).__name__}")
    return text


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
        looks_like("collateral (QuoteCollateralV3)", error)
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
            attestation = replace(from_quote_and_log(quote, as_utf8(text)), config=vm_config)
        other = _octets(value, "attestation")
        evidence = Evidence(
            quote=quote,
            attestation=attestation,
            stated=_octets(value, "report_data") or None,
            vm_config=vm_config,
            other=decode(other) if other else None,
        )
    except FormatError as error:
        looks_like(f"a {what}", error)
    return Finding(what if attestation else f"{what} without event log", describe_evidence(evidence), evidence)


def _read_sign_cert(value: Description) -> Finding | None:
    if "csr" not in value:
        return None
    try:
        csr, signature = _octets(value, "csr"), _octets(value, "signature") or None
        version = 1 if value.get("api_version") == 1 else 2
        found = request_found(SigningRequest.parse(csr, version), version, signature)
    except FormatError as error:
        looks_like("a SignCert request", error)
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
        looks_like("an answer with an attestation", error)
    found = attestation_found(attestation, binding)
    return replace(found, what=f"{what}: {found.what}", description=keys | found.description)


def _read_attestation_info(value: Description) -> Finding | None:
    if not {"device_id", "mr_aggregated"} <= value.keys() or not {"attestation_mode", "tee_variant"} & value.keys():
        return None
    shown, ppid, device = dict(value), from_hex(str(value.get("ppid", ""))), from_hex(str(value["device_id"]))
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
