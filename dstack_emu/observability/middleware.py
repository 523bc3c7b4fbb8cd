"""What stands before every service of a stack: it notes each call in the journal, and lets it meet its faults.

One middleware for each service. Where the journal is off and there are no faults it hands the call on and does nothing.
"""

import functools
import json
import operator
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from multidict import istr

from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.errors import AuthError
from dstack_emu.auth.policy import accepted_tcb_statuses
from dstack_emu.auth.server import Observer
from dstack_emu.auth.simple import SimpleAuth
from dstack_emu.observability.fault_effects import DroppedError, Stale, apply_fault
from dstack_emu.observability.fault_rules import FaultRules, Met
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.spans import HEADER, CallSpan, answered, current, enter, leave, read_header
from dstack_emu.simulator.pccs import REVALIDATION_PATH

UNNOTED: Final = frozenset(("/health", "/metrics", REVALIDATION_PATH))
"""What is asked again and again: not in the journal. (Collateral that has changed is asked for by document.)"""

SHOWN: Final = 500

_HEADER: Final = istr(HEADER)
"""Looked up by every call; a plain text would be folded to lower case each time."""

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


def journal_middleware(service: str, journal: Journal, faults: FaultRules, *, stale: Stale | None = None) -> Middleware:
    """Make a service's middleware; `stale` answers for a PCCS with collateral that has expired."""

    @web.middleware
    async def stand_before(request: web.Request, handler: Handler) -> web.StreamResponse:
        rules = faults.rules
        if not rules and not journal.enabled:
            return await handler(request)
        path = request.rel_url.raw_path  # which the router has worked out before
        noted = journal.enabled and path not in UNNOTED
        if not rules and not noted:
            return await handler(request)
        if rules and path == REVALIDATION_PATH:
            return web.Response(status=204)  # "ask for the documents": a fault may be before any of them
        name = call_name(path)
        header = request.headers.get(_HEADER)
        asking, place, caller = read_header(header)
        met = faults.meet(service, name, caller) if rules else None
        if not noted:
            if met is None:
                return await handler(request)
            try:
                return await apply_fault(*met, request, handler, stale)
            except DroppedError:
                return web.Response()  # to a connection that is gone
        call = journal.begin(service, name, asking, place, caller)
        status, error = None, ""
        before = enter(call)
        try:
            response = await (handler(request) if met is None else meeting(call, met, request, handler))
            status = response.status
            answered(header)
            if status >= 400:
                error = journal.scrub(_error_text(response))
            return response
        except DroppedError:
            return web.Response()
        except web.HTTPException as refusal:
            status, error = refusal.status, refusal.reason
            raise
        finally:
            leave(before)
            journal.end(call, status, error)

    async def meeting(call: CallSpan, met: Met, request: web.Request, handler: Handler) -> web.StreamResponse:
        rule, fault = met
        call.note("fault", {"id": rule.id, "kind": fault.kind})
        response = await apply_fault(rule, fault, request, handler, stale)
        if fault.kind == "decision":
            call.note("decision", {**(call.notes.get("decision") or {}), **_decided(response)})
        return response

    return stand_before


def _decided(response: web.StreamResponse) -> dict[str, Any]:
    """What an answer that a fault made up says."""
    body = response.body if isinstance(response, web.Response) and response.status == 200 else b"{}"
    document = json.loads(body) if isinstance(body, bytes) else {}
    return {"allowed": document.get("isAllowed"), "reason": document.get("reason"), "rule": "fault"}


@functools.lru_cache(maxsize=1024)
def call_name(path: str) -> str:
    """What a call is named: an RPC by its own name, without service and mount; anything else by its path."""
    head, _, last = path.rpartition("/")
    name = last.rpartition(".")[2]
    return name if head in ("", "/prpc") and name[:1].isupper() and name.isalnum() else path


def _error_text(response: web.StreamResponse) -> str:
    body = response.body if isinstance(response, web.Response) else None
    if not isinstance(body, bytes | bytearray):
        return ""
    text = bytes(body).decode(errors="replace")
    try:
        document = json.loads(text)
    except ValueError:
        return text[:SHOWN]
    said = document.get("error") if isinstance(document, dict) else None
    return said if isinstance(said, str) else text[:SHOWN]


# ---- what a webhook decided, and by what


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
