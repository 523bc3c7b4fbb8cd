"""Why a boot is admitted or refused: from evidence and a policy, the result of each step that a KMS carries out.

A KMS verifies the evidence, makes a boot info of it, and asks its webhook; evidence that it refuses reaches no webhook.
Not here: the OS image, which a KMS verifies after its webhook has allowed it, and TLS.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest.app_info import TEE_VARIANT_TDX, BootInfo, require_same_config
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.attest.release import Release
from dstack_emu.attest.verify import verify_attestation
from dstack_emu.auth.boot_info import Refusal
from dstack_emu.auth.contract_rules import ContractRule, rule_of
from dstack_emu.auth.policy import Contract
from dstack_emu.inspection.checks import Check, Collect, Evidence, Expectations, verify_evidence
from dstack_emu.inspection.policy_change import PolicyChange, pointer, smallest_change
from dstack_emu.inspection.policy_file import PolicyFile
from dstack_emu.kms_emu.auth_api import WebhookAuth, require_identity_sizes
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.gate import boot_info_of
from dstack_emu.transport.client import MoreHeaders

Caller = Literal["app", "kms"]
Verdict = Literal["allowed", "denied", "refused"]
"""What becomes of the boot; `refused`: the KMS refuses the evidence, and asks no webhook."""

_BINDING: Final = frozenset({"confirm_word", "csr_signature", "binding"})
"""Checks of `verify_evidence` that a KMS makes, too, but that `verify_attestation` does not."""


class UnusableError(Exception):
    """Evidence of which no boot info can be made; the text says what is missing, and how to get it."""


@dataclass(frozen=True, slots=True)
class BootRequest:
    """A request to a webhook: the body, and the same as values."""

    body: bytes
    boot_info: BootInfo

    @classmethod
    def of(cls, boot_info: BootInfo, release: Release) -> Self:
        """Encode a boot info as the KMS of a release does."""
        return cls(boot_info.to_json(variant_members=release.boot_info_variant_members), boot_info)

    @classmethod
    def find(cls, data: bytes) -> Self | None:
        """Read a request, or a verifier's answer with a boot info; return None if it is something else.

        Raises `FormatError` if a member does not fit.
        """
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if isinstance(document, Mapping) and isinstance(document.get("details"), Mapping):
            document = document["details"].get("boot_info")
        if not isinstance(document, Mapping) or not {"mrAggregated", "osImageHash"} <= document.keys():
            return None
        return cls(json.dumps(document, separators=(",", ":")).encode(), _from_document(document))

    @property
    def document(self) -> dict[str, Any]:
        """Return the body's JSON."""
        document: dict[str, Any] = json.loads(self.body)
        return document


def _from_document(document: Mapping[str, Any]) -> BootInfo:
    def octets(name: str) -> bytes:
        text = document.get(name, "")
        try:
            return decode_hex(text if isinstance(text, str) else "no hex")
        except ValueError as error:
            raise FormatError(f"boot info: {name}: hex expected, got {text!r:.80}") from error

    status, advisories = document.get("tcbStatus", ""), document.get("advisoryIds", [])
    if not isinstance(status, str):
        raise FormatError(f"boot info: tcbStatus: text expected, got {status!r:.80}")
    if not isinstance(advisories, list) or not all(isinstance(each, str) for each in advisories):
        raise FormatError(f"boot info: advisoryIds: a list of texts expected, got {advisories!r:.80}")
    variant = document.get("teeVariant", TEE_VARIANT_TDX)
    if not isinstance(variant, str):
        raise FormatError(f"boot info: teeVariant: text expected, got {variant!r:.80}")
    return BootInfo(
        mr_aggregated=octets("mrAggregated"),
        os_image_hash=octets("osImageHash"),
        mr_system=octets("mrSystem"),
        app_id=octets("appId"),
        compose_hash=octets("composeHash"),
        instance_id=octets("instanceId"),
        device_id=octets("deviceId"),
        key_provider_info=octets("keyProviderInfo"),
        tcb_status=status,
        advisory_ids=tuple(advisories),
        tee_variant=variant,
    )


@dataclass(frozen=True, slots=True)
class Examination:
    """What a KMS finds in evidence: a request to its webhook, or why it refuses the evidence (`problem`).

    `checks` are empty for a request that came without evidence: it is a claim.
    """

    checks: tuple[Check, ...]
    request: BootRequest | None
    problem: str = ""


def examine(
    evidence: Evidence, collect: Collect, expected: Expectations, release: Release, *, vm_config: str | None = None
) -> Examination:
    """Verify evidence, and make the request of it; `vm_config` is the text that came beside the evidence.

    Raises `UnusableError` if something is missing without which there is no request, and what `collect` raises.
    """
    attestation = evidence.attestation
    if attestation is None:
        raise UnusableError(
            "a quote without its event log: app id and compose hash are in the log. Take the whole GetQuote answer (it "
            "has event_log and vm_config), an Attest answer, or the RA-TLS certificate"
        )
    if not attestation.config and vm_config is None:
        raise UnusableError(
            "evidence without a VM config, which names the OS image. Take the whole GetQuote answer (it has "
            "vm_config), or add --vm-config FILE with the text that the guest sends beside it"
        )
    collateral = collect(evidence.quote)
    checks = verify_evidence(evidence, lambda _: collateral, expected)
    try:
        boot_info = _boot_info(evidence, attestation, collateral, expected, release, vm_config or "")
    except (AttestError, KmsError) as error:
        return Examination(checks, None, str(error))
    if failed := next((check for check in checks if check.name in _BINDING and check.ok is False), None):
        return Examination(checks, None, f"{failed.name}: got {failed.got}, expected {failed.expected}")
    return Examination(checks, BootRequest.of(boot_info, release))


def _boot_info(
    evidence: Evidence,
    attestation: Attestation,
    collateral: QuoteCollateralV3,
    expected: Expectations,
    release: Release,
    vm_config: str,
) -> BootInfo:
    verified = verify_attestation(attestation, collateral, expected.anchor, expected.now)
    if release.vm_config_must_match:
        vm_config = require_same_config(vm_config, attestation.config)
    # A signing request is judged by the measurements of boot time, as SignCert does.
    boot_info = boot_info_of(verified, vm_config=vm_config, boot_time=evidence.request is not None)
    if release.identity_widths_are_checked:
        require_identity_sizes(boot_info)
    return boot_info


@dataclass(frozen=True, slots=True)
class Explained:
    """A decision: by a policy, with the change that would admit it, or by a webhook, whose policy is not known.

    `contract_rule` is the rule of a DstackKms contract that gives a webhook's reason, None if there is none.
    """

    is_allowed: bool
    reason: str
    gateway_app_id: str
    rule: str = ""
    differs_from: tuple[Contract | str, ...] = ()
    change: PolicyChange | None = None
    contract_rule: ContractRule | None = None

    @property
    def refusal(self) -> Refusal | None:
        """Return what the rule that decided has compared; None if nothing was refused, or it is not known."""
        return self.change.refusals[0] if self.change and self.change.refusals else None


def explain(policy: PolicyFile, request: BootRequest, caller: Caller) -> Explained:
    """Decide by a policy; raise `AuthError` if its webhook takes the request for no boot info."""
    is_kms = caller == "kms"
    decision = policy.decide(request.body, is_kms=is_kms)
    change = smallest_change(policy, request.body, is_kms=is_kms)
    return Explained(
        decision.is_allowed, decision.reason, decision.gateway_app_id, decision.rule, decision.differs_from, change
    )


async def ask(
    url: str, request: BootRequest, caller: Caller, *, release: Release, headers: MoreHeaders | None = None
) -> Explained:
    """Ask a webhook as a KMS does; raise `UnavailableError` if it gives no decision, which never allows."""
    webhook = WebhookAuth(url, release=release, headers=headers)
    try:
        decision = await webhook.decide(request.boot_info, is_kms=caller == "kms")
    finally:
        await webhook.close()
    contract_rule = None if decision.is_allowed else rule_of(decision.reason, is_kms=caller == "kms")
    return Explained(
        decision.is_allowed, decision.reason, decision.gateway_app_id, contract_rule or "", contract_rule=contract_rule
    )


def refusal_document(refusal: Refusal) -> dict[str, Any]:
    """Return what a rule has compared, as JSON."""
    return {
        "rule": refusal.rule,
        "reason": refusal.reason,
        "member": refusal.member,
        "got": list(refusal.got),
        "wanted": sorted(refusal.expected),
        "place": pointer(refusal.path) if refusal.path else None,
    }
