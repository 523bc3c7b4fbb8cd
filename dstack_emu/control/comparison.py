"""What differs between two states of a stack, part by part, for people: policies as diffs, everything else as values.

`control.differences` has the same place by place. Neither shows keys, tokens or positions of random streams.
"""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.x509 import load_pem_x509_certificates

from dstack_emu.attest.moment import iso
from dstack_emu.control.differences import differences
from dstack_emu.control.snapshots import StackState
from dstack_emu.deployment.clock import ClockState
from dstack_emu.deployment.state import GuestState, KmsState
from dstack_emu.gateway.state import GatewayState
from dstack_emu.inspection.policy_change import policy_diff
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT, RPC_CERT, TMP_CA_CERT
from dstack_emu.observability.fault_rules import FaultState
from dstack_emu.transport.urls import shown_url

ABSENT: Final = "absent"
_CERTIFICATES: Final = (ROOT_CA_CERT, RPC_CERT, TMP_CA_CERT)
_LONGEST: Final = 300
"""Characters of a value that are shown."""
_TOLD: Final = ("clock", "vendor", "platforms", "policies", "faults", "fault_count", "journal", "chain", "txt_records")
"""Members of a state of which everything is shown."""

Values = Mapping[str, str]


@dataclass(slots=True)
class Part:
    """What differs in one part: values by `what`, before and after, and of a policy the unified `diff`."""

    part: str
    changes: list[dict[str, str]] = field(default_factory=list)
    diff: str = ""


def comparison(one: StackState, other: StackState) -> dict[str, Any]:
    """Return the `parts` that differ, and `unseen`: the places that differ, too, but are not shown."""
    parts = [part for part in _parts(one, other) if part.changes or part.diff]
    unseen = [each["path"] for each in differences(one, other) if each["before"] == each["after"] == "not shown"]
    return {
        "parts": [asdict(part) for part in parts],
        "unseen": [path for path in unseen if path.split("/")[1] not in _TOLD],
    }


def _parts(one: StackState, other: StackState) -> Iterator[Part]:
    yield _changed("clock", _clock(one.clock), _clock(other.clock))
    for kms in _names(one.policies, other.policies):
        yield _policy(kms, one.policies.get(kms), other.policies.get(kms))
    yield from _each("platform", one.platforms, other.platforms, lambda state: _values(asdict(state)))
    yield _changed("vendor", _values(asdict(one.vendor)), _values(asdict(other.vendor)))
    yield _changed("faults", _faults(one.faults), _faults(other.faults))
    yield from _each("trust domain", one.guests, other.guests, _guest)
    yield from _each("KMS", one.kms, other.kms, _kms)
    yield _changed("machines", _machines(one), _machines(other))
    yield _changed("gateway", _gateway(one.gateway), _gateway(other.gateway))
    yield _changed("TXT records", one.txt_records, other.txt_records)
    yield _changed("chain", _chain(one), _chain(other))
    yield _changed("journal", {"calls so far": str(one.journal)}, {"calls so far": str(other.journal)})


def _names(one: Iterable[str], other: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*one, *other]))


def _changed(part: str, before: Values, after: Values) -> Part:
    rows = [(what, before.get(what, ABSENT), after.get(what, ABSENT)) for what in _names(before, after)]
    return Part(part, [{"what": what, "before": was, "after": now} for what, was, now in rows if was != now])


def _each(kind: str, one: Mapping[str, Any], other: Mapping[str, Any], values: Any) -> Iterator[Part]:
    for name in _names(one, other):
        before, after = ({} if name not in state else values(state[name]) for state in (one, other))
        part = _changed(f"{kind} {name}", before, after)
        if (name in one) != (name in other):
            was, now = (ABSENT, "there") if name in other else ("there", ABSENT)
            part.changes.insert(0, {"what": "itself", "before": was, "after": now})
        yield part


def _policy(kms: str, before: bytes | None, after: bytes | None) -> Part:
    was, now = _document(before), _document(after)
    try:
        return Part(f"policy of kms-{kms}", diff=policy_diff(f"auth-{kms}.json", json.loads(was), json.loads(now)))
    except ValueError:
        return _changed(
            f"policy of kms-{kms}", {"text, which is no JSON": _short(was)}, {"text, which is no JSON": _short(now)}
        )


def _document(content: bytes | None) -> str:
    return "{}" if content is None else content.decode("utf-8", "replace")


# ---- values of each part


def _clock(state: ClockState) -> Values:
    if state.frozen_at is not None:
        return {"time": f"frozen at {iso(state.frozen_at)}"}
    ahead = datetime.timedelta(seconds=round(abs(state.ahead)))
    return {
        "time": f"{ahead} {'after' if state.ahead > 0 else 'before'} the system clock"
        if ahead
        else "that of the system clock"
    }


def _values(state: Mapping[str, Any]) -> Values:
    return {name: _text(value) for name, value in state.items()}


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, Mapping):  # the dates of a document
        return ", ".join(f"{name} {iso(each)}" for name, each in value.items())
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _faults(faults: Iterable[FaultState]) -> Values:
    shown = {}
    for each in faults:
        rule = each.fault.model_dump(mode="json", exclude_defaults=True)
        said = ", ".join(
            f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in rule.items()
        )
        shown[f"f{each.number}"] = _short(f"{said}; met {each.met} of {each.seen} calls")
    return shown


def _guest(state: GuestState) -> Values:
    keys = state.keys
    shown = {
        "platform": state.spec.platform or f"host of {state.spec.name}",
        "RTMR3": state.rtmr3.hex(),
        "keys": "none" if keys is None else f"of kms-{keys.kms}",
        "at the gateway": "no" if state.gateway is None else "registered",
    }
    for number, event in enumerate(state.events, 1):
        shown[f"event {number}"] = _short(f"{event.event}: {event.payload.hex()}")
    return shown


def _kms(state: KmsState) -> Values:
    shown = {"phase": state.phase, "webhook": shown_url(state.spec.webhook), "requests": str(state.requests)}
    shown |= {"refused requests": str(state.failures)} if state.failures else {}
    for name in _CERTIFICATES:
        if content := state.files.get(name):
            shown[name] = _fingerprint(content)
    return shown | ({"root certificate": _fingerprint(state.foreign_root.encode())} if state.foreign_root else {})


def _fingerprint(pem: bytes) -> str:
    try:
        certificate = load_pem_x509_certificates(pem)[0]
    except ValueError:
        return "no certificate"
    return f"SHA-256 {certificate.fingerprint(hashes.SHA256()).hex()}, until {certificate.not_valid_after_utc:%Y-%m-%d}"


def _machines(state: StackState) -> Values:
    found = {} if state.machines is None else state.machines.machines
    return {
        f"{each.manifest.name} ({name})": "runs" if each.is_started and each.is_alive else "does not run"
        for name, each in found.items()
    }


def _gateway(state: GatewayState | None) -> Values:
    if state is None:
        return {}
    shown = {f"instance {name}": f"app {each.app_id}, at {each.ip}" for name, each in state.instances.items()}
    certificates = {
        f"certificate of {name}": _fingerprint(each.chain.encode()) for name, each in state.certificates.items()
    }
    return shown | {f"domain {name}": "served" for name in state.domains} | certificates


def _chain(state: StackState) -> Values:
    return {} if state.chain is None else {"entries of its log": str(len(state.chain))}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
