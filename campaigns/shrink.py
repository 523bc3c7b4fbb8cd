"""Shrink a failing script: drop acts as long as it still breaks the same rule."""

from collections.abc import Callable

from campaigns.case import Script

MAX_RUNS = 400
"""So many runs at most: a script that cannot be shrunk further soon is reported as it is."""


def shrunk(script: Script, fails: Callable[[Script], bool], max_runs: int = MAX_RUNS) -> Script:
    """Return the shortest failing script that dropping acts leads to; `fails` runs one.

    First halves are dropped, then quarters, and so on to single acts, until no single act can be dropped.
    """
    runs = 0
    size = max(1, len(script) // 2)
    while True:
        at, dropped = 0, False
        while at < len(script):
            shorter = script[:at] + script[at + size :]
            if runs == max_runs:
                return script
            runs += 1
            if shorter and fails(shorter):
                script, dropped = shorter, True
            else:
                at += size
        if size == 1 and not dropped:
            return script
        size = max(1, size // 2)
