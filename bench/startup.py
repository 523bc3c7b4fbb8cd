"""Start and stop of a stack: the time of each, and its memory when it is ready."""

import time
from collections.abc import Iterator

from bench.figure import Bar, Effort, Figure, median
from bench.processes import command, resident_memory, running

READY_BAR, STOP_BAR, MEMORY_BAR = 0.8, 0.5, 160.0


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure the seconds from exec to the ready line and from SIGTERM to the end, and the memory when ready."""
    ready, stopped, memory = [], [], []
    for turn in range(effort.starts + 1):
        began = time.perf_counter()
        with running(command("up", effort.release, "--free-ports")) as (process, _):
            is_ready = time.perf_counter()
            held = resident_memory(process.pid)
            signalled = time.perf_counter()
        if turn:  # the first one has cold caches
            ready.append(is_ready - began)
            memory.append(held / 2**20)
            stopped.append(time.perf_counter() - signalled)
    yield Figure("stack_ready", median(ready), "s", Bar(READY_BAR, at_most=True))
    yield Figure("stack_stop", median(stopped), "s", Bar(STOP_BAR, at_most=True))
    yield Figure("stack_memory", max(memory), "MiB", Bar(MEMORY_BAR, at_most=True))
