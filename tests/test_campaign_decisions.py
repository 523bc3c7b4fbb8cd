"""The campaigns about decisions find a webhook that allows by mistake, and an answer behind a change, and shrink both.

They start stacks with a chain and a gateway, which takes its time: DSTACK_EMU_CAMPAIGNS asks for them, as `.ci/run`
does.
"""

import os
from random import Random

import pytest

from campaigns.case import Act, Campaign, Script
from campaigns.fail_open import FailOpen
from campaigns.linearizability import Linearizability
from campaigns.report import Report
from campaigns.run import run

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_CAMPAIGNS" not in os.environ, reason="DSTACK_EMU_CAMPAIGNS is not set"),
]


def found(campaign: type[Campaign], script: Script, **settings: bool) -> Report:
    """Run one case, which has these acts."""

    class Fixed(campaign):  # type: ignore[misc,valid-type]  # a class that is an argument
        def draw(self, chance: Random) -> Script:
            return script

    return run(Fixed(**settings), "fixed", cases=1)


def test_webhook_that_allows_what_its_policy_denies_is_found() -> None:
    deny = Act("policy", {"kms": "src", "edit": "deny", "who": "app"})
    allows = Act("fault", {"service": "auth-src", "call": "/bootAuth/app", "kind": "decision", "allow": True})
    boot = Act("boot", {"who": "twin", "kms": "src"})
    script = (
        Act("platform", {"of": "wallet", "set": {"tcb_status": "OutOfDate"}}),
        Act("boot", {"who": "wallet", "kms": "src"}),
        deny,
        Act("fault", {"service": "gateway", "call": "*", "kind": "delay", "seconds": 0.01}),
        allows,
        Act("temporary CA", {"kms": "src"}),
        boot,
        Act("boot", {"who": "app", "kms": "dst"}),
    )
    report = found(FailOpen, script)
    by_rule = {each.finding.rule: each for each in report.found}
    assert by_rule.keys() == {"GetAppKey released", "SignCert released"}
    for each in by_rule.values():
        assert each.minimal == (deny, allows, boot)
        assert each.is_steady
        assert "app at src: app not registered" in each.finding.text


def test_refusal_that_nothing_explains_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    denies = Act("fault", {"service": "auth-src", "call": "/bootAuth/app", "kind": "decision", "allow": False})
    boot = Act("boot", {"who": "twin", "kms": "src"})
    monkeypatch.setattr("campaigns.fail_open_world.HARMLESS", ("decision",))
    report = found(FailOpen, (Act("temporary CA", {"kms": "dst"}), denies, boot))
    assert [(each.finding.rule, each.minimal) for each in report.found] == [
        ("GetAppKey refused without a reason", (denies, boot))
    ]


def test_answer_that_is_kept_beyond_a_change_is_found() -> None:
    stack = Act("stack", {"caches": True})
    ask = Act("temporary CA", {"track": 0, "steps": 0, "kms": "src"})
    deny = Act("policy", {"track": 0, "steps": 0, "kms": "src", "edit": "deny", "who": "kms-src"})
    other = Act("boot", {"track": 1, "steps": 40, "who": "twin", "kms": "dst"})
    script = (stack, other, ask, deny, ask)
    report = found(Linearizability, script, trusts_cache=False)
    (kept,) = report.found
    assert kept.finding.rule == "an answer behind a change"
    assert kept.minimal == (stack, ask, deny, ask)
    assert not found(Linearizability, script).found, "within a second of the clock it may be kept"
