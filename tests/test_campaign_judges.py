"""What the campaigns about decisions hold against a stack's journal, with records that are made here."""

import json
from typing import Any

import pytest

from campaigns.case import Outcome
from campaigns.decision_state import GARBAGE, Domain, State, contracts_of, edited
from campaigns.fail_open_judge import Seen, judge
from campaigns.linear_history import Call, History, judge_order
from tests.decision_model import BootInfo, Platform

HASH = "11" * 32
POLICY: dict[str, Any] = {
    "osImages": [f"0x{HASH}"],
    "kms": {"mrAggregated": [f"0x{HASH}"], "devices": [], "allowAnyDevice": True},
    "apps": {f"0x{'22' * 20}": {"composeHashes": [f"0x{HASH}"], "devices": [], "allowAnyDevice": True}},
}


def state_of() -> State:
    """A KMS `src` that allows itself and the app `app`, and `dst`, whose contracts allow the same."""
    names = ("app", "kms-src", "kms-dst")
    domains = {name: Domain(name, "22" * 20, HASH, "", HASH, HASH, platform="host") for name in names}
    state = State(
        domains, {"src": json.dumps(POLICY)}, [contracts_of(POLICY, {bytes(32)})], "0.6", {"host": Platform("00" * 32)}
    )
    state.own = {kms: frozenset({state.asked(f"kms-{kms}")}) for kms in ("src", "dst")}
    return state


def rpc(call: str = "GetAppKey", *, released: bool = True, **fields: Any) -> dict[str, Any]:
    record = {"id": "1", "service": "kms-src", "call": call, "caller": "app", "outcome": "ok", **fields}
    return record | ({"released": {"fields": ["k256_key"], "to": None}} if released else {})


def decision(about: str, *, allowed: bool) -> dict[str, Any]:
    info: BootInfo = state_of().asked("app")
    asked = {name: getattr(info, name) for name in ("mr_aggregated", "os_image_hash", "app_id", "compose_hash")}
    asked |= {"instance_id": "", "device_id": info.device_id, "tcb_status": "UpToDate", "advisory_ids": []}
    if about == "app":
        asked["mr_aggregated"] = "33" * 32
    return {"service": "auth-src", "decision": {"about": about, "allowed": allowed, "asked": asked}}


def rules(outcome: Outcome) -> list[str]:
    return [finding.rule for finding in outcome.findings]


@pytest.mark.parametrize("edit", ["deny", "other-compose", "other-device", "no-image", "empty", "garbage"])
def test_key_that_the_policy_denies_is_found(edit: str) -> None:
    before, after, outcome = state_of(), state_of(), Outcome()
    after.edit("src", edit, "app")
    judge(Seen([after], [before], [rpc()], ("kms-src", "GetAppKey")), outcome)
    assert "GetAppKey released" in rules(outcome)
    outcome = Outcome()
    judge(Seen([before, after], [], [rpc()], ("kms-src", "GetAppKey")), outcome)
    assert rules(outcome) == [], "it was allowed during the call"


@pytest.mark.parametrize(
    "platform",
    [{"certificate_revoked": True}, {"other_root": True}, {"tcb_status": "Revoked"}, {"tcb_status": "OutOfDate"}],
)
def test_key_for_a_platform_that_is_not_trusted_is_found(platform: dict[str, Any]) -> None:
    state, outcome = state_of(), Outcome()
    state.platforms = {"host": Platform("00" * 32, **platform)}
    judge(Seen([state], [], [rpc()], ("kms-src", "GetAppKey")), outcome)
    assert set(rules(outcome)) == {"GetAppKey released"}


def test_refusal_needs_a_reason_or_a_fault() -> None:
    state, outcome = state_of(), Outcome()
    seen = Seen([state], [], [rpc(released=False, outcome="refused")], ("kms-src", "GetAppKey"))
    judge(seen, outcome)
    assert rules(outcome) == ["GetAppKey refused without a reason"]
    outcome = Outcome()
    seen.faults["pccs reset"] += 1
    judge(seen, outcome)
    assert rules(outcome) == []


def test_contract_decides_by_the_block_that_counts() -> None:
    state = state_of()
    asked = state.asked("app")
    state.transact("compose-hash", HASH, allowed=False, app_id="22" * 20)
    assert state.denied("dst", "app", asked) == ["app at dst: Compose hash not allowed"]
    assert state.denied("dst", "app", asked, behind=1) == []
    state.reorganize(1)
    assert state.denied("dst", "app", asked) == []


def test_edit_of_an_unreadable_policy_begins_with_an_empty_one() -> None:
    domain = state_of().domains["kms-src"]
    assert edited(GARBAGE, "allow", domain)["kms"]["mrAggregated"] == [f"0x{HASH}"]


def test_decision_fits_a_moment_of_its_call_and_none_before() -> None:
    first, denied = state_of(), state_of()
    denied.edit("src", "deny", "app")
    history = History(first, 0.0, 0.0)
    history.change(denied, 0.0)
    root = rpc(inner=[decision("kms", allowed=True), decision("app", allowed=True)])
    for invoked, expected in ((0, []), (1, ["a decision that no moment explains"])):
        outcome = Outcome()
        history.judge(Call("kms-src", "GetAppKey", invoked, 1, root), outcome)
        assert rules(outcome) == expected
    outcome = Outcome()
    back = rpc(inner=[decision("app", allowed=False), decision("app", allowed=True)])
    history.judge(Call("kms-src", "GetAppKey", 0, 1, back), outcome)
    assert "a decision that no moment explains" in rules(outcome), "a call does not go back either"


@pytest.mark.parametrize(("passed", "expected"), [(0.5, []), (1.5, ["an answer behind a change"])])
def test_kept_answer_may_be_a_second_old(passed: float, expected: list[str]) -> None:
    first, denied = state_of(), state_of()
    denied.edit("src", "deny", "kms-src")
    history = History(first, 0.0, 1.0)
    history.change(denied, 0.0)
    history.change(denied, passed)
    outcome = Outcome()
    history.judge(Call("kms-src", "GetTempCaCert", 2, 2, rpc("GetTempCaCert", inner=[])), outcome)
    assert rules(outcome) == expected


def test_journal_has_calls_in_their_order() -> None:
    calls = [Call("app", "Boot", 0, 0, {"id": "7"}), Call("twin", "Boot", 1, 1, {"id": "6"})]
    outcome = Outcome()
    judge_order(calls, outcome)
    assert rules(outcome) == ["the journal's order"]
