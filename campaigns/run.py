"""Run a campaign: draw its cases, run each, shrink what fails, and report."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from campaigns.case import Campaign, Finding, Outcome, Script, World, chance_of, numbers
from campaigns.report import Found, Report
from campaigns.shrink import shrunk

MAX_FINDINGS = 10
"""A run ends after so many different findings."""

Progress = Callable[[Report], None]


class Worlds:
    """The world of a campaign, which is made anew after an exception."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign = campaign
        self._manager: AbstractContextManager[World] | None = None
        self._world: World | None = None

    def run(self, script: Script) -> Outcome:
        """Run a script; an exception of the campaign is a finding."""
        if self._world is None:
            self._manager = self._campaign.world()
            self._world = self._manager.__enter__()
        try:
            return self._world.run(script)
        except Exception as error:  # whatever it is, the report has to say so, and the other cases have to be run
            self.close()
            return Outcome(Counter({"exception": 1}), [Finding(type(error).__name__, str(error) or repr(error))])

    def close(self) -> None:
        """End the world, if there is one."""
        manager, self._manager, self._world = self._manager, None, None
        if manager is not None:
            manager.__exit__(None, None, None)

    def __enter__(self) -> "Worlds":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(
    campaign: Campaign,
    seed: str,
    *,
    cases: int | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run cases 1, 2, … until there were so many, or until so many seconds have passed; without both, 100 cases."""
    if cases is None and seconds is None:
        cases = 100
    report = Report.begin(campaign, seed)
    with Worlds(campaign) as worlds, interruptible(report):
        for number in numbers():
            if number - 1 == cases or (seconds is not None and report.elapsed() >= seconds):
                break
            one(campaign, worlds, report, number)
            if progress is not None:
                progress(report)
            if len(report.found) >= MAX_FINDINGS:
                break
    report.end()
    return report


def replay(campaign: Campaign, seed: str, number: int, progress: Callable[[Script], None]) -> Report:
    """Run one case alone."""
    report = Report.begin(campaign, seed)
    progress(campaign.draw(chance_of(seed, number)))
    with Worlds(campaign) as worlds, interruptible(report):
        one(campaign, worlds, report, number)
    report.end()
    return report


def one(campaign: Campaign, worlds: Worlds, report: Report, number: int) -> None:
    """Run one case, and add it to the report; what it finds first of its rule is shrunk."""
    script = campaign.draw(chance_of(report.seed, number))
    began = time.monotonic()
    outcome = worlds.run(script)
    report.add(script, outcome, number, time.monotonic() - began)
    for finding in outcome.findings:
        if (known := report.known(finding)) is not None:
            known.times += 1
            continue

        def fails(shorter: Script, rule: str = finding.rule) -> bool:
            return any(found.rule == rule for found in worlds.run(shorter).findings)

        minimal = shrunk(script, fails)
        again = [found for found in worlds.run(minimal).findings if found.rule == finding.rule]
        report.found.append(Found(again[0] if again else finding, number, script, minimal, is_steady=bool(again)))


@contextmanager
def interruptible(report: Report) -> Iterator[None]:
    """End a run at Ctrl-C, so that what was done until then is reported."""
    try:
        yield
    except KeyboardInterrupt:
        report.interrupted = True
