"""How long the KMS authorization runbook takes, from exec to exit, on a stack of its own."""

import subprocess
import sys
import time
from collections.abc import Iterator

from bench.figure import Bar, Effort, Figure, median
from bench.processes import ROOT

RUNBOOK_BAR = 3.0


def measure(effort: Effort) -> Iterator[Figure]:
    """Seconds for `dstack-emu runbook`, its stack's start and stop included."""
    seconds = []
    for turn in range(effort.starts + 1):
        began = time.perf_counter()
        subprocess.run((sys.executable, "-m", "dstack_emu", "runbook"), cwd=ROOT, capture_output=True, check=True)
        if turn:  # the first one finds cold caches
            seconds.append(time.perf_counter() - began)
    yield Figure("runbook", median(seconds), "s", Bar(RUNBOOK_BAR, at_most=True))
