"""Start of a single agent (`dstack-emu agent`): the time until it is ready, and its memory then."""

import time
from collections.abc import Iterator

from bench.figure import Bar, Effort, Figure, median
from bench.processes import command, resident_memory, running

READY_BAR, MEMORY_BAR = 0.35, 48.0


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure the seconds from exec to the ready line, and the resident memory then."""
    ready, memory = [], []
    for turn in range(effort.starts + 1):
        began = time.perf_counter()
        with running(command("agent", effort.release)) as (process, _):
            took = time.perf_counter() - began
            if turn:  # the first one has cold caches
                ready.append(took)
                memory.append(resident_memory(process.pid) / 2**20)
    yield Figure("agent_ready", median(ready), "s", Bar(READY_BAR, at_most=True))
    yield Figure("agent_memory", max(memory), "MiB", Bar(MEMORY_BAR, at_most=True))
