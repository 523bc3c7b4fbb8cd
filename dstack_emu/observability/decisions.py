"""What an auth webhook of the stack decided, and by what: recorded in the journal with what did not match."""

import operator
from typing import Any, Final

from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.errors import AuthError
from dstack_emu.auth.policy import accepted_tcb_statuses
from dstack_emu.auth.server import Observer
from dstack_emu.auth.simple import SimpleAuth
from dstack_emu.observability.spans import CallSpan, current

_ASKED: Final = (
    "app_id",
    "compose_hash",
    "instance_id",
    "device_id",
    "mr_aggregated",
    "os_image_hash",
    "tcb_status",
)
_what_was_asked: Final = operator.attrgetter("advisory_ids", *_ASKED)
_what_was_said: Final = operator.attrgetter("reason", "rule", "differs_from")

_KNOWN: Final = 256
"""Decisions whose words are kept."""


def decision_recorder(policy_path: str) -> Observer:
    """Make the observer of an auth-simple: it notes question, answer, the rule that decided, and what did not match."""
    auth = SimpleAuth(policy_path)
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def note(boot_info: ReceivedBootInfo, is_kms: bool, decision: PolicyDecision) -> None:
        call = current()
        if not isinstance(call, CallSpan):
            return
        # The same question has the same words each time it is answered alike: what is kept of a call should be little.
        key = (is_kms, _what_was_asked(boot_info), _what_was_said(decision))
        noted = known.get(key) if decision.is_allowed else None
        if noted is None:
            noted = _noted(boot_info, is_kms, decision)
            if not decision.is_allowed and (mismatch := _mismatch(auth, boot_info, decision.rule)) is not None:
                noted["mismatch"] = mismatch
            if len(known) >= _KNOWN:
                known.clear()
            known[key] = noted
        call.note("decision", noted)

    return note


def _noted(boot_info: ReceivedBootInfo, is_kms: bool, decision: PolicyDecision) -> dict[str, Any]:
    noted: dict[str, Any] = {
        "about": "kms" if is_kms else "app",
        "allowed": decision.is_allowed,
        "reason": decision.reason,
        "rule": decision.rule,
        "asked": _asked(boot_info),
    }
    if decision.differs_from:
        noted["otherwise_under"] = list(decision.differs_from)
    return noted


def _asked(boot_info: ReceivedBootInfo) -> dict[str, Any]:
    return {name: getattr(boot_info, name) for name in _ASKED} | {"advisory_ids": list(boot_info.advisory_ids)}


def _mismatch(auth: SimpleAuth, boot_info: ReceivedBootInfo, rule: str) -> dict[str, Any] | None:
    """What was measured and what the policy has in its place."""
    try:
        policy = auth.policy()
    except AuthError:
        return None
    app = policy.apps.get(f"0x{boot_info.app_id.lower().removeprefix('0x')}")
    table: dict[str, tuple[str, Any, Any]] = {
        "tcb_status": ("tcb_status", boot_info.tcb_status, accepted_tcb_statuses(policy, auth.contract)),
        "advisory_ids": ("advisory_ids", list(boot_info.advisory_ids), policy.allowed_advisory_ids),
        "os_image": ("os_image_hash", boot_info.os_image_hash, policy.os_images),
        "kms_mr_aggregated": ("mr_aggregated", boot_info.mr_aggregated, policy.kms.mr_aggregated),
        "kms_device": ("device_id", boot_info.device_id, policy.kms.devices),
        "app_registered": ("app_id", boot_info.app_id, policy.apps),
        "app_compose_hash": ("compose_hash", boot_info.compose_hash, app.compose_hashes if app else ()),
        "app_device": ("device_id", boot_info.device_id, app.devices if app else ()),
    }
    if rule not in table:
        return None
    field, got, allowed = table[rule]
    return {"field": field, "got": got, "allowed": sorted(allowed)}
