"""The campaign `crash` finds what is stored badly, and nothing where it is stored well."""

import re
from pathlib import Path
from random import Random

import pytest

from campaigns import crash
from campaigns.case import Act, Outcome
from campaigns.crash import Machine
from campaigns.crash_process import Process
from campaigns.crash_servers import Servers
from campaigns.crash_things import THINGS, Thing
from campaigns.determinism import faketime


def in_place(folder: Path) -> None:
    """Write a file as nobody should."""
    with (folder / "file").open("w", buffering=1) as file:
        file.write("one\n")
        file.write("two\n")


def text_of(folder: Path) -> str | None:
    path = folder / "file"
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ({"fault": "kill", "moment": 0.6}, "something between"),
        ({"fault": "full", "bytes": 5}, "something between"),
        ({"fault": "error", "call": 0, "calls": 1, "errno": "EACCES"}, None),
    ],
)
def test_file_that_is_written_in_place_is_found(
    fault: dict[str, object], found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(THINGS, "bad", Thing(in_place, text_of, is_named=False))
    monkeypatch.setattr(crash, "TRACED", frozenset({__file__}))
    with Servers() as servers:
        outcome = Machine(tmp_path, servers).run((Act("store", {"thing": "bad", **fault}),))
    assert [finding.text.partition(",")[0] for finding in outcome.findings] == ([found] if found else [])


def test_things_are_stored_well(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    chance = Random("suite")
    acts = [act for _ in range(3) for act in crash.CAMPAIGN.draw(chance) if act.name == "store"]
    with Servers() as servers:
        outcome = Machine(tmp_path, servers).run(tuple(acts))
    assert outcome.findings == []
    assert outcome.counts["kill: killed"] > 10


def served(folder: Path, defect: str, act: Act, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Do an act with a server that has a defect of `tests.broken_gateway`."""
    monkeypatch.setattr(Process, "module", "tests.broken_gateway")
    monkeypatch.setenv("DEFECT", defect)
    with Servers() as servers:
        return Machine(folder, servers).run((act,))


@pytest.mark.parametrize(
    ("defect", "found"),
    [
        ("none", None),
        ("leaves_a_part_in_its_buffer", r"gateway: the state cannot be read"),
        ("stores_two_calls_later", r"gateway: (\d+) stored after (?!\1 )\d+ answers"),
    ],
)
def test_gateway_that_loses_what_it_answered_is_found(
    defect: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = Act("kill a server", {"server": "gateway", "call": "RegisterCvm", "moment": 0.15})
    outcome = served(tmp_path, defect, act, monkeypatch)
    assert [bool(re.fullmatch(found or "", finding.rule)) for finding in outcome.findings] == ([True] if found else [])
    assert outcome.counts == ({} if found else {"gateway: RegisterCvm: some answered": 1})


@pytest.mark.skipif(faketime() is None, reason="libfaketime is not installed (Debian: faketime)")
def test_gateway_that_forgets_when_its_clock_is_set_back_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = Act("set the clock back", {"server": "gateway", "back": "1h"})
    outcome = served(tmp_path, "forgets_what_is_later_than_its_clock", act, monkeypatch)
    assert [finding.rule for finding in outcome.findings] == ["gateway: other instances than before"]
