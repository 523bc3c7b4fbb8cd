"""The campaign `crash` finds what is stored badly, and nothing where it is stored well."""

from pathlib import Path
from random import Random

import pytest

from campaigns import crash
from campaigns.case import Act
from campaigns.crash import Machine
from campaigns.crash_servers import Servers
from campaigns.crash_things import THINGS, Thing


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
