"""The duration of the KMS authorization runbook on its own stack, from exec to exit."""

import subprocess
import time
from collections.abc import Iterator

from bench.figure import Bar, Effort, Figure, median
from bench.processes import ROOT, command

RUNBOOK_BAR = 3.0


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure the seconds of `dstack-emu runbook`, with the start and stop of its stack."""
    seconds = []
    for turn in range(effort.starts + 1):
        began = time.perf_counter()
        subprocess.run(command("runbook", effort.release), cwd=ROOT, capture_output=True, check=True)
        if turn:  # the first one has cold caches
            seconds.append(time.perf_counter() - began)
    yield Figure("runbook", median(seconds), "s", Bar(RUNBOOK_BAR, at_most=True))
