"""When the root keys of one KMS reach another one: a model from the documents alone, as `decision_model`.

`refusals` has one line for each rule that forbids it, with the step in which it applies and a part of its text, so that
the order of the checks is known, too. Where the documents leave an order open, rules have the same step.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

from tests.decision_model import (
    BootInfo,
    Case,
    Evidence,
    Vendor,
    Webhook,
    boot_info_of,
    decision,
    effective_config,
    evidence_denials,
    image_denials,
)

SourceForm = Literal["versioned", "legacy", "none"]
"""The evidence in the source's certificate; a legacy one has no VM config."""


@dataclass(frozen=True)
class Onboarding:
    """One onboarding.

    `handover` is the call of GetKmsKey as the source gets it: `release`, `webhook`, `own` and `verifies_images` are the
    source's, the evidence and `vm_config` are the receiver's. `webhook` is the receiver's. The source has an admin
    listener beside its main one; `token` is what the receiver is given for it.
    """

    handover: Case
    source: Evidence
    source_form: SourceForm
    source_enforces_self: bool
    source_is_public: bool
    release: str
    webhook: Webhook
    listener: Literal["main", "admin"]
    token: Literal["", "right", "wrong"]


@dataclass(frozen=True)
class Refusal:
    """A rule that forbids the keys: the step of its check, and a part of the receiver's error."""

    step: int
    text: str
    rule: str


CONNECT, SERVER, TEMPORARY_CA, SOURCE, QUOTE, SELF, RECEIVER, IMAGE = range(8)
"""The steps in their order; SELF is the source's check of itself before it hands its keys over."""
AFTER_TOKEN: Final = TEMPORARY_CA
"""With a token there is one call, and the documents do not say whether the source is asked about before or after it."""
NO_ANSWER, REFUSED = "Failed to send request: ", "Request failed with status="
NOT_ALLOWED: Final = "Source KMS is not allowed for onboarding: "


def refusals(case: Onboarding) -> list[Refusal]:
    """Return why the receiver gets no keys, the first of them the reason of its error; nothing if it gets them."""
    sends_token = bool(case.token) and case.release == "0.6"
    found = _of_server(case)
    if sends_token:
        later = _of_listener(case) + _of_handover(case) + _of_source(case)
        found += [replace(each, step=AFTER_TOKEN) for each in later]
        if case.handover.release == "0.5" and case.listener == "main":
            found.append(Refusal(CONNECT, NO_ANSWER, "the certificate is not of the temporary CA"))
    elif case.listener == "admin":
        found.append(Refusal(TEMPORARY_CA, f"{REFUSED}401", "no token"))
    else:
        found += [replace(each, step=TEMPORARY_CA) for each in _of_self_check(case)]
        found += _of_source(case) + _of_handover(case)
        if not case.source_is_public:
            found.append(Refusal(QUOTE, "public KMS key handover is disabled", "public_key_handover"))
    return sorted(found, key=lambda refusal: refusal.step)


def questions(case: Onboarding) -> int:
    """Return how often `bootAuth/kms` is asked in an onboarding that succeeds: four times, less without self checks."""
    has_temporary_ca = not (case.token and case.release == "0.6")
    return 2 + case.source_enforces_self * (1 + has_temporary_ca)


def own_boot_info(evidence: Evidence, vendor: Vendor) -> BootInfo:
    """Return what a KMS asks about itself; raise `ValueError` if it cannot be known."""
    return boot_info_of(evidence, vendor, evidence.config, is_boot_time=False)


def _about_itself(evidence: Evidence) -> Evidence:
    """Return evidence that a KMS requests for itself: no key is bound."""
    return replace(evidence, bound_to="own", claims_own_key=True, form="scale")


def _of_server(case: Onboarding) -> list[Refusal]:
    if case.source_form == "none":
        return [Refusal(SERVER, "certificate does not contain attestation", "no evidence of the source")]
    shown = replace(case.source, form="legacy") if case.source_form == "legacy" else case.source
    text = "failed to validate the server attestation of "
    return [Refusal(SERVER, text, rule) for rule in evidence_denials(shown, case.handover.vendor)]


def _of_listener(case: Onboarding) -> list[Refusal]:
    if case.listener == "main":
        rule = "public_key_handover"
        return [] if case.source_is_public else [Refusal(SELF, "public KMS key handover is disabled", rule)]
    if case.token == "wrong":
        return [Refusal(SELF, f"{REFUSED}401", "the token")]
    return [Refusal(SELF, REFUSED, "no GetKmsKey")] if case.handover.release == "0.5" else []


def _of_self_check(case: Onboarding) -> list[Refusal]:
    if not case.source_enforces_self:
        return []
    rules = evidence_denials(_about_itself(case.source), case.handover.vendor)
    try:
        own = own_boot_info(case.source, case.handover.vendor)
        rules += _of_identity(own) + decision(case.handover.webhook, "kms", own)
    except ValueError as error:
        rules.append(str(error))
    return [Refusal(SELF, "KMS self authorization failed: ", rule) for rule in rules]


def _of_source(case: Onboarding) -> list[Refusal]:
    """Return why the receiver takes no keys of the source, as its webhook is asked."""
    vendor, source = case.handover.vendor, case.source
    is_legacy = case.source_form == "legacy" or not source.config
    try:
        config = "" if is_legacy else source.config
        asked = boot_info_of(source, vendor, config, is_boot_time=False)
        rules = _of_identity(asked)
        if not asked.os_image_hash and (is_legacy or case.release == "0.5"):
            receiver = case.handover.evidence
            own = own_boot_info(receiver, vendor)
            rules += evidence_denials(_about_itself(receiver), vendor) + _of_identity(own)
            asked = replace(asked, os_image_hash=own.os_image_hash)
        rules += decision(case.webhook, "kms", asked)
    except ValueError as error:
        rules = [str(error)]
    return [Refusal(SOURCE, NOT_ALLOWED, rule) for rule in rules]


def _of_handover(case: Onboarding) -> list[Refusal]:
    """Return why the source gives its keys to no such receiver."""
    call = case.handover
    found = [Refusal(QUOTE, "invalid quote: ", rule) for rule in evidence_denials(call.evidence, call.vendor)]
    found += _of_self_check(case)
    try:
        config = effective_config(call)
        asked = boot_info_of(call.evidence, call.vendor, config, is_boot_time=False)
    except ValueError as error:
        return [*found, Refusal(RECEIVER, REFUSED, str(error))]
    found += [Refusal(RECEIVER, "app_id must be 20 bytes", rule) for rule in _of_identity(asked)]
    text = REFUSED if call.webhook.spoiling else "Boot denied: "
    found += [Refusal(RECEIVER, text, rule) for rule in decision(call.webhook, "kms", asked)]
    if call.verifies_images:
        text = "Failed to verify os image hash"
        found += [Refusal(IMAGE, text, rule) for rule in image_denials(config, call.evidence.image)]
    return found


def _of_identity(boot_info: BootInfo) -> list[str]:
    return [] if len(boot_info.app_id) == 40 else ["app_id must be 20 bytes"]
