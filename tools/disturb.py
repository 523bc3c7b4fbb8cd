"""Disturb the processes below another one: stop one of them, or let one thread of them wait for all others, at random.

Code that relies on the usual order of two events, which nothing guarantees, may then fail, so that a test can show it.
`tools/repeat.py --disturb SECONDS` uses it.
"""

import contextlib
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Final

SHORTER: Final = (0.002, 0.01, 0.03, 0.1)
"""Seconds that most disturbances take at most; the others take up to what the caller says."""
STARVED: Final = 3
"""A thread waits so many times longer than a process is stopped: it still runs while no other thread wants the core."""
PAUSE: Final = 0.02
"""Seconds, at most, between two disturbances."""


def disturb(root: int, longest: float) -> int:
    """Disturb what runs below the process `root` until that ends; return the number of disturbances.

    `longest` is in seconds. There is no seed: the system's order of threads would make another run of it anyway.
    """
    chance, count = secrets.SystemRandom(), 0
    while Path(f"/proc/{root}").exists():
        if processes := below(root):
            # Often the youngest, since much is decided while a process begins.
            process = max(processes) if chance.random() < 0.4 else chance.choice(processes)
            seconds = chance.choice((*SHORTER, longest)) * chance.random()
            with contextlib.suppress(OSError, IndexError):  # it has ended
                if chance.random() < 0.5:
                    _stop(process, seconds)
                else:
                    _starve(chance.choice(os.listdir(f"/proc/{process}/task")), seconds * STARVED)
                count += 1
        time.sleep(chance.random() * PAUSE)
    return count


def below(root: int) -> list[int]:
    """Return the processes that `root` and its descendants have started and that still run."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            _, _, fields = (folder / "stat").read_text().rpartition(")")
        except OSError:
            continue
        children.setdefault(int(fields.split()[1]), []).append(int(folder.name))
    found, parents = [], [root]
    while parents:
        started = children.get(parents.pop(), [])
        found += started
        parents += started
    return found


def _stop(process: int, seconds: float) -> None:
    os.kill(process, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(process, signal.SIGCONT)


def _starve(thread: str, seconds: float) -> None:
    os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    try:
        time.sleep(seconds)
    finally:
        os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))
