"""Runs cases on a KMS, with as few starts of it as possible: one that is bootstrapped, and one that receives keys."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.release import Release
from dstack_emu.deployment.authorization import Progress
from dstack_emu.kms_check.calls import Answer
from dstack_emu.kms_check.case import Case, Stage
from dstack_emu.kms_check.cases import bootstrap, onboarding
from dstack_emu.kms_check.checked import CheckedKms, authority_in
from dstack_emu.kms_check.errors import UnusableError
from dstack_emu.kms_check.trial import DepartureError, Step, Trial
from dstack_emu.kms_check.world import World, surroundings

Outcome = Literal["pass", "warning", "FAIL", "allowed", "skipped"]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one case; `said` is the reason if it did not pass."""

    case: Case
    outcome: Outcome
    said: str = ""
    seconds: float = 0.0
    steps: tuple[Step, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "name": self.case.name,
            "group": self.case.group,
            "about": self.case.about,
            "outcome": self.outcome,
            "said": self.said,
            "seconds": round(self.seconds, 3),
            "steps": [step.to_json() for step in self.steps],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a KMS is checked.

    `command` starts it, with the path of its kms.toml in the place of `{config}`; with None somebody else starts it,
    once. `wait` is how many seconds it has to start, `patience` how many a call may take. `self_check_cache` is for how
    many seconds it uses an answer of its webhook about itself.
    """

    command: str | None
    release: Release
    folder: Path
    wait: float = 60.0
    patience: float = 5.0
    self_check_cache: float = 0.0


Observer = Callable[[Result, int, int], None]
"""Called after each case with its result, its number, and the number of all."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the KMS: the stages of its cases, and how it gets its keys."""

    fresh: Stage
    runtime: Stage
    give_keys: str
    """The case that gives it keys."""
    request_keys: Callable[[Trial], Awaitable[Answer]]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All its stages."""
        return self.fresh, "keyed", self.runtime


BOOTSTRAPPED: Final = Start("bootstrap", "runtime", "bootstrap/allowed", bootstrap.bootstrap)
RECEIVER: Final = Start("onboard", "onboarded", "onboard/allowed", onboarding.onboard)


async def check_kms(settings: Settings, cases: Sequence[Case], observe: Observer, progress: Progress) -> list[Result]:
    """Run cases on a KMS; raise `UnusableError` if it does not start, or `StackError` if its surroundings do not."""
    patience, cache = settings.patience, settings.self_check_cache
    async with surroundings(settings.release, progress, patience=patience, self_check_cache=cache) as world:
        return await run_cases(world, settings, cases, observe, progress)


async def run_cases(
    world: World, settings: Settings, cases: Sequence[Case], observe: Observer, progress: Progress
) -> list[Result]:
    """Run cases on a KMS in surroundings that run; raise `UnusableError` if it does not start."""
    run, left = _Run(settings, len(cases), observe, progress), list(cases)
    for number, start in enumerate((BOOTSTRAPPED, RECEIVER), 1):
        of_start = [case for case in left if case.stage in start.stages]
        left = [case for case in left if case not in of_start]
        if not of_start:
            continue
        if settings.command is None and run.results:
            run.skip(of_start, "needs a second fresh KMS: run it again with --only of these cases")
            continue
        async with run.started(world, settings.folder / f"kms-{number}") as kms:
            await run.perform(world, kms, of_start, start)
    return run.results


class _NoFurtherError(Exception):
    """No further case of this start can be run; the text says why."""


class _Run:
    def __init__(self, settings: Settings, total: int, observe: Observer, progress: Progress) -> None:
        self._settings, self._total, self._observe, self._progress = settings, total, observe, progress
        self.results: list[Result] = []

    @asynccontextmanager
    async def started(self, world: World, folder: Path) -> AsyncIterator[CheckedKms]:
        """Start the KMS until the block ends."""
        settings = self._settings
        kms = CheckedKms(world, folder, settings.command, wait=settings.wait, progress=self._progress)
        self._progress("starting the KMS")
        try:
            await kms.start()
            world.kms = kms
            yield kms
        finally:
            await kms.stop()

    async def perform(self, world: World, kms: CheckedKms, cases: Sequence[Case], start: Start) -> None:
        """Run the cases of one start: before it has keys, before its first call, and after that."""
        by_stage = {stage: [case for case in cases if case.stage == stage] for stage in start.stages}
        try:
            await self._run_fresh(world, kms, by_stage[start.fresh])
            if not by_stage["keyed"] and not by_stage[start.runtime]:
                return
            await self._reach_runtime(world, kms, start)
            await self._run_all(world, kms, by_stage["keyed"], _authority)
            world.enter_runtime(await _authority(Trial(world)))
            await self._run_all(world, kms, by_stage[start.runtime], _releases)
        except _NoFurtherError as error:
            done = {result.case.name for result in self.results}
            self.skip([case for case in cases if case.name not in done], str(error))

    async def _reach_runtime(self, world: World, kms: CheckedKms, start: Start) -> None:
        """Give the KMS its keys, unless a case has, and end its onboard phase."""
        result = next((result for result in self.results if result.case.name == start.give_keys), None)
        if result is None and not kms.stored_keys():
            trial = Trial(world)
            try:
                trial.released("the request for keys", await start.request_keys(trial))
            except DepartureError as error:
                text = f"the KMS gets no keys, which the cases need: {error}"
                raise UnusableError(f"{text}; `--only {start.give_keys}` shows more") from error
        elif result is not None and result.outcome == "FAIL" and not kms.stored_keys():
            raise _NoFurtherError("the KMS has no keys")
        await kms.finish()

    async def _run_fresh(self, world: World, kms: CheckedKms, cases: Sequence[Case]) -> None:
        """Run the cases of a fresh KMS, until it has keys: at the end, or where it should not have got any."""
        for number, case in enumerate(cases):
            if kms.stored_keys():
                self.skip(cases[number:], f"the KMS has keys since {cases[number - 1].name}, and none were expected")
                return
            await self._run_all(world, kms, [case], _is_fresh)

    async def _run_all(
        self, world: World, kms: CheckedKms, cases: Sequence[Case], works: Callable[[Trial], Awaitable[object]]
    ) -> None:
        for case in cases:
            try:
                kms.require_running()
            except UnusableError as error:
                raise _NoFurtherError(str(error)) from error
            await self._run(world, case, works)

    async def _run(self, world: World, case: Case, works: Callable[[Trial], Awaitable[object]]) -> None:
        world.reset()
        trial, began = Trial(world), time.monotonic()
        outcome: Outcome = "pass"
        said = ""
        try:
            try:
                await case.act(trial)
            finally:
                world.reset()
            if case.is_followed:
                await works(trial)
        except DepartureError as error:
            outcome, said = "FAIL", str(error)
        noted = [step for step in trial.steps if step.level == "warning"]
        if outcome == "pass" and noted:
            outcome, said = "warning", f"{noted[0].what}: {noted[0].expected} expected, got {noted[0].got}"
        self._add(Result(case, outcome, said, time.monotonic() - began, tuple(trial.steps)))

    def skip(self, cases: Iterable[Case], why: str) -> None:
        """Record cases that cannot be run."""
        for case in cases:
            self._add(Result(case, "skipped", why))

    def _add(self, result: Result) -> None:
        self.results.append(result)
        self._observe(result, len(self.results), self._total)


async def _authority(trial: Trial) -> Any:
    body = trial.released("GetTempCaCert", await trial.temp_ca())
    try:
        return authority_in(body)
    except AttestError as error:
        raise DepartureError("GetTempCaCert", f"what cannot be read: {error}", "a CA and its key") from error


async def _is_fresh(trial: Trial) -> None:
    """Require a KMS without keys to answer."""
    trial.released("GetAttestationInfo, after it", await trial.onboard("GetAttestationInfo"))


async def _releases(trial: Trial) -> None:
    """Require a KMS with keys to release them to an honest caller."""
    trial.released("GetAppKey of an honest app, after it", await trial.app_key())
