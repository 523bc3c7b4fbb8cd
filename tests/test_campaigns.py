"""The frame of the campaigns: every case depends on its seed and number alone, what fails is shrunk, and reported."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from campaigns import __main__ as command
from campaigns.case import Act, Campaign, Finding, Outcome, Script, World, chance_of
from campaigns.run import run


@dataclass
class Sums:
    """A campaign against an adder that is wrong if both 7 and 11 were added; 13 makes it raise."""

    name: str = "sums"
    about: str = "random numbers are added"
    worlds: int = 0
    right: bool = False
    ran: list[Script] = field(default_factory=list)

    def draw(self, chance: Random) -> Script:
        return tuple(Act("add", {"number": chance.randrange(14)}) for _ in range(12))

    @contextmanager
    def world(self) -> Iterator[World]:
        self.worlds += 1
        yield self

    def run(self, script: Script) -> Outcome:
        self.ran.append(script)
        outcome, added = Outcome(), {act.fields["number"] for act in script}
        outcome.counts["added"] += len(script)
        if self.right:
            return outcome
        if 13 in added:
            raise ValueError("13 cannot be added")
        if {7, 11} <= added:
            outcome.findings.append(Finding("wrong sum", f"of {len(script)} numbers"))
        return outcome


def installed(monkeypatch: pytest.MonkeyPatch, campaign: Campaign) -> None:
    monkeypatch.setitem(command.CAMPAIGNS, campaign.name, "sums")
    monkeypatch.setattr(command, "campaign_of", lambda name: campaign)


def test_case_is_the_same_whenever_it_is_drawn() -> None:
    assert Sums().draw(chance_of("a", 3)) == Sums().draw(chance_of("a", 3)) != Sums().draw(chance_of("a", 4))
    campaign = Sums(right=True)
    run(campaign, "a", cases=5)
    assert campaign.ran == [campaign.draw(chance_of("a", number)) for number in range(1, 6)]


def test_findings_are_shrunk_and_counted_once() -> None:
    campaign = Sums()
    report = run(campaign, "a", cases=60)
    assert (report.cases, report.acts, report.interrupted) == (60, {"add": 720}, False)
    by_rule = {found.finding.rule: found for found in report.found}
    assert by_rule.keys() == {"wrong sum", "ValueError"}
    wrong, raised = by_rule["wrong sum"], by_rule["ValueError"]
    assert sorted(act.fields["number"] for act in wrong.minimal) == [7, 11]
    assert [str(act) for act in raised.minimal] == ["add number=13"]
    assert (wrong.finding.text, raised.finding.text) == ("of 2 numbers", "13 cannot be added")
    assert wrong.is_steady
    assert raised.is_steady
    assert wrong.times > 1
    assert campaign.worlds > 1, "the world is made anew after an exception"


def test_command_reports_and_its_status_says_whether_something_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    installed(monkeypatch, Sums())
    assert command.main(["sums", "--seed", "a", "--cases", "20", "--json", str(tmp_path / "report.json")]) == 1
    said, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert (report["campaign"], report["seed"], report["cases"]) == ("sums", "a", 20)
    for found in report["found"]:
        assert f"FOUND: {found['rule']}" in said
        assert command.main(["sums", "--replay", f"a:{found['case']}"]) == 1
        again = capsys.readouterr().out
        assert again.startswith("1. add number="), "the acts come first"
        assert f"FOUND: {found['rule']}" in again
    installed(monkeypatch, Sums(right=True))
    assert command.main(["sums", "--cases", "3", "--minutes", "1"]) == 0
    assert capsys.readouterr().out.endswith("found: nothing\n")
    assert command.main(["sums", "--minutes", "0"]) == 0


@pytest.mark.parametrize("given", [["--replay", "7"], ["--replay", "a:b"]])
def test_case_to_replay_names_seed_and_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    installed(monkeypatch, Sums())
    with pytest.raises(SystemExit):
        command.main(["sums", *given])
    assert "expected SEED:CASE, such as 1:42" in capsys.readouterr().err


def test_interrupted_run_reports_what_it_did() -> None:
    class Interrupted(Sums):
        def run(self, script: Script) -> Outcome:
            if len(self.ran) == 4:
                raise KeyboardInterrupt
            return super().run(script)

    report = run(Interrupted(right=True), "a", cases=9)
    assert (report.cases, report.interrupted) == (4, True)
    assert "interrupted" in str(report)
