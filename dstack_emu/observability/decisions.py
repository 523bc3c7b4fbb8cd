"""Records the decisions of a stack's webhooks in the journal: request, result, rule, and the value that differs."""

import operator
from typing import Any, Final

from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.errors import AuthError
from dstack_emu.auth.policy import accepted_tcb_statuses
from dstack_emu.auth.server import DecisionObserver
from dstack_emu.auth.simple import SimpleAuth
from dstack_emu.observability.spans import CallSpan, current

_REQUEST_FIELDS: Final = (
    "app_id",
    "compose_hash",
    "instance_id",
    "device_id",
    "mr_aggregated",
    "os_image_hash",
    "tcb_status",
)
_request_of: Final = operator.attrgetter("advisory_ids", *_REQUEST_FIELDS)
_result_of: Final = operator.attrgetter("reason", "rule", "differs_from")

_CACHED: Final = 256
"""Entries of the cache below."""


def decision_recorder(policy_path: str) -> DecisionObserver:
    """Make the observer of an auth-simple, which records each decision on the span of its call."""
    auth = SimpleAuth(policy_path)
    cached: dict[tuple[Any, ...], dict[str, Any]] = {}

    def record(boot_info: ReceivedBootInfo, is_kms: bool, decision: PolicyDecision) -> None:
        call = current()
        if not isinstance(call, CallSpan):
            return
        # The journal keeps thousands of calls: equal decisions share one document, so that each costs little memory.
        key = (is_kms, _request_of(boot_info), _result_of(decision))
        document = cached.get(key) if decision.is_allowed else None
        if document is None:
            document = _document_of(boot_info, is_kms, decision)
            if not decision.is_allowed and (mismatch := _mismatch(auth, boot_info, decision.rule)) is not None:
                document["mismatch"] = mismatch
            if len(cached) >= _CACHED:
                cached.clear()
            cached[key] = document
        call.annotate("decision", document)

    return record


def _document_of(boot_info: ReceivedBootInfo, is_kms: bool, decision: PolicyDecision) -> dict[str, Any]:
    document: dict[str, Any] = {
        "about": "kms" if is_kms else "app",
        "allowed": decision.is_allowed,
        "reason": decision.reason,
        "rule": decision.rule,
        "asked": _fields_of(boot_info),
    }
    if decision.differs_from:
        document["otherwise_under"] = list(decision.differs_from)
    return document


def _fields_of(boot_info: ReceivedBootInfo) -> dict[str, Any]:
    return {name: getattr(boot_info, name) for name in _REQUEST_FIELDS} | {"advisory_ids": list(boot_info.advisory_ids)}


def _mismatch(auth: SimpleAuth, boot_info: ReceivedBootInfo, rule: str) -> dict[str, Any] | None:
    """Return the field that did not match, its value, and the values that the policy allows; None if no field did."""
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
