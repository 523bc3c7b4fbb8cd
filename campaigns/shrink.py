"""Shrink a failing script: drop acts as long as it still breaks the same rule."""

import time
from collections.abc import Callable

from campaigns.case import Script

MAX_RUNS = 400
MAX_SECONDS = 120.0
"""So many runs, and seconds, at most: a script that cannot be shrunk further soon is reported as it is."""


def shrunk(script: Script, fails: Callable[[Script], bool]) -> Script:
    """Return the shortest failing script that dropping acts leads to; `fails` runs one.

    First halves are dropped, then quarters, and so on to single acts, until no single act can be dropped.
    """
    runs, until = 0, time.monotonic() + MAX_SECONDS
    size = max(1, len(script) // 2)
    while True:
        at, dropped = 0, False
        while at < len(script):
            shorter = script[:at] + script[at + size :]
            if runs == MAX_RUNS or time.monotonic() > until:
                return script
            runs += 1
            if shorter and fails(shorter):
                script, dropped = shorter, True
            else:
                at += size
        if size == 1 and not dropped:
            return script
        size = max(1, size // 2)
