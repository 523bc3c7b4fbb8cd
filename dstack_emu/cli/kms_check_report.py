"""The report of `dstack-emu check-kms`: a table by group, the failures, and how to run each of them again."""

import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, get_args

from dstack_emu.cli.junit import JunitCase
from dstack_emu.cli.terminal import BOLD, GREEN, RED, YELLOW, paint, printable
from dstack_emu.kms_check.runner import Outcome, Result

OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
WIDTH: Final = 110
_TONES: Final = {"pass": GREEN, "FAIL": RED}
_MARGIN: Final = " " * 9


def tone(outcome: str) -> str:
    """Return the colour of an outcome."""
    return _TONES.get(outcome, YELLOW)


def is_ok(results: Iterable[Result]) -> bool:
    """Return whether nothing failed, and something was checked."""
    outcomes = Counter(each.outcome for each in results)
    return not outcomes["FAIL"] and outcomes.total() > outcomes["skipped"]


def to_json(results: Sequence[Result], release: str, command: str | None, needless: Sequence[str]) -> dict[str, Any]:
    """Return the report as JSON."""
    outcomes = Counter(each.outcome for each in results)
    return {
        "kms": command,
        "release": release,
        "ok": is_ok(results),
        "counts": {outcome: outcomes[outcome] for outcome in OUTCOMES},
        "allowed_but_passing": list(needless),
        "cases": [each.to_json() for each in results],
    }


def to_junit_cases(results: Iterable[Result]) -> Iterator[JunitCase]:
    """Return the cases for JUnit XML; one that is allowed to fail is skipped."""
    for each in results:
        level = "skipped" if each.outcome in ("allowed", "skipped") else each.outcome
        name = each.case.name.partition("/")[2]
        suite = f"check-kms.{each.case.group}"
        yield JunitCase(suite, name, each.seconds, level, each.said, each.outcome == "FAIL")


def render(results: Sequence[Result], again: Sequence[str], needless: Sequence[str], *, colour: bool) -> Iterator[str]:
    """Return the lines of the report; `again` are the words of a command to which `--only NAME` is added."""
    yield from _details(results, again, colour)
    yield from _table(results, colour)
    yield ""
    for name in needless:
        yield paint(f"{name} is on the allow list, and passes: remove it there.", YELLOW, colour)
    yield _verdict(results, colour)


def _details(results: Sequence[Result], again: Sequence[str], colour: bool) -> Iterator[str]:
    shown = [each for each in results if each.outcome not in ("pass", "skipped")]
    for each in shown:
        yield (paint(f"{each.outcome:<8}", tone(each.outcome), colour) + f" {each.case.name}: {each.case.about}")
        yield from _wrapped("", each.said if each.outcome == "allowed" else "")
        wanted = "failed" if each.outcome in ("FAIL", "allowed") else "warning"
        for step in (step for step in each.steps if step.level == wanted):
            yield from _wrapped("call:     ", step.what)
            yield from _wrapped("got:      ", step.got)
            yield from _wrapped("expected: ", step.expected)
        if each.outcome == "FAIL":
            yield f"{_MARGIN}again:    {shlex.join([*again, '--only', each.case.name])}"
    reasons = Counter(each.said for each in results if each.outcome == "skipped")
    for reason, number in reasons.items():
        yield from _wrapped(f"{number} skipped: ", reason)
    if shown or reasons:
        yield ""


def _wrapped(label: str, text: str) -> Iterator[str]:
    indent = _MARGIN + " " * len(label)
    for number, line in enumerate(text.splitlines()):
        first = indent if number else _MARGIN + label
        yield from textwrap.wrap(printable(line), WIDTH, initial_indent=first, subsequent_indent=indent)


def _table(results: Sequence[Result], colour: bool) -> Iterator[str]:
    groups = list(dict.fromkeys(each.case.group for each in results))
    width = max([len(group) for group in groups] + [5])
    yield paint(f"{'group':<{width}}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES), BOLD, colour)
    for group in groups:
        counts = Counter(each.outcome for each in results if each.case.group == group)
        yield f"{group:<{width}}" + "".join(_cell(counts[outcome], outcome, colour) for outcome in OUTCOMES)


def _cell(number: int, outcome: Outcome, colour: bool) -> str:
    text = f"{number or '-':>9}"
    return paint(text, tone(outcome), colour) if number else text


def _verdict(results: Sequence[Result], colour: bool) -> str:
    outcomes, seconds = Counter(each.outcome for each in results), sum(each.seconds for each in results)
    run = f"{len(results) - outcomes['skipped']} of {len(results)} cases in {seconds:.0f} s"
    if not is_ok(results):
        failed = "Nothing was checked" if not outcomes["FAIL"] else f"{outcomes['FAIL']} failed"
        return paint(f"{failed}, of {run}.", RED, colour)
    text = f"The KMS does what it must, in {run}"
    warnings = f"; {outcomes['warning']} with a warning" if outcomes["warning"] else ""
    return paint(f"{text}{warnings}.", GREEN, colour)
