"""All checks of evidence, with a result for each: it holds, it does not, or it could not be made.

The checks are those of `attest.verify`, in the same order, but they continue after a failure. Only
`attest.verify.verify_quote` verifies the quote itself. Further checks are those that dstack's verifier does not make:
the replay of the boot registers, the TCB status under `strict`, and the binding of report_data. If all checks hold, the
application may still be the wrong one: whoever relies on the evidence must check its app and its OS image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self

from cryptography import x509
from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import OID_ATTESTATION, attestation_of, certificate_spki, extension_payload
from dstack_emu.attest.collateral import CollateralKey, earliest_expiry
from dstack_emu.attest.csr import CONFIRM, SigningRequest
from dstack_emu.attest.errors import AttestError, FormatError, VerificationError
from dstack_emu.attest.eventlog import replay_register, replay_runtime, require_unambiguous, validate_preimages
from dstack_emu.attest.quote import Quote, TdReport, TdReport15
from dstack_emu.attest.report_data import APP_DATA, ratls_report_data, report_data
from dstack_emu.attest.verify import DEBUG_BIT, TrustAnchor, VerifiedQuote, verify_quote
from dstack_emu.transport.client import TransportError

UP_TO_DATE: Final = "UpToDate"

Collect = Callable[[bytes], QuoteCollateralV3]
"""Return the collateral for a quote; raise `TransportError` or `AttestError` if there is none."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The report_data that is expected, and what it binds."""

    to: str
    report_data: bytes

    @classmethod
    def to_key(cls, whose: str, spki: bytes) -> Self:
        """Expect a TLS key (SPKI DER) to be bound."""
        return cls(f"{whose} (ratls-cert)", ratls_report_data(spki))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A quote and what came with it.

    `attestation` is None for a bare quote. `stated` is the report_data that the input names beside the quote, `other`
    the same evidence in a second form, `signature` that of the signing request `request`.
    """

    quote: bytes
    attestation: Attestation | None = None
    stated: bytes | None = None
    binding: Binding | None = None
    vm_config: str = ""
    other: Attestation | None = None
    request: SigningRequest | None = None
    signature: bytes | None = None

    @classmethod
    def of_attestation(cls, attestation: Attestation, binding: Binding | None = None) -> Self:
        """Take the evidence of a versioned attestation."""
        return cls(quote=attestation.quote, attestation=attestation, stated=attestation.report_data, binding=binding)

    @classmethod
    def of_certificate(cls, certificate: x509.Certificate) -> Self | None:
        """Take the evidence of a certificate, None if it has none; raise `FormatError` if it is malformed."""
        attestation = attestation_of(certificate)
        if attestation is None:
            return None
        is_versioned = extension_payload(certificate, OID_ATTESTATION) is not None
        return cls(
            quote=attestation.quote,
            attestation=attestation,
            stated=attestation.report_data if is_versioned else None,
            binding=Binding.to_key("this certificate's key", certificate_spki(certificate)),
        )

    @classmethod
    def of_request(cls, request: SigningRequest, version: int, signature: bytes | None) -> Self:
        """Take the evidence of a signing request."""
        return cls(
            quote=request.attestation.quote,
            attestation=request.attestation,
            stated=request.attestation.report_data if version == 2 else None,
            binding=Binding.to_key("the key of this request", request.public_key),
            request=request,
            signature=signature,
        )


@dataclass(frozen=True, slots=True)
class Expectations:
    """The root and the Unix time to verify with, and requirements beyond those of a KMS.

    `report_data` (64 bytes) must be the quoted one; `strict` refuses every TCB status but UpToDate.
    """

    anchor: TrustAnchor
    root: str
    now: int
    report_data: bytes | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One check: whether it holds (None: it could not be made, `detail` says why), and what was got and expected."""

    name: str
    ok: bool | None
    got: str = ""
    expected: str = ""
    detail: str = ""


def replayed(attestation: Attestation, imr: int) -> bytes | None:
    """Replay a register from the log; return None if the log lacks its events, as a certificate's log does."""
    if imr == 3:
        return replay_runtime(attestation.runtime_events)
    if all(event.is_acpi_data for event in attestation.event_log if event.imr == imr):
        return None
    return replay_register(attestation.event_log, imr)


def verify_evidence(evidence: Evidence, collect: Collect, policy: Expectations) -> tuple[Check, ...]:
    """Run every check; a failed one does not keep the others from running if they can."""
    return tuple(_checks(evidence, collect, policy))


def all_hold(checks: tuple[Check, ...]) -> bool:
    """Return whether no check failed."""
    return all(check.ok is not False for check in checks)


def _checks(evidence: Evidence, collect: Collect, policy: Expectations) -> Iterator[Check]:
    attestation = evidence.attestation
    if evidence.request is not None:
        yield from _check_request(evidence.request, evidence.signature)
    if attestation is not None and attestation.report_data_payload is not None:
        expected = report_data(APP_DATA, attestation.report_data_payload.encode())
        yield _compare("pod_payload", attestation.report_data, expected, "report_data is the payload's app-data hash")
    verified: VerifiedQuote | None = None
    try:
        collateral = collect(evidence.quote)
    except (TransportError, AttestError) as error:
        yield Check("collateral", False, str(error), "TCB info, QE identity and two CRLs for this quote's platform")
        yield _skipped("quote", "there is no collateral")
    else:
        yield Check("collateral", True, detail=_describe(evidence.quote, collateral))
        try:
            verified = verify_quote(evidence.quote, collateral, policy.anchor, policy.now)
        except VerificationError as error:
            yield Check("quote", False, str(error), f"a quote that dcap-qvl accepts under {policy.root}")
        else:
            yield Check("quote", True, detail=f"signed under {policy.root}")
    yield _check_status(verified, policy.strict)
    try:
        report = verified.report if verified else Quote.parse(evidence.quote).report
    except FormatError as error:
        yield _skipped("td_report", f"the quote cannot be read: {error}")
    else:
        yield from _check_report(report)
        yield from _check_replays(attestation, report)
        yield from _check_report_data(evidence, policy, report.report_data)
    if attestation is not None:
        yield _check_system_events(attestation)
        yield _check_preimages(attestation)
    if evidence.other is not None:
        yield from _check_other(evidence, evidence.other)


def _check_request(request: SigningRequest, signature: bytes | None) -> Iterator[Check]:
    yield _compare_text("confirm_word", request.confirm, CONFIRM)
    if signature is None:
        yield _skipped("csr_signature", "the signature is sent beside the request, and is not in the input")
        return
    try:
        request.verify_signature(signature)
    except AttestError as error:
        yield Check("csr_signature", False, str(error), "the requested key's signature over the request")
    else:
        yield Check("csr_signature", True, detail="by the requested key")


def _describe(quote: bytes, collateral: QuoteCollateralV3) -> str:
    try:
        key = CollateralKey.of_quote(quote)
        until = datetime.fromtimestamp(earliest_expiry(collateral), UTC)
    except FormatError as error:
        return str(error)
    return f"of FMSPC {key.fmspc} ({key.ca} CA), valid until {until:%Y-%m-%dT%H:%M:%SZ}"


def _check_status(verified: VerifiedQuote | None, strict: bool) -> Check:
    if verified is None:
        return _skipped("tcb_status", "only a quote that verifies has one")
    advisories = f"advisories: {', '.join(verified.advisory_ids) or 'none'}"
    if verified.tcb_status == UP_TO_DATE:
        return Check("tcb_status", True, UP_TO_DATE, detail=advisories)
    if strict:
        return Check("tcb_status", False, verified.tcb_status, UP_TO_DATE, advisories)
    return Check(
        "tcb_status",
        True,
        verified.tcb_status,
        detail=f"{advisories}; whoever relies on it must decide whether to accept it (--strict refuses it)",
    )


def _check_report(report: TdReport) -> Iterator[Check]:
    if isinstance(report, TdReport15):
        yield _compare("service_td", report.mr_service_td, bytes(48), "mr_service_td is zero: no service TD is bound")
    debug = bool(report.td_attributes[0] & DEBUG_BIT)
    got = f"td_attributes {report.td_attributes.hex()}"
    yield Check("not_debug", not debug, got, "debug bit (0x01 of the first byte) clear" if debug else "")
    yield _compare("signer_seam", report.mr_signer_seam, bytes(48), "mr_signer_seam is zero")


def _check_replays(attestation: Attestation | None, report: TdReport) -> Iterator[Check]:
    for imr in (3, 0, 1, 2):
        name = f"rtmr{imr}"
        if attestation is None:
            yield _skipped(name, "a quote alone has no event log")
        elif (register := replayed(attestation, imr)) is None:
            yield _skipped(name, "the log lacks the boot events, as a certificate's does")
        else:
            yield _compare(name, register, report.rtmrs[imr], "the event log replays to the quoted register")


def _check_report_data(evidence: Evidence, policy: Expectations, quoted: bytes) -> Iterator[Check]:
    if evidence.stated is None:
        yield _skipped("report_data", "the input names none beside the quoted one")
    else:
        yield _compare("report_data", quoted, evidence.stated, "the quoted one is the one named beside it")
    if policy.report_data is not None:
        yield _compare("report_data_expected", quoted, policy.report_data, "the quoted one is the expected one")
    if evidence.binding is not None:
        yield _compare("binding", quoted, evidence.binding.report_data, f"report_data binds {evidence.binding.to}")


def _check_system_events(attestation: Attestation) -> Check:
    try:
        require_unambiguous(attestation.runtime_events)
    except VerificationError as error:
        return Check("system_events", False, str(error), "system events that can be read in one way only")
    return Check("system_events", True, detail="each can be read in one way only")


def _check_preimages(attestation: Attestation) -> Check:
    if not any(event.is_runtime and event.version == 2 for event in attestation.event_log):
        return _skipped("event_preimages", "the log has no version 2 events")
    try:
        validate_preimages(attestation.event_log)
    except VerificationError as error:
        return Check("event_preimages", False, str(error), "a preimage for each, of its digest and its fields")
    return Check("event_preimages", True, detail="each has the digest and the fields of its event")


def _check_other(evidence: Evidence, other: Attestation) -> Iterator[Check]:
    yield _compare(
        "attestation_quote", other.quote, evidence.quote, "the attestation in the same answer has the same quote"
    )
    if evidence.attestation is not None:
        got, expected = (
            ", ".join(f"{event.event} {event.payload.hex()}" for event in events)
            for events in (other.runtime_events, evidence.attestation.runtime_events)
        )
        detail = "the attestation in the same answer has the runtime events of the log"
        same = other.runtime_events == evidence.attestation.runtime_events
        yield Check("attestation_events", same, *(("", "") if same else (got, expected)), detail)


def _compare(name: str, got: bytes, expected: bytes, detail: str) -> Check:
    if got == expected:
        return Check(name, True, detail=detail)
    return Check(name, False, got.hex(), expected.hex(), detail)


def _compare_text(name: str, got: str, expected: str) -> Check:
    return Check(name, True, got) if got == expected else Check(name, False, got, expected)


def _skipped(name: str, reason: str) -> Check:
    return Check(name, None, detail=reason)
