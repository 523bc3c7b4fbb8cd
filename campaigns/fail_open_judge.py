"""Judges what a stack did in one act: each RPC of a KMS by the model, and what was left behind."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from campaigns.case import Finding, Outcome
from campaigns.decision_state import State

RELEASING: Final = ("GetTempCaCert", "GetAppKey", "SignCert", "GetKmsKey")
"""The RPCs of a KMS that answer with a key or a certificate."""
LATE: Final = "no answer within"
"""Words of a refusal because a part was late, which a busy machine may be; the report counts them."""
Record = dict[str, Any]


@dataclass
class Seen:
    """What was seen in one act.

    `moments` are the states in which it may have been decided; `behind` says how many blocks behind a faulty chain may
    have answered; `faults` are those that hit a call. Calls that the act did not cause go by the case's `earlier` too.
    """

    moments: list[State]
    earlier: list[State]
    records: list[Record]
    root: tuple[str, str]
    faults: Counter[str] = field(default_factory=Counter)
    behind: tuple[int, ...] = (0,)


Reasons = list[list[str]]
"""Why a part of a decision is a denial, for each state in which it may have been made; an empty list allows."""


def calls(records: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """Yield each call in journal records, with the record that it is in."""
    for root in records:
        pending = [root]
        while pending:
            record = pending.pop()
            if "call" in record:
                yield record, root
            pending.extend(record.get("inner", ()))


def judge(seen: Seen, outcome: Outcome) -> None:
    """Hold each RPC of a KMS against the model."""
    for record, root in calls(seen.records):
        if record["service"].startswith("kms-") and record["call"] in RELEASING:
            is_own = (root["service"], root["call"]) == seen.root
            _judge_rpc(record, seen, is_own, outcome)


def _judge_rpc(record: Record, seen: Seen, is_own: bool, outcome: Outcome) -> None:
    moments = seen.moments if is_own else [*seen.earlier, *seen.moments]
    kms, rpc, caller = record["service"].removeprefix("kms-"), record["call"], record["caller"]
    released = "released" in record
    outcome.counts["decisions"] += 1
    outcome.counts[f"{rpc} {'released' if released else 'refused'}"] += 1
    parts = parts_of(kms, rpc, caller, moments, seen.behind)
    if released:
        for part in parts:
            if all(part):
                why = "; ".join(sorted({line for reasons in part for line in reasons}))
                outcome.findings.append(Finding(f"{rpc} released", f"to {caller} by {kms}, although: {why}"))
    elif is_own and not seen.faults and caller != "outside" and not any(reasons for part in parts for reasons in part):
        said = record.get("error") or record["outcome"]
        if LATE in said:
            outcome.counts["refused as late"] += 1
            return
        outcome.findings.append(Finding(f"{rpc} refused without a reason", f"to {caller} by {kms}: {said}"))


def parts_of(kms: str, rpc: str, caller: str, moments: list[State], behind: Sequence[int] = (0,)) -> list[Reasons]:
    """Return the parts of a decision: each has to allow in one of the moments."""
    parts = [
        [
            state.denied(kms, "kms", own, late) if own else [f"kms-{kms} cannot attest itself"]
            for state in moments
            for own in state.itself(kms)
            for late in _late(state, kms, behind)
        ]
    ]
    if rpc == "GetTempCaCert":
        return parts
    if caller not in moments[0].domains:
        return [*parts, [[f"{caller} has no evidence"]]]
    kind = "kms" if rpc == "GetKmsKey" else "app"
    parts.append([state.invalid(caller) for state in moments])
    parts.append(
        [state.denied(kms, kind, state.asked(caller), late) for state in moments for late in _late(state, kms, behind)]
    )
    return parts


def _late(state: State, kms: str, behind: Sequence[int]) -> Sequence[int]:
    return (0,) if kms in state.policies else behind
