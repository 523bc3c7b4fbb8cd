"""The result of `dstack-emu why`: the JSON object, a sentence, and what to do next.

`docs/why.schema.json` is the schema of the object.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Final

from dstack_emu.auth.boot_info import Refusal
from dstack_emu.inspection.contract_steps import (
    ContractChange,
    contract_change,
    contract_steps,
    may_be_of_a_file,
    member_of,
)
from dstack_emu.inspection.policy_file import PolicyFile
from dstack_emu.inspection.why import Caller, Examination, Explained, Verdict, refusal_document


@dataclass(frozen=True, slots=True)
class Decider:
    """Who decides: a policy file of a kind under a contract, or the webhook at a URL."""

    kind: str
    where: str
    contract: str | None = None

    @classmethod
    def of(cls, policy: PolicyFile) -> "Decider":
        """Name a policy file."""
        return cls(policy.kind, policy.path, policy.contract)

    def __str__(self) -> str:
        if self.kind == "webhook":
            return f"the webhook {self.where}"
        return f"{self.where} ({self.kind}{f', contract {self.contract}' if self.contract else ''})"


@dataclass(frozen=True, slots=True)
class Verification:
    """With what evidence was verified: the name of the root, the Unix time, and where the collateral came from."""

    root: str
    time: int
    collateral: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is known about one boot. `verification` is None for a request that came without evidence."""

    what: str
    caller: Caller
    release: str
    verification: Verification | None
    examination: Examination
    decider: Decider
    explained: Explained | None
    warnings: Sequence[str] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """Return what becomes of the boot."""
        if self.explained is None:
            return "refused"
        return "allowed" if self.explained.is_allowed else "denied"

    def document(self) -> dict[str, Any]:
        """Return the JSON object."""
        request, explained = self.examination.request, self.explained
        change = explained.change if explained else None
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "as": self.caller,
            "release": self.release,
            "evidence": self._evidence(),
            "boot_info": request.document if request else None,
            "decider": asdict(self.decider),
            "decision": explained and _decision(explained),
            "refusals": [refusal_document(refusal) for refusal in change.refusals] if change else [],
            "change": {"patch": change.patch, "diff": change.diff} if change and change.patch else None,
            "contract_change": self.contract_change and self.contract_change.document(),
            "no_change_because": (change.obstacle or None) if change else None,
            "warnings": list(self.warnings),
            "next_steps": self.next_steps,
        }

    @property
    def contract_change(self) -> ContractChange | None:
        """Return what a contract would have to hold, if a webhook denied with a contract's reason."""
        request, explained = self.examination.request, self.explained
        if request is None or explained is None:
            return None
        return contract_change(explained.contract_rule, request.document, is_kms=self.caller == "kms")

    def _evidence(self) -> dict[str, Any]:
        examined, verification = self.examination, self.verification
        return {
            "what": self.what,
            "verifies": None if verification is None else not examined.problem,
            "problem": examined.problem or None,
            "verification": verification and asdict(verification),
            "checks": [asdict(check) for check in examined.checks],
        }

    @property
    def sentence(self) -> str:
        """Return the result in one sentence."""
        who = "KMS" if self.caller == "kms" else "app"
        explained = self.explained
        if explained is None:
            return f"A KMS refuses the evidence, and asks no webhook: {self.examination.problem}."
        if explained.is_allowed:
            return f"This {who} is admitted by {self.decider}."
        if explained.refusal is None:
            return f'This {who} is denied by {self.decider}: "{explained.reason}".'
        return _SENTENCES[explained.refusal.rule].format(**_words(explained.refusal))

    @property
    def next_steps(self) -> list[str]:
        """Return what to do, the first thing first."""
        return list(self._next_steps())

    def _next_steps(self) -> Iterator[str]:
        explained = self.explained
        if explained is None:
            yield "No policy can admit evidence that does not verify. `dstack-emu verify` shows every check of it."
            yield "If root, seed or time are not those of the KMS: --root, --seed, --intel, --time."
            return
        if explained.is_allowed:
            yield "A KMS then verifies the OS image: see `Failed to verify os image hash` in docs/troubleshooting.md."
            return
        refusal, change = explained.refusal, explained.change
        if refusal is None or change is None:
            yield from self._steps_of_webhook(explained)
            return
        yield _ORIGINS[refusal.member]
        if change.obstacle:
            yield f"No change of the policy admits it: {change.obstacle}."
        else:
            yield f"If this boot is to be admitted, make the change in {self.decider.where}; the next request reads it."
        if explained.differs_from:
            others = " or ".join(explained.differs_from)
            yield f"Under the contract {others} the same file admits it (--contract)."

    def _steps_of_webhook(self, explained: Explained) -> Iterator[str]:
        """Yield what to do about a denial by a webhook, whose policy is not known."""
        request, rule = self.examination.request, explained.contract_rule
        known = list(
            contract_steps(rule, explained.reason, request.document if request else {}, is_kms=self.caller == "kms")
        )
        yield from known
        if rule is not None and (member := member_of(rule)):
            yield _ORIGINS[member]
        if not known:
            yield "What the webhook compares is not known here: look at its log for the request that is shown."
        if not known or (rule is not None and may_be_of_a_file(rule)):
            yield "`dstack-emu why --policy FILE` compares with a policy of auth-simple."


def _decision(explained: Explained) -> dict[str, Any]:
    return {
        "is_allowed": explained.is_allowed,
        "reason": explained.reason,
        "gateway_app_id": explained.gateway_app_id,
        "rule": explained.rule or None,
        "differs_from": list(explained.differs_from),
    }


def _words(refusal: Refusal) -> dict[str, str]:
    count = len(refusal.expected)
    named = ", ".join(sorted(refusal.expected))
    return {
        "got": ", ".join(refusal.got) or "none",
        "wanted": named or "none",
        "unlisted": _UNLISTED.get(count, f"is not among the {count} that the policy lists"),
    }


_UNLISTED: Final = {0: "is not allowed: the policy lists none", 1: "is not the one that the policy lists"}
_SENTENCES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tcb_status": "The platform's TCB status is {got}, and the policy accepts {wanted}.",
        "advisory_ids": "The platform has the advisories {got}, and of these the policy accepts none.",
        "os_image": "The OS image (osImageHash) {unlisted}.",
        "kms_mr_aggregated": "The KMS's measurement (mrAggregated) {unlisted}.",
        "kms_device": "The device of the KMS (deviceId) {unlisted}.",
        "app_registered": "The app (appId) {unlisted}.",
        "app_compose_hash": "The app is registered, but its app-compose (composeHash) {unlisted}.",
        "app_device": "The device of the app (deviceId) {unlisted}.",
    }
)
_ORIGINS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tcbStatus": "The TCB status comes from the platform and its collateral: update its firmware, or ask at "
        "another time (--time). A status that a policy lists is accepted of every platform.",
        "advisoryIds": "The advisories come from the platform and its collateral: update its firmware. An advisory "
        "that a policy lists is accepted of every platform.",
        "osImageHash": "The osImageHash is the SHA-256 of the image's sha256sum.txt, as the VM config names it: is it "
        "the image that was meant?",
        "mrAggregated": "The mrAggregated changes with OS image, memory size, CPUs, app-compose and every runtime "
        "event: `dstack-emu inspect` shows them.",
        "appId": "The appId is in the event log (`dstack-emu inspect`): does the policy name it, all 40 digits of it?",
        "composeHash": "The composeHash is the SHA-256 of app-compose.json, to the byte: compare `sha256sum "
        "app-compose.json`.",
        "deviceId": "The deviceId is the SHA-256 of the platform's PPID: another machine has another one.",
    }
)
"""Where each member of a boot info comes from."""


def as_json(report: Report) -> str:
    """Return the JSON object as text, on one line."""
    return json.dumps(report.document())
