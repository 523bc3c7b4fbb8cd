"""The report of a campaign, as text and as JSON."""

import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from campaigns.case import Campaign, Finding, Outcome, Script


@dataclass
class Found:
    """A broken rule: the case that broke it first, the shortest script that does, and how many cases did."""

    finding: Finding
    case: int
    script: Script
    minimal: Script
    is_steady: bool
    """Whether the shortest script broke the rule when it was run once more."""
    times: int = 1


@dataclass
class Report:
    """What was tried, and what was found."""

    campaign: str
    about: str
    seed: str
    date: str
    versions: dict[str, str]
    cases: int = 0
    acts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)
    """What each case measured."""
    slowest: tuple[float, int] = (0.0, 0)
    """Seconds, and the number of the case."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """CPU time of this process."""
    interrupted: bool = False
    began: float = field(default_factory=time.monotonic)
    cpu_before: float = field(default_factory=time.process_time)

    @classmethod
    def begin(cls, campaign: Campaign, seed: str) -> "Report":
        """Begin a report."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(campaign.name, campaign.about, seed, date, versions())

    def elapsed(self) -> float:
        """Return the seconds since the report was begun."""
        return time.monotonic() - self.began

    def end(self) -> None:
        """End it."""
        self.seconds = self.elapsed()
        self.cpu_seconds = time.process_time() - self.cpu_before

    def add(self, script: Script, outcome: Outcome, number: int, seconds: float) -> None:
        """Count a case."""
        self.cases += 1
        self.acts.update(act.counted for act in script)
        self.outcomes.update(outcome.counts)
        if outcome.measured:
            self.measured.append(outcome.measured)
        self.slowest = max(self.slowest, (seconds, number))

    def levels(self) -> dict[str, dict[str, float]]:
        """Return what was measured first, in the middle and last."""
        found = self.measured
        return {"first": found[0], "middle": found[len(found) // 2], "last": found[-1]} if found else {}

    def known(self, finding: Finding) -> Found | None:
        """Return what was found before of the same rule."""
        return next((found for found in self.found if found.finding.rule == finding.rule), None)

    def replay_of(self, found: Found) -> str:
        """Return the command that runs a case alone."""
        return f"python -m campaigns {self.campaign} --replay {self.seed}:{found.case}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "campaign": self.campaign,
            "about": self.about,
            "seed": self.seed,
            "date": self.date,
            "versions": self.versions,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "interrupted": self.interrupted,
            "acts": dict(sorted(self.acts.items())),
            "outcomes": dict(sorted(self.outcomes.items())),
            "measured": self.levels(),
            "slowest_case": {"case": self.slowest[1], "seconds": round(self.slowest[0], 2)},
            "found": [
                {
                    "rule": found.finding.rule,
                    "text": found.finding.text,
                    "case": found.case,
                    "times": found.times,
                    "steady": found.is_steady,
                    "replay": self.replay_of(found),
                    "minimal": [act.to_json() for act in found.minimal],
                    "script": [act.to_json() for act in found.script],
                }
                for found in self.found
            ],
        }

    def __str__(self) -> str:
        said = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines = [
            f"{self.campaign}: {self.about}",
            f"seed {self.seed}, {self.date}; {said}",
            f"{self.cases} cases in {self.seconds:.1f} s, {self.cpu_seconds:.1f} s of CPU time; "
            f"the slowest was case {self.slowest[1]}, {self.slowest[0]:.2f} s",
            *(["interrupted"] if self.interrupted else []),
            "acts:",
            *_table(self.acts),
            "outcomes:",
            *_table(self.outcomes),
            *(
                f"{when}: {', '.join(f'{name} {value:.0f}' for name, value in levels.items())}"
                for when, levels in self.levels().items()
            ),
        ]
        for found in self.found:
            steady = "" if found.is_steady else " (not again, when it was run once more)"
            lines += [
                f"FOUND: {found.finding.rule}, in {found.times} of {self.cases} cases{steady}",
                f"  {found.finding.text}",
                f"  first in case {found.case}: {self.replay_of(found)}",
                f"  the shortest script of it, {len(found.minimal)} of {len(found.script)} acts:",
                *(f"    {number}. {act}" for number, act in enumerate(found.minimal, 1)),
            ]
        return "\n".join([*lines, f"found: {len(self.found) or 'nothing'}"])


def _table(counts: Counter[str]) -> list[str]:
    return [f"  {count:>8}  {name}" for name, count in sorted(counts.items())]


def versions() -> dict[str, str]:
    """Return what the result depends on: the versions of the emulator, its verifier, Python and the system."""
    found = {name: version(name) for name in ("dstack-emu", "dcap-qvl")}
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        pass
    else:
        if commit.returncode == 0:
            found["commit"] = commit.stdout.strip()
    return {**found, "Python": sys.version.split()[0], platform.system(): platform.machine()}
