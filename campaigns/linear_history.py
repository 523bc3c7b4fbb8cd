"""The history of a case: calls with the moments between which they ran, and whether a moment explains each answer.

Changes take effect at one point each, so the moments have one order. A call is explained by moments from its beginning
to its end; what is decided later in a call, by no earlier moment. A KMS that keeps answers about itself may answer by a
moment that had not yet ended a second before the call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from campaigns.case import Finding, Outcome
from campaigns.decision_state import State
from campaigns.fail_open_judge import LATE, RELEASING, Record
from dstack_emu.auth.eth_settings import BACKEND_UNAVAILABLE
from tests.decision_model import BootInfo

MAX_AGE: Final = 1.0
"""Seconds of the stack's clock for which a KMS keeps an answer about itself."""


@dataclass(frozen=True)
class Moment:
    """A state, and the time of the stack's clock at which it began."""

    state: State
    began: float


@dataclass
class Call:
    """A call of a client: its root in the journal, and the numbers of the moments in which it began and ended."""

    service: str
    rpc: str
    invoked: int
    answered: int = -1
    root: Record | None = None


class History:
    """The moments and calls of a case."""

    def __init__(self, first: State, now: float, max_age: float) -> None:
        self.moments = [Moment(first, now)]
        self._max_age = max_age

    def change(self, state: State, now: float) -> None:
        """Add a moment."""
        self.moments.append(Moment(state, now))

    @property
    def now(self) -> int:
        """The number of the present moment."""
        return len(self.moments) - 1

    # ---- judging

    def judge(self, call: Call, outcome: Outcome) -> None:
        """Hold what a call's record says against the moments in which it ran."""
        if call.root is None:
            return
        at = call.invoked
        for record in _in_order(call.root):
            if "decision" in record:
                at = self._judge_decision(record, call, at, outcome)
            if str(record.get("service", "")).startswith("kms-") and record.get("call") in RELEASING:
                self._judge_rpc(record, call, outcome)

    def _judge_decision(self, record: Record, call: Call, at: int, outcome: Outcome) -> int:
        """Return the first moment, from `at` on, that explains what a webhook decided."""
        given = record["decision"]
        kms, asked = record["service"].removeprefix("auth-"), _boot_info(given["asked"])
        outcome.counts["decisions"] += 1
        outcome.counts[f"{given['about']} {'allowed' if given['allowed'] else 'denied'}"] += 1
        for number in range(at, call.answered + 1):
            denied = bool(self.moments[number].state.denied(kms, given["about"], asked))
            if denied != given["allowed"]:
                outcome.counts["decided by a moment after the call began"] += number > call.invoked
                return number
        if not given["allowed"] and given["reason"] == BACKEND_UNAVAILABLE:
            outcome.counts["denied as late"] += 1  # on a busy machine the chain does not answer the webhook in time
            return at
        how = "allowed" if given["allowed"] else f"denied ({given['reason']})"
        text = (
            f"{record['service']} {how} {given['about']} in {call.service} {call.rpc}, moments {at} to {call.answered}"
        )
        earlier = [
            number
            for number in range(at)
            if bool(self.moments[number].state.denied(kms, given["about"], asked)) != given["allowed"]
        ]
        text += f": as in the earlier moment {earlier[-1]}" if earlier else ": as in no earlier moment"
        outcome.findings.append(Finding("a decision that no moment explains", text))
        return at

    def _judge_rpc(self, record: Record, call: Call, outcome: Outcome) -> None:
        kms, rpc, caller = record["service"].removeprefix("kms-"), record["call"], record["caller"]
        released = "released" in record
        outcome.counts[f"{rpc} {'released' if released else 'refused'}"] += 1
        during = [self.moments[number].state for number in range(call.invoked, call.answered + 1)]
        decisions = [each["decision"] for each in record.get("inner", ()) if "decision" in each]
        own = during[0].domains[f"kms-{kms}"].mr_aggregated
        about_itself = [each for each in decisions if each["about"] == "kms" and each["asked"]["mr_aggregated"] == own]
        about_caller = [each for each in decisions if each not in about_itself]
        needs_caller = rpc != "GetTempCaCert"
        if not released:
            has_reason = (
                any(not each["allowed"] for each in decisions)
                or (needs_caller and (caller not in during[0].domains or any(s.invalid(caller) for s in during)))
                or (not about_itself and any(self._denied_itself(kms, call)))
            )
            said = record.get("error") or record["outcome"]
            if not has_reason and LATE in said:
                outcome.counts["refused as late"] += 1
            elif not has_reason:
                outcome.findings.append(Finding("a refusal that no moment explains", f"{rpc} of {kms}: {said}"))
            return
        where = f"{rpc} of {kms} to {caller}, moments {call.invoked} to {call.answered}"
        if not all(each["allowed"] for each in decisions):
            outcome.findings.append(Finding("released against a decision", where))
        if not about_itself and all(self._denied_itself(kms, call)):
            outcome.findings.append(Finding("an answer behind a change", f"{where}: the KMS itself is denied"))
        if needs_caller and not about_caller:
            outcome.findings.append(Finding("released without a decision", where))
        if needs_caller and all(state.invalid(caller) for state in during):
            outcome.findings.append(Finding("released to evidence that does not hold", where))
        for each in about_caller[:1] if needs_caller else ():
            if not any(_fits(each["asked"], state.asked(caller)) for state in during):
                text = f"{where}: {each['asked']}"
                outcome.findings.append(Finding("a webhook was asked about what was not so", text))

    def _denied_itself(self, kms: str, call: Call) -> Iterator[bool]:
        """Yield whether a KMS that asks nobody is denied, for each moment by which it may answer."""
        oldest = self.moments[call.invoked].began - self._max_age
        first = call.invoked
        # A moment may count whose end, which is when the next one began, is young enough.
        while self._max_age and first > 0 and self.moments[first].began >= oldest:
            first -= 1
        for number in range(first, call.answered + 1):
            state = self.moments[number].state
            for own in state.own[kms]:
                yield own is None or bool(state.denied(kms, "kms", own))


def judge_order(calls: list[Call], outcome: Outcome) -> None:
    """Hold the journal's order against time: a call that ended before another began has the smaller number."""
    known = [call for call in calls if call.root is not None]
    for one in known:
        for other in known:
            if one.answered < other.invoked and _number(one) > _number(other):
                text = f"{one.service} {one.rpc} ended before {other.service} {other.rpc} began"
                outcome.findings.append(Finding("the journal's order", text))
    outcome.counts["ordered pairs"] += sum(a.answered < b.invoked for a in known for b in known)


def _number(call: Call) -> int:
    assert call.root is not None
    return int(call.root["id"])


def _in_order(record: Record) -> Iterator[Record]:
    yield record
    for inner in record.get("inner", ()):
        yield from _in_order(inner)


def _boot_info(asked: dict[str, Any]) -> BootInfo:
    names = ("mr_aggregated", "os_image_hash", "app_id", "compose_hash", "instance_id", "device_id")
    return BootInfo(
        **{name: str(asked[name]) for name in names},
        tcb_statuses=(asked["tcb_status"],),
        advisory_ids=tuple(asked["advisory_ids"]),
    )


def _fits(asked: dict[str, Any], info: BootInfo) -> bool:
    names = ("os_image_hash", "app_id", "compose_hash", "instance_id", "device_id")
    same = all(asked[name] == getattr(info, name) for name in names)
    return same and asked["tcb_status"] in info.tcb_statuses and set(asked["advisory_ids"]) == set(info.advisory_ids)
