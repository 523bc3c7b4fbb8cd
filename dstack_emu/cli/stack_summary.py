"""The summary that `dstack-emu up` prints when the stack is ready."""

import json
import shlex
from typing import Any

_WHAT = {
    "pccs": "collateral for this stack's quotes",
    "kms-src": "KMS, source",
    "kms-dst": "KMS, destination",
    "app": "guest agent of the app",
    "verifier": "verifies evidence and OS images",
    "control": "control API, for `dstack-emu ctl`",
    "vmm": "VMM, which deploys machines",
    "gateway": "gateway, at which apps register",
    "gateway-admin": "gateway, for its operator",
    "agent-gateway": "guest agent of the gateway",
    "chain": "JSON-RPC of the chain with DstackKms",
    "ingress": "leads to apps, by TLS server name",
}
_OF_A_KMS = {"auth": "auth webhook of kms-", "agent": "guest agent of kms-", "kms": "KMS "}
"""What the services of a KMS are, by the first part of their names; the second is the KMS."""


def summary(description: dict[str, Any], seconds: float) -> str:
    """Render a stack's description: a table of services, measured values, and commands to paste."""
    lines = [f"dstack-emu is {_state(description)} ({seconds:.1f} s). It protects nothing.", ""]
    lines += [f"  {name:<13} {url:<28} {_what(name)}" for name, url in description["services"].items()]
    lines += [
        f"  auth-{name:<8} {url:<28} your auth webhook of kms-{name}"
        for name, url in description["webhooks"].items()
        if f"auth-{name}" not in description["services"]
    ]
    if description["grpc"]:
        lines += ["", "gRPC:"]
        lines += [f"  {name:<18} {target}" for name, target in description["grpc"].items()]
    lines += ["", f"In a browser: {description['services']['control']}/"]
    for name, files in description["foreign_kms"].items():
        lines += ["", f"Your KMS is kms-{name}:"]
        lines += [f"  {what:<7} {where}" for what, where in files.items()]
    lines += ["", "Measured:"]
    for side, info in description["kms"].items():
        lines += [
            f"  kms-{side}  mr_aggregated {info['mr_aggregated']}",
            f"           device_id     {info['device_id']}",
        ]
    app = description["app"]
    lines += [
        f"  app      app_id {app['app_id']}  compose_hash {app['compose_hash']}",
    ]
    if gateway := description.get("gateway"):
        lines += ["", "Apps are behind the gateway:"]
        lines += [f"  app_url  {gateway['app_url']}", f"  trust    {gateway['ca']}"]
    if chain := description.get("chain"):
        lines += ["", f"Contracts decide for {' and '.join(f'kms-{name}' for name in chain['decides_for'])}:"]
        lines += [f"  DstackKms {chain['contracts']['kms']}, owner {chain['contracts']['owner']}"]
    if policies := description["policies"]:
        lines += ["", "Policies (edit them while the stack runs; they are read at every request):"]
        lines += [f"  {path}" for path in policies.values()]
    lines += ["", "Commands to paste into another terminal:"]
    lines += [f"  export {name}={shlex.quote(value)}" for name, value in description["env"].items()]
    lines += [f"  export DSTACK_EMU_STATE={shlex.quote(description['state'])}"]
    lines += [f"  {line}" for line in (_onboard_steps(description) or _ready_steps(description))]
    lines += ["", f"State: {description['state']}. Ctrl-C stops it."]
    return "\n".join(lines)


def _without_keys(description: dict[str, Any]) -> list[str]:
    """Return which of the two KMS are in the onboard phase; --fresh leaves it as the state folder has it."""
    services = description["services"]
    return [name for name in ("kms-src", "kms-dst") if description["fresh"] and services[name].startswith("http:")]


def _state(description: dict[str, Any]) -> str:
    if not description["fresh"]:
        return "ready"
    match _without_keys(description):
        case []:
            return "ready: both KMS have the keys of an earlier run, and the app has none because of --fresh"
        case [name]:
            return f"ready: {name} has no keys, and is in the onboard phase"
        case _:
            return f"ready, without keys: both KMS are in the onboard phase, and {_who_is_allowed(description)}"


def _who_is_allowed(description: dict[str, Any]) -> str:
    """Say whom the KMS of a fresh stack allow: by the stack's policies nobody; a webhook or contract decides."""
    others = [_decider(description, kms) for kms in ("src", "dst") if kms not in description["policies"]]
    match others:
        case []:
            return "nobody is allowed before a policy says so"
        case [one]:
            return f"{one} decides; the other allows nobody before its policy says so"
        case _:
            return f"{' and '.join(others)} decide"


def _decider(description: dict[str, Any], kms: str) -> str:
    own = "your webhook" if kms in description["webhooks"] else "the contract"
    return f"{'the policy' if kms in description['policies'] else own} of kms-{kms}"


def _what(name: str) -> str:
    """Say what a service is; trust domains and KMS that control added are services, too."""
    kind, _, kms = name.partition("-")
    if name in _WHAT or not kms or kind not in _OF_A_KMS:
        return _WHAT.get(name, "guest agent of a trust domain")
    return _OF_A_KMS[kind] + kms


def _onboard_steps(description: dict[str, Any]) -> list[str]:
    """Return the calls by which the first KMS without keys gets them, nothing if both have keys."""
    if not (waiting := _without_keys(description)):
        return []
    services, domain = description["services"], description["kms_names"][0]
    kms, source = services[waiting[0]], f"{services['kms-src']}/prpc"
    call, body, condition = {
        "kms-src": ("Bootstrap", {"domain": domain}, f"{_decider(description, 'src')} allows"),
        "kms-dst": (
            "Onboard",
            {"source_url": source, "domain": domain},
            f"{_decider(description, 'src')} and {_decider(description, 'dst')} allow",
        ),
    }[waiting[0]]
    return [
        f"curl -s -X POST '{kms}/prpc/Onboard.GetAttestationInfo?json'",
        f"curl -s -X POST '{kms}/prpc/Onboard.{call}?json' -d '{json.dumps(body, separators=(',', ':'))}'",
        f"# {call} is refused until {condition} it (docs/tutorial.md). Only after a success:",
        f"# curl -s '{kms}/finish'   (a KMS without keys exits, and the stack with it)",
    ]


def _ready_steps(description: dict[str, Any]) -> list[str]:
    services, sock = description["services"], shlex.quote(description["app"]["dstack_sock"])
    root = shlex.quote(description["kms_ca"])
    return [
        f"curl -s --unix-socket {sock} http://localhost/Info",
        f"curl -s --unix-socket {sock} 'http://localhost/GetQuote?report_data=00'",
        f"curl -s --cacert {root} '{services['kms-src']}/prpc/KMS.GetMeta?json'",
        f"curl -s --cacert {root} '{services['kms-src']}/prpc/KMS.GetTempCaCert?json'",
    ]
