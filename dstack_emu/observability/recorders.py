"""A verifier and a webhook client that record their verdicts and decisions in the journal."""

import hashlib
from collections.abc import Callable
from typing import Any

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.verify import TrustAnchor, VerifiedAttestation
from dstack_emu.kms_emu.auth_api import AuthApi, AuthInfo, Decision
from dstack_emu.kms_emu.errors import UnavailableError
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.spans import current, enter, entered, leave
from dstack_emu.observability.tracing import SpanTrace
from dstack_emu.transport.pccs_client import AttestationVerifier, Clock, PccsClient
from dstack_emu.verifier.service import VerificationResponse


class RecordingVerifier(AttestationVerifier):
    """Verifies as its base class does, and records each verdict with the requests for collateral that it needed."""

    def __init__(self, pccs: PccsClient, anchor: TrustAnchor, clock: Clock, journal: Journal) -> None:
        super().__init__(pccs, anchor, clock)
        self._journal = journal

    async def verify(self, attestation: Attestation) -> VerifiedAttestation:
        """Verify evidence and record the verdict; raise the errors of the base class."""
        parent = current()
        if parent is None or not self._journal.enabled:
            return await super().verify(attestation)
        span = self._journal.begin_verification(parent)
        before = enter(span)
        verdict: dict[str, Any] = {}
        try:
            verified = await super().verify(attestation)
            verdict = _verdict_of(verified)
            return verified
        except AttestError as error:
            verdict = {"attestation": "refused", "error": self._journal.scrub(str(error))}
            raise
        finally:
            leave(before)
            self._journal.end_verification(span, verdict)


def _verdict_of(verified: VerifiedAttestation) -> dict[str, Any]:
    quote = verified.quote
    return {
        "attestation": "holds",
        "tcb_status": quote.tcb_status,
        "advisory_ids": list(quote.advisory_ids),
        "device_id": hashlib.sha256(quote.ppid).hexdigest(),
    }


def verdict_recorder(journal: Journal) -> Callable[[VerificationResponse], None]:
    """Make the observer of a verifier, which records each verdict: app and OS image, or the reason of a refusal."""

    def record(response: VerificationResponse) -> None:
        call = current()
        if call is None:
            return
        verdict: dict[str, Any] = {"is_valid": response.is_valid}
        if response.reason is not None:
            verdict["reason"] = journal.scrub(response.reason)
        if (app := response.details.app_info) is not None:
            verdict |= {name: app[name] for name in ("app_id", "os_image_hash", "mr_aggregated")}
        call.annotate("verdict", verdict)

    return record


class RecordingAuth:
    """A client of a webhook outside the stack that records each request and its decision."""

    def __init__(self, auth: AuthApi, name: str, caller: str, url: str, journal: Journal) -> None:
        self._auth, self._name, self._caller, self._url, self._journal = auth, name, caller, url, journal

    async def decide(self, boot_info: BootInfo, *, is_kms: bool) -> Decision:
        """Request a decision and record it; raise the errors of the wrapped client."""
        parent = current()
        if parent is None or not self._journal.enabled:
            return await self._auth.decide(boot_info, is_kms=is_kms)
        path = f"/bootAuth/{'kms' if is_kms else 'app'}"
        call = self._journal.begin(self._name, path, parent, parent.next_number(), self._caller)
        if isinstance(call.trace, SpanTrace):
            call.trace.method, call.trace.path, call.trace.url = "POST", path, self._url
        status, text = None, ""
        try:
            with entered(call):
                decision = await self._auth.decide(boot_info, is_kms=is_kms)
            status = 200
            document = {
                "about": "kms" if is_kms else "app",
                "allowed": decision.is_allowed,
                "reason": decision.reason,
                "rule": "",
                "asked": _fields_of(boot_info),
            }
            call.annotate("decision", document)
            return decision
        except UnavailableError as error:
            text = self._journal.scrub(str(error))
            raise
        finally:
            self._journal.end(call, status, text)

    async def info(self) -> AuthInfo:
        """Request the webhook's description of itself (`GET /`)."""
        return await self._auth.info()

    async def close(self) -> None:
        """Close the connections."""
        await self._auth.close()


def _fields_of(info: BootInfo) -> dict[str, Any]:
    return {
        "app_id": info.app_id.hex(),
        "compose_hash": info.compose_hash.hex(),
        "instance_id": info.instance_id.hex(),
        "device_id": info.device_id.hex(),
        "mr_aggregated": info.mr_aggregated.hex(),
        "os_image_hash": info.os_image_hash.hex(),
        "tcb_status": info.tcb_status,
        "advisory_ids": list(info.advisory_ids),
    }
