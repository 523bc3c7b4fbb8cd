"""`python -m campaigns NAME`: run a campaign, and print its report. The status is 1 if something was found."""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from campaigns.case import Campaign, Script
from campaigns.report import Report
from campaigns.run import replay, run

CAMPAIGNS: Final[dict[str, str]] = {
    "crash": "crash",
    "determinism": "determinism",
    "fail-open": "fail_open",
    "linearizability": "linearizability",
    "listeners": "listeners",
    "soak": "soak",
}
"""Each campaign's module, which has its `CAMPAIGN`."""
EVERY: Final = 10.0
"""Seconds between two lines of progress."""


def campaign_of(name: str) -> Campaign:
    """Return a campaign by its name."""
    campaign: Campaign = importlib.import_module(f"campaigns.{CAMPAIGNS[name]}").CAMPAIGN
    return campaign


class Progress:
    """Prints how far a run is, on stderr, and what it finds at once."""

    def __init__(self) -> None:
        self._next, self._shown = time.monotonic() + EVERY, 0

    def __call__(self, report: Report) -> None:
        for found in report.found[self._shown :]:
            text = f"found in case {found.case}: {found.finding.rule}: {found.finding.text}"
            print(text, file=sys.stderr, flush=True)
        self._shown = len(report.found)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            said = f"{report.cases} cases in {report.elapsed():.0f} s, found: {len(report.found) or 'nothing'}"
            print(said, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(prog="python -m campaigns", description=__doc__)
    parser.add_argument("name", choices=sorted(CAMPAIGNS), metavar="NAME", help=", ".join(sorted(CAMPAIGNS)))
    parser.add_argument("--seed", default="1", help="a text, from which all cases are drawn (%(default)s)")
    parser.add_argument("--cases", type=int, metavar="N", help="as many cases (100, unless --minutes is given)")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no case after so many minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file, as JSON")
    parser.add_argument("--replay", metavar="SEED:CASE", help="run one case alone, and print its acts first")
    given = parser.parse_args(arguments)
    campaign = campaign_of(given.name)
    if given.replay is None:
        seconds = None if given.minutes is None else given.minutes * 60
        report = run(campaign, given.seed, cases=given.cases, seconds=seconds, progress=Progress())
    else:
        seed, _, number = given.replay.rpartition(":")
        if not (seed and number.isdecimal()):
            parser.error(f"--replay: got {given.replay!r}, expected SEED:CASE, such as 1:42")
        report = replay(campaign, seed, int(number), show)
    print(report)
    if given.json is not None:
        given.json.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    return 1 if report.found else 0


def show(script: Script) -> None:
    """Print the acts of a case."""
    for number, act in enumerate(script, 1):
        print(f"{number}. {act}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
