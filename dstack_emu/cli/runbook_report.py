"""The report of a runbook's run: a line for each step when it is recorded, and a table at the end."""

import sys
from typing import Final, TextIO

from dstack_emu.cli.terminal import BOLD, GREEN, RED, YELLOW, paint, printable, wants_colour
from dstack_emu.runbook.transcript import Case, Step, Transcript

_STATES: Final = {True: ("ok", GREEN), False: ("FAILED", RED), None: ("skipped", YELLOW)}
_RESULTS: Final = {True: ("passed", GREEN), False: ("FAILED", RED), None: ("not checked", YELLOW)}


class RunbookReport:
    """Prints the report to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._colour = stream, wants_colour(stream)

    def case(self, case: Case) -> None:
        """Print the heading of a case."""
        title = f"Case {case.number}: {case.title}" if case.number else case.title.capitalize()
        self._line(f"\n{paint(title, BOLD, self._colour)}")

    def step(self, step: Step) -> None:
        """Print a step: the call, its answer, and what was expected."""
        state, tone = _STATES[step.ok]
        text = f"{step.name:<5} {step.asked} → {step.got}"
        if step.expected:
            text += f" [expected: {step.expected}]"
        self._line(f"  {paint(f'{state:<7}', tone, self._colour)} {printable(text)}")

    def summary(self, transcript: Transcript) -> None:
        """Print a table of the cases."""
        width = max(len(case.title) for case in transcript.cases)
        head = f"case  {'':<{width}}  passed  failed  skipped"
        self._line(f"\n{paint(head, BOLD, self._colour)}")
        for case in transcript.cases:
            held, failed, skipped = (sum(step.ok is state for step in case.steps) for state in (True, False, None))
            result, tone = _RESULTS[case.ok]
            counts = f"{held:>6}  {failed:>6}  {skipped:>7}"
            self._line(f"{case.number:>4}  {case.title:<{width}}  {counts}  {paint(result, tone, self._colour)}")
        passed = sum(case.ok is True for case in transcript.cases)
        verdict = f"{passed} of {len(transcript.cases)} passed" if not transcript.ok else "The runbook passes"
        self._line(f"\n{paint(verdict + '.', GREEN if transcript.ok else RED, self._colour)}")

    def _line(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        print(text.encode(encoding, errors="replace").decode(encoding), file=self._stream, flush=True)


def to_stdout() -> RunbookReport:
    """Report on stdout."""
    return RunbookReport(sys.stdout)


def to_stderr() -> RunbookReport:
    """Report on stderr, because stdout is for JSON."""
    return RunbookReport(sys.stderr)
