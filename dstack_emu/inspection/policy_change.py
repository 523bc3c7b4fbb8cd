"""The smallest change of a policy file that admits a boot: what refusals name is added until nothing is refused.

Only additions are made, each of one value at the place that a refusal names, so that the changed file admits as little
more as it can. The change is a JSON Patch (RFC 6902), and a unified diff of the JSON in the usual form.
"""

import copy
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.auth.boot_info import Refusal
from dstack_emu.inspection.policy_file import PolicyFile

MOST_STEPS: Final = 16
"""Refusals of one boot at most: there are fewer rules."""

Patch = list[dict[str, Any]]
_HEX_MEMBERS: Final = frozenset({"osImageHash", "mrAggregated", "composeHash", "deviceId", "appId"})


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What a policy refuses, one after another, and the change that admits it.

    `document` is the policy with the change. If `obstacle` is not empty, it says why no change of the file admits it;
    then the patch is empty. It is empty, too, if nothing is refused.
    """

    refusals: tuple[Refusal, ...]
    patch: Patch
    diff: str
    document: dict[str, Any]
    obstacle: str = ""


def smallest_change(policy: PolicyFile, boot_info: bytes, *, is_kms: bool) -> PolicyChange:
    """Find the change; raise `AuthError` if the request's body is no boot info."""
    before = policy.document
    after, refusals = copy.deepcopy(before), list[Refusal]()
    for _ in range(MOST_STEPS):
        refusal = policy.with_document(after).decide(boot_info, is_kms=is_kms).refusal
        if refusal is None:
            diff = policy_diff(policy.path, before, after)
            return PolicyChange(tuple(refusals), list(_patch(before, after, "")), diff, after)
        refusals.append(refusal)
        if obstacle := _obstacle(policy, refusal):
            return PolicyChange(tuple(refusals), [], "", before, obstacle)
        _add(policy, after, refusal, json.loads(boot_info))
    raise AssertionError(f"{policy.path} still refuses what it lists: {refusals[-1].rule}")


def _obstacle(policy: PolicyFile, refusal: Refusal) -> str:
    if not refusal.path:
        accepted = " or ".join(sorted(refusal.expected))
        return f"the contract {policy.contract} accepts the {refusal.member} {accepted} alone, whatever the file says"
    if not all(refusal.got):
        return f"the request has no {refusal.member}: an entry for the empty one would admit whoever leaves it out"
    return ""


def _add(policy: PolicyFile, document: dict[str, Any], refusal: Refusal, boot_info: dict[str, Any]) -> None:
    """Add to a policy what a refusal names."""
    *sections, last = refusal.path
    section = document
    # With the device, a new section admits no more than this boot under every contract.
    device = {"devices": [_spelt(boot_info["deviceId"], [])]}
    for name in sections:
        is_app = section is document.get("apps")
        section = section.setdefault(_key(policy, section, name) if is_app else name, dict(device))
    if last == "apps":
        apps = section.setdefault(last, {})
        app_id = _spelt(refusal.got[0], list(apps))
        apps[app_id] = {"composeHashes": [_spelt(boot_info["composeHash"], [])], **device}
        return
    listed = section.get(last)
    is_hex = refusal.member in _HEX_MEMBERS
    known = sorted(refusal.expected) if listed is None else listed
    section[last] = [*known, *(_spelt(got, known) if is_hex else got for got in refusal.got)]


def _key(policy: PolicyFile, section: dict[str, Any], name: str) -> str:
    """Return the file's spelling of an app id, which is normalized in a path; of several the first counts."""
    return next((key for key in section if policy.normalized(key) == name), name)


def _spelt(value: str, beside: Sequence[str]) -> str:
    """Write hex as its neighbours in the file are written: with 0x or without."""
    digits = value.lower().removeprefix("0x")
    is_bare = bool(beside) and not any(one.lower().startswith("0x") for one in beside)
    return digits if is_bare else f"0x{digits}"


def pointer(path: Sequence[str]) -> str:
    """Return a place as a JSON Pointer (RFC 6901)."""
    return "".join(f"/{_token(part)}" for part in path)


def _token(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


def _patch(before: Any, after: Any, place: str) -> Iterator[dict[str, Any]]:
    """Return the additions that make one document of the other."""
    if isinstance(before, list):
        yield from ({"op": "add", "path": f"{place}/-", "value": value} for value in after[len(before) :])
    elif isinstance(before, dict):
        for key, value in after.items():
            inner = f"{place}/{_token(key)}"
            if key in before:
                yield from _patch(before[key], value, inner)
            else:
                yield {"op": "add", "path": inner, "value": value}


def policy_diff(path: str, before: Any, after: Any) -> str:
    """Return a unified diff of two policies, as JSON in the usual form; empty if they are equal."""
    old, new = (json.dumps(each, indent=2, ensure_ascii=False).splitlines() for each in (before, after))
    return "\n".join(difflib.unified_diff(old, new, path, f"{path}, changed", lineterm=""))
