"""Verification of evidence: `dcap-qvl` verifies the quote, dstack's own checks follow.

Order and words as in dstack `dstack-attest/src/attestation.rs` (`verify_with_time`, `validate_tcb`) at 312dc605. Root,
collateral and time are arguments. A TCB status below UpToDate is returned, not refused: the caller must decide about it
(dstack leaves that to the auth webhook).
"""

from dataclasses import dataclass
from typing import Final, Self

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.app_info import AppInfo, BootInfo, decode_app_info
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.collateral import error_chain
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import replay_runtime, require_unambiguous, validate_preimages
from dstack_emu.attest.pck import device_id
from dstack_emu.attest.quote import Quote, TdReport, TdReport15
from dstack_emu.attest.report_data import APP_DATA, ratls_report_data, report_data

DEBUG_BIT: Final = 0x01


@dataclass(frozen=True, slots=True)
class TrustAnchor:
    """The root a verifier believes: a certificate in DER, or None for Intel's own as `dcap-qvl` knows it."""

    root_ca: bytes | None

    @classmethod
    def intel(cls) -> Self:
        """Return Intel's production root: evidence of this emulator is refused under it."""
        return cls(None)

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        """Return another root, such as the emulated one."""
        return cls(certificate.public_bytes(Encoding.DER))


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """What `dcap-qvl` found: the platform's TCB status with its advisories, its PPID, and the signed report."""

    tcb_status: str
    advisory_ids: tuple[str, ...]
    ppid: bytes
    report: TdReport


@dataclass(frozen=True, slots=True, eq=False)
class VerifiedAttestation:
    """Evidence that holds, and on what platform. Each is what one verification found, and equals no other."""

    attestation: Attestation
    quote: VerifiedQuote

    @property
    def size(self) -> int:
        """Return roughly how many bytes of memory it takes, for a cache's bound."""
        return self.attestation.size

    def app_info(self, *, vm_config: str = "", boot_time: bool = False) -> AppInfo:
        """Return identity and measurements, with the true device id (SHA-256 of the PPID)."""
        return decode_app_info(
            self.attestation,
            vm_config=vm_config,
            boot_time=boot_time,
            device_id=device_id(self.quote.ppid),
            verified=self.quote.report,
        )

    def boot_info(self, *, vm_config: str = "", boot_time: bool = False) -> BootInfo:
        """Return the request for an auth webhook."""
        info = self.app_info(vm_config=vm_config, boot_time=boot_time)
        return BootInfo.about(info, self.quote.tcb_status, self.quote.advisory_ids)


def verify_quote(quote: bytes, collateral: dcap_qvl.QuoteCollateralV3, anchor: TrustAnchor, now: int) -> VerifiedQuote:
    """Verify a TDX quote at Unix time `now`; raise `VerificationError` with `dcap-qvl`'s causes.

    Success proves that a platform under this root signed the report. It does not prove a good TCB status, a production
    (non-debug) domain, or who requested the quote.
    """
    try:
        if anchor.root_ca is None:
            verified = dcap_qvl.verify(quote, collateral, now)
        else:
            verified = dcap_qvl.verify_with_root_ca(quote, collateral, anchor.root_ca, now)
    except ValueError as error:
        raise VerificationError(error_chain(error)) from error
    try:
        report = Quote.parse(quote).report  # the bytes whose signature was just verified
    except FormatError as error:
        raise VerificationError(f"no td report: {error}") from error
    return VerifiedQuote(verified.status, tuple(verified.advisory_ids), bytes(verified.ppid), report)


def verify_attestation(
    attestation: Attestation, collateral: dcap_qvl.QuoteCollateralV3, anchor: TrustAnchor, now: int
) -> VerifiedAttestation:
    """Verify evidence at Unix time `now`.

    Checks pod payload, quote, not debug, RTMR3 replay, system events that are unambiguous, report_data and event
    preimages, in this order.

    Success proves that the quoted domain measured these runtime events and quoted this report_data. What report_data
    binds (a TLS key, a nonce) the caller must check: `require_bound_to_key` does it for certificates.
    """
    claimed, payload = attestation.require_report_data(), attestation.report_data_payload
    if payload is not None and report_data(APP_DATA, payload.encode()) != claimed:
        raise VerificationError("report_data does not match report_data_payload")
    try:
        verified = verify_quote(attestation.quote, collateral, anchor, now)
    except VerificationError as error:
        raise VerificationError(f"failed to verify TDX quote: {error}") from error
    report = verified.report
    if isinstance(report, TdReport15) and any(report.mr_service_td):
        raise VerificationError("Invalid mr service td")
    if report.td_attributes[0] & DEBUG_BIT:
        raise VerificationError("Debug mode is not allowed")
    if any(report.mr_signer_seam):
        raise VerificationError("Invalid mr signer seam")
    replayed = replay_runtime(attestation.runtime_events)
    if replayed != report.rt_mr3:
        raise VerificationError(f"RTMR3 mismatch, quoted: {report.rt_mr3.hex()}, replayed: {replayed.hex()}")
    require_unambiguous(attestation.runtime_events)
    if report.report_data != claimed:
        raise VerificationError("tdx report_data mismatch")
    try:
        validate_preimages(attestation.event_log)
    except VerificationError as error:
        raise VerificationError(f"Failed to validate TDX V2 event digest preimages: {error}") from error
    return VerifiedAttestation(attestation, verified)


def require_bound_to_key(attestation: Attestation, spki: bytes) -> None:
    """Refuse evidence whose report_data is not the `ratls-cert` hash of this key (SPKI DER).

    It compares what the evidence claims: only together with `verify_attestation` does it prove anything. Evidence whose
    report_data is not of 64 bytes is refused for that.
    """
    if attestation.require_report_data() != ratls_report_data(spki):
        raise VerificationError("report data mismatch")
