"""Records the decisions of a stack's webhooks in the journal: request, result, rule, and the value that differs."""

import operator
from typing import Any, Final

from pydantic.alias_generators import to_camel

from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo, Refusal
from dstack_emu.auth.server import DecisionObserver
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
_FIELD_OF: Final = {to_camel(name): name for name in ("advisory_ids", *_REQUEST_FIELDS)}
_request_of: Final = operator.attrgetter("advisory_ids", *_REQUEST_FIELDS)
_result_of: Final = operator.attrgetter("reason", "rule", "differs_from", "state")

_CACHED: Final = 256
"""Entries of the cache below."""


def decision_recorder() -> DecisionObserver:
    """Make the observer of a webhook, which records each decision on the span of its call."""
    cached: dict[tuple[Any, ...], dict[str, Any]] = {}
    admitted = _Admitted()

    def record(boot_info: ReceivedBootInfo, is_kms: bool, decision: PolicyDecision) -> None:
        call = current()
        if not isinstance(call, CallSpan):
            return
        # The journal keeps thousands of calls: equal decisions share one document, so that each costs little memory.
        key = (is_kms, _request_of(boot_info), _result_of(decision))
        document = cached.get(key) if decision.is_allowed else None
        if document is None:
            document = _document_of(boot_info, is_kms, decision)
            if decision.refusal is not None:
                document["mismatch"] = _mismatch(decision.refusal, admitted)
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
    if decision.state:
        document["state"] = decision.state
    if decision.chain_error:
        document["chain_error"] = decision.chain_error
    return document


def _fields_of(boot_info: ReceivedBootInfo) -> dict[str, Any]:
    return {name: getattr(boot_info, name) for name in _REQUEST_FIELDS} | {"advisory_ids": list(boot_info.advisory_ids)}


class _Admitted:
    """Sorts the values that a policy admits, once for denials that follow each other: a policy may have thousands."""

    def __init__(self) -> None:
        self._values: frozenset[str] = frozenset()
        self._sorted: list[str] = []

    def sorted(self, values: frozenset[str]) -> list[str]:
        """Return the values in order; the list is shared, and not to be changed."""
        if values is not self._values:
            self._values, self._sorted = values, sorted(values)
        return self._sorted


def _mismatch(refusal: Refusal, admitted: _Admitted) -> dict[str, Any]:
    """Return the field that the policy does not admit, its value, and the values that the policy admits."""
    field = _FIELD_OF[refusal.member]
    got = list(refusal.got) if field == "advisory_ids" else refusal.got[0]
    return {"field": field, "got": got, "allowed": admitted.sorted(refusal.expected)}
