"""The campaign of determinism finds files that depend on their surroundings, and reports a process that fails."""

import os
import sys
from pathlib import Path

import pytest

from campaigns import determinism
from campaigns.case import Act, Outcome
from campaigns.determinism import Surroundings, differences, finished, pythons
from tests.repository import ROOT

MODULE = "tests.surroundings_of_outputs"


def tried(folder: Path, part: str, **changed: str) -> Outcome:
    """Run the module, whose parts depend on something, in plain surroundings and in those."""
    script = tuple(Act(name.replace("_", " "), {"value": value}) for name, value in changed.items())
    return Surroundings(folder, (part, "same"), MODULE).run(script)


@pytest.mark.parametrize(
    ("part", "changed"),
    [("zone", {"time_zone": "Asia/Kathmandu"}), ("mask", {"umask": "077"}), ("optimized", {"optimized": "1"})],
)
def test_file_that_depends_on_the_surroundings_is_found(tmp_path: Path, part: str, changed: dict[str, str]) -> None:
    outcome = tried(tmp_path, part, **changed)
    assert [found.rule for found in outcome.findings] == [f"other bytes: {part}"]
    assert "files compared: same" not in outcome.counts, "the following parts are left out"


def test_files_that_depend_on_nothing_are_counted(tmp_path: Path) -> None:
    outcome = tried(tmp_path, "zone", umask="077")
    assert (outcome.findings, outcome.counts) == ([], {"files compared: zone": 1, "files compared: same": 1})


def test_process_that_fails_is_reported_with_what_it_said(tmp_path: Path) -> None:
    (found,) = tried(tmp_path, "fails", umask="077").findings
    assert found.rule == "no files: fails"
    assert found.text.startswith(f"{MODULE} fails ended with 1: ")
    assert found.text.endswith("ValueError: the umask is 0o77\n")


def test_failure_in_plain_surroundings_is_reported_as_such(tmp_path: Path) -> None:
    (found,) = tried(tmp_path, "no such part").findings
    assert found.rule == "no files in plain surroundings: no such part"
    assert "KeyError: 'no such part'" in found.text


def test_process_that_does_not_end_is_ended() -> None:
    program = "import os, signal; os.fork(); print('began', flush=True); signal.pause()"
    status, _ = finished([sys.executable, "-c", program], os.environ, 0o022, ROOT, 0.3)
    assert status == "no status within 0.3 s"


def test_differences_are_files_in_one_alone_and_the_first_other_byte() -> None:
    one, other = {"a": b"same", "b": b"x" * 100 + b"1", "c": b""}, {"a": b"same", "b": b"x" * 100 + b"2", "d": b""}
    found = [(each.rule, each.text) for each in differences(one, other)]
    assert [rule for rule, _ in found] == ["other bytes: b", "file in one alone: c", "file in one alone: d"]
    assert found[0][1].startswith("at 100: ")


def test_interpreters_are_those_that_a_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTACK_EMU_PYTHONS", "/one:/two")
    assert pythons() == [sys.executable, "/one", "/two"]
    python, *_ = determinism.surroundings((Act("interpreter", {"value": "2"}),), ROOT)
    assert python == ["/two"]
