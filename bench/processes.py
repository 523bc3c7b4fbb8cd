"""The measured processes, and the cores that they run on.

The measured process has its own core (`SERVER_CORE`); the load generator and all other processes share the other one.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Literal

from dstack_emu.attest.release import Release

ROOT: Final = Path(__file__).resolve().parent.parent
_CORES: Final = sorted(os.sched_getaffinity(0))
SERVER_CORE: Final = _CORES[0]
OTHER_CORE: Final = _CORES[-1]

STOP_TIMEOUT: Final = 10.0
_CPUCLOCK_SCHED: Final = 2


def command(name: str, release: Release, *arguments: str) -> tuple[str, ...]:
    """Return a command of the emulator that prints one line of JSON when it is ready."""
    return (sys.executable, "-m", "dstack_emu", name, "--release", release.name, "--json", *arguments)


class ProcessError(Exception):
    """A process ended before it was ready; the text contains its output."""


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run the block, and every process started in it, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(
    command: Sequence[str],
    core: int | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    ready: str = "{",
    ready_on: Literal["stdout", "stderr"] = "stdout",
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run a command of this project (on one core, if given) until the block ends.

    Yields the process and its first line that contains `ready`, when it has printed that line.
    """
    with on_core(core) if core is not None else nullcontext():
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE if ready_on == "stdout" else subprocess.DEVNULL,
            stderr=subprocess.PIPE if ready_on == "stderr" else subprocess.DEVNULL,
            text=True,
        )
    stream = process.stdout or process.stderr
    assert stream is not None
    rest = threading.Thread(target=stream.read, daemon=True)  # otherwise the pipe would fill
    try:
        said = []
        for line in stream:
            if ready in line:
                break
            said.append(line)
        else:
            raise ProcessError(f"{' '.join(command)} ended before it was ready: {''.join(said)}")
        rest.start()
        yield process, line
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if rest.ident is not None:
            rest.join()
        stream.close()


@contextmanager
def running_stack(core: int, release: Release) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run a whole stack of a release on one core; yield its process id and its description."""
    with running(command("up", release, "--free-ports"), core) as (process, line):
        yield process.pid, json.loads(line)


def resident_memory(pid: int) -> int:
    """Return the resident memory of a process in bytes; a stack is one process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessError(f"process {pid} has no memory: it has ended")


class CpuMeter:
    """A measurement of calls per second that also counts the calls per second of a process's processor time.

    Other load on the core disturbs the first number more than the second.
    """

    def __init__(self, pid: int, measure: Callable[[float], float]) -> None:
        self._pid, self._measure = pid, measure
        self.calls_per_cpu_second: list[float] = []

    def __call__(self, seconds: float) -> float:
        used, began = cpu_seconds(self._pid), time.perf_counter()
        rate = self._measure(seconds)
        calls = rate * (time.perf_counter() - began)
        self.calls_per_cpu_second.append(calls / (cpu_seconds(self._pid) - used))
        return rate


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process with its threads, in seconds, to the nanosecond.

    /proc/PID/stat only counts hundredths. Python has no `clock_getcpuclockid`; the clock's number is computed as on
    Linux (include/linux/posix-timers_types.h).
    """
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
