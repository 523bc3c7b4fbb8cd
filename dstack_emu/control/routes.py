"""The table of the control API's routes: method, path, body and call of each. The OpenAPI document is made from it."""

import re
from collections.abc import Callable
from typing import Any, Final

from dstack_emu.attest.version import EMULATOR
from dstack_emu.control.api import Control
from dstack_emu.control.chain_routes import CHAIN_ROUTES
from dstack_emu.control.metrics_route import DESCRIBED, METRICS
from dstack_emu.control.route import Nothing, Route
from dstack_emu.control.route import given as _given
from dstack_emu.control.route import number as _number
from dstack_emu.control.schemas import (
    AdmissionQuestion,
    BootRequest,
    ClockChange,
    ControlError,
    EvidenceInput,
    EvidenceQuestion,
    OnboardRequest,
    PlatformChange,
    PolicyChange,
    PolicyText,
    RequestBody,
    TxtRecord,
    VendorChange,
)
from dstack_emu.control.snapshot_routes import SNAPSHOT_ROUTES
from dstack_emu.control.snapshots import StackState
from dstack_emu.deployment.specs import EventSpec, GuestSpec, KmsSpec
from dstack_emu.observability.fault_rules import FaultRule


class _Policy(RequestBody):
    """The content of auth-simple's policy file; it is not validated."""


def _journal(control: Control, path: dict[str, str], query: dict[str, str], body: Any) -> dict[str, Any]:
    since, limit = _number(query, "since", 0), _number(query, "limit", 1000)
    before = _number(query, "before", 0) if "before" in query else None
    patterns = {key: query[key] for key in ("call", "service", "caller", "outcome") if key in query}
    control.require_recordable(**patterns)
    journal = control.journal
    if patterns:
        found = journal.find(**patterns, since=since, before=before)[-limit:]
    else:
        found = journal.records(since=since, before=before, limit=limit)
    return {"position": journal.position, "records": found if limit else []}


def _count(control: Control, path: dict[str, str], query: dict[str, str], body: Any) -> dict[str, int]:
    patterns = {key: query[key] for key in ("call", "service", "caller", "outcome") if key in query}
    control.require_recordable(**patterns)
    return {"calls": control.journal.calls(**patterns, since=_number(query, "since", 0))}


async def _load(control: Control, path: dict[str, str], query: dict[str, str], body: Any) -> None:
    await control.load(body)


def _set_policy(control: Control, path: dict[str, str], query: dict[str, str], body: Any) -> Any:
    if not isinstance(body, dict):
        raise ControlError(f"a policy is a JSON object, got {type(body).__name__}")
    control.set_policy(path["kms"], body)
    return control.policy(path["kms"])


def _switch(control: Control, enabled: bool) -> dict[str, bool]:
    control.journal.enabled = enabled
    return {"enabled": enabled}


async def _asked(control: Control, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a call says once the phases of all KMS are those of now."""
    await control.refresh_kms()
    return read()


_FIND: Final = ("call", "service", "caller", "outcome", "since")

ROUTES: Final = (
    Route("GET", "/stack", "The stack and every part of it", lambda c, p, q, b: _asked(c, c.describe)),
    Route("GET", "/stack/health", "The health of each service", lambda c, p, q, b: c.health()),
    Route("GET", "/machines", "The machines of the VMM", lambda c, p, q, b: c.machines()),
    Route("GET", "/certificates", "The root of the emulated Intel, decoded", lambda c, p, q, b: c.certificates()),
    Route("GET", "/certificates/{name}", "The same as PEM", lambda c, p, q, b: c.certificate(p["name"])),
    Route(
        "POST",
        "/inspect",
        "What something is, and its contents",
        lambda c, p, q, b: c.inspect(**_given(b)),
        EvidenceInput,
    ),
    Route(
        "POST",
        "/verify",
        "Every check of evidence, by the stack's PCCS, root and clock",
        lambda c, p, q, b: c.verify(**_given(b)),
        EvidenceQuestion,
    ),
    Route(
        "POST",
        "/admit",
        "What each KMS would decide about evidence, a boot info or an app-compose, and why",
        lambda c, p, q, b: c.admit(**_given(b)),
        AdmissionQuestion,
    ),
    Route("GET", "/clock", "The clock's time", lambda c, p, q, b: c.clock()),
    Route(
        "POST", "/clock", "Set, advance, freeze or resume it", lambda c, p, q, b: c.set_clock(**_given(b)), ClockChange
    ),
    Route("GET", "/vendor", "The vendor's state, for all platforms", lambda c, p, q, b: c.vendor()),
    Route("PATCH", "/vendor", "Change the vendor's state", lambda c, p, q, b: c.set_vendor(**_given(b)), VendorChange),
    Route("GET", "/platforms", "Every platform", lambda c, p, q, b: c.platforms()),
    Route("GET", "/platforms/{name}", "One platform", lambda c, p, q, b: c.platform(p["name"])),
    Route("PUT", "/platforms/{name}", "Add a platform", lambda c, p, q, b: c.add_platform(p["name"]), Nothing),
    Route(
        "PATCH",
        "/platforms/{name}",
        "Change the state of a platform",
        lambda c, p, q, b: c.set_platform(p["name"], **_given(b)),
        PlatformChange,
    ),
    Route("GET", "/gateway", "The gateway, and the instances that it has registered", lambda c, p, q, b: c.gateway()),
    Route(
        "POST",
        "/gateway/instances/{id}/end-handshake",
        "Let the gateway have heard nothing of an instance, until it registers again",
        lambda c, p, q, b: c.end_handshake(p["id"]),
        Nothing,
    ),
    Route(
        "PUT",
        "/gateway/txt/{name}",
        "Set the TXT record of a domain name, by which the ingress finds custom domains",
        lambda c, p, q, b: c.set_txt_record(p["name"], b.value),
        TxtRecord,
    ),
    Route("DELETE", "/gateway/txt/{name}", "Delete it", lambda c, p, q, b: c.delete_txt_record(p["name"])),
    Route("GET", "/guests", "Every trust domain", lambda c, p, q, b: c.describe()["guests"]),
    Route(
        "POST",
        "/guests",
        "Add a trust domain, without keys",
        lambda c, p, q, b: c.add_guest(**_given(b)),
        GuestSpec,
    ),
    Route("GET", "/guests/{name}", "One trust domain", lambda c, p, q, b: c.guest(p["name"])),
    Route(
        "GET",
        "/guests/{name}/evidence",
        "Its present evidence over 64 zero bytes, as its agent's Attest answers",
        lambda c, p, q, b: c.guest_evidence(p["name"]),
    ),
    Route("DELETE", "/guests/{name}", "Stop it", lambda c, p, q, b: c.remove_guest(p["name"])),
    Route(
        "POST",
        "/guests/{name}/boot",
        "Let it fetch keys from a KMS; 403 with the KMS's text if it is refused",
        lambda c, p, q, b: c.boot_guest(p["name"], b.kms),
        BootRequest,
    ),
    Route(
        "POST",
        "/guests/{name}/events",
        "Add an event to its log, and extend RTMR3 unless `measured` is false",
        lambda c, p, q, b: c.emit_event(p["name"], b.event, b.payload, measured=b.measured),
        EventSpec,
    ),
    Route("GET", "/kms", "Every KMS", lambda c, p, q, b: _asked(c, c.all_kms)),
    Route("POST", "/kms", "Add a KMS, without keys", lambda c, p, q, b: c.add_kms(**_given(b)), KmsSpec),
    Route("GET", "/kms/{name}", "One KMS", lambda c, p, q, b: _asked(c, lambda: c.kms(p["name"]))),
    Route("DELETE", "/kms/{name}", "Stop it", lambda c, p, q, b: c.remove_kms(p["name"])),
    Route(
        "GET",
        "/kms/{name}/certificates",
        "Its certificates, decoded",
        lambda c, p, q, b: c.kms_certificates(p["name"]),
    ),
    Route(
        "GET",
        "/kms/{kms}/certificates/{name}",
        "The certificates in one of its files as PEM",
        lambda c, p, q, b: c.kms_certificate(p["kms"], p["name"]),
    ),
    Route(
        "POST",
        "/kms/{name}/onboard",
        "Onboard it from another KMS, or bootstrap it; 403 with the KMS's text if that is refused",
        lambda c, p, q, b: c.onboard_kms(p["name"], **_given(b)),
        OnboardRequest,
    ),
    Route(
        "POST",
        "/kms/{name}/restart",
        "Start it anew with its keys, as a new process that judges itself again",
        lambda c, p, q, b: c.restart_kms(p["name"]),
        Nothing,
    ),
    Route("GET", "/policies", "The paths of the policy files", lambda c, p, q, b: c.policies()),
    Route("GET", "/policies/{kms}", "A policy", lambda c, p, q, b: c.policy(p["kms"])),
    Route("PUT", "/policies/{kms}", "Replace a policy", _set_policy, _Policy, validates=False),
    Route(
        "POST",
        "/policies/{kms}/check",
        "What is wrong with a policy, and what it would change",
        lambda c, p, q, b: c.check_policy(p["kms"], b.text),
        PolicyText,
    ),
    Route(
        "POST",
        "/policies/{kms}/allow",
        "Allow a trust domain, an app or a KMS",
        lambda c, p, q, b: c.change_policy(p["kms"], b, is_allowed=True),
        PolicyChange,
    ),
    Route(
        "POST",
        "/policies/{kms}/deny",
        "Stop allowing one",
        lambda c, p, q, b: c.change_policy(p["kms"], b, is_allowed=False),
        PolicyChange,
    ),
    *CHAIN_ROUTES,
    Route("GET", "/faults", "The faults in force", lambda c, p, q, b: c.faults()),
    Route("POST", "/faults", "Put a fault in force", lambda c, p, q, b: c.add_fault(**_given(b)).to_json(), FaultRule),
    Route("DELETE", "/faults", "Lift all faults", lambda c, p, q, b: c.clear_faults()),
    Route("DELETE", "/faults/{id}", "Lift one fault", lambda c, p, q, b: c.lift_fault(p["id"])),
    Route(
        "GET", "/journal", "Records, or the calls among them that match", _journal, query=(*_FIND, "before", "limit")
    ),
    Route("GET", "/journal/count", "How many calls match", _count, query=_FIND),
    Route("GET", "/journal/{id}", "One record", lambda c, p, q, b: c.record(p["id"])),
    Route("GET", "/journal/{id}/diagram", "A record as a picture", lambda c, p, q, b: c.diagram(p["id"])),
    Route(
        "GET",
        "/journal/{id}/svg",
        "The same picture as an SVG document",
        lambda c, p, q, b: c.svg(p["id"]),
        media_type="image/svg+xml",
    ),
    Route(
        "GET",
        "/journal/{id}/mermaid",
        "The same in Mermaid, for a text in Markdown",
        lambda c, p, q, b: c.mermaid(p["id"]),
        media_type="text/plain",
    ),
    Route(
        "GET",
        "/journal/{id}/why",
        "Why webhooks denied in it, and the change of the policy that admits it",
        lambda c, p, q, b: c.why(p["id"]),
    ),
    Route("DELETE", "/journal", "Forget every record", lambda c, p, q, b: c.journal.clear()),
    Route("POST", "/journal/on", "Record calls", lambda c, p, q, b: _switch(c, True), Nothing),
    Route("POST", "/journal/off", "Record nothing", lambda c, p, q, b: _switch(c, False), Nothing),
    *SNAPSHOT_ROUTES,
    Route("GET", "/state", "The state of the stack, to be saved", lambda c, p, q, b: c.save()),
    Route("PUT", "/state", "Restore a saved state", _load, StackState, validates=False),
)


def openapi() -> dict[str, Any]:
    """Build the OpenAPI document."""
    schemas: dict[str, Any] = {
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    }
    paths: dict[str, dict[str, Any]] = {
        "/journal/stream": {
            "get": {
                "summary": "Each record as its call ends, as JSON lines or server-sent events",
                "operationId": "get_journal_stream",
                "parameters": [_parameter("since", "query")],
                "responses": {"200": {"description": "It does not end", "content": {"application/x-ndjson": {}}}},
            }
        }
    }
    paths[METRICS] = DESCRIBED
    for route in ROUTES:
        described: dict[str, Any] = {
            "summary": route.summary,
            "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
            "responses": {
                "200": {"description": "Done", "content": {route.media_type: {}}},
                "4XX": {"description": "Refused; nothing has changed", "content": _json("Error")},
            },
        }
        parameters = [_parameter(name, "path") for name in re.findall(r"{(\w+)}", route.path)]
        parameters += [_parameter(name, "query") for name in route.query]
        if parameters:
            described["parameters"] = parameters
        if route.body is not None:
            name = route.body.__name__.removeprefix("_")
            schema = route.body.model_json_schema(ref_template="#/components/schemas/{model}")
            if not route.validates and not route.body.model_fields:
                schema["additionalProperties"] = True
            schemas |= schema.pop("$defs", {})
            schemas[name] = schema
            described["requestBody"] = {"required": bool(schema.get("required")), "content": _json(name)}
        paths.setdefault(route.path, {})[route.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "dstack-emu control API", "version": EMULATOR},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _parameter(name: str, where: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": {"type": "string"}}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
