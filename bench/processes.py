"""Processes that are measured, and the cores they run on.

What is measured has a core for itself (`SERVER_CORE`); the load generator and whatever else takes part share the other.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
_CORES: Final = sorted(os.sched_getaffinity(0))
SERVER_CORE: Final = _CORES[0]
OTHER_CORE: Final = _CORES[-1]

UP: Final = (sys.executable, "-m", "stack", "up", "--json", "--free-ports")


class ProcessError(Exception):
    """A process that ended before it was ready; the text has what it said."""


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
    command: Sequence[str], core: int | None = None, *, environment: Mapping[str, str] | None = None, ready_on_stderr: bool = False
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run a command of this project (on one core, if given); give the process and the line that says that it is ready."""
    pipes = {"stderr" if ready_on_stderr else "stdout": subprocess.PIPE, "stdout" if ready_on_stderr else "stderr": subprocess.DEVNULL}
    with on_core(core) if core is not None else nullcontext():
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, text=True, **pipes)  # type: ignore[call-overload]
    stream = process.stderr if ready_on_stderr else process.stdout
    try:
        line = stream.readline()
        if not line.strip() or line.startswith(("Error", "Traceback")):
            process.terminate()
            raise ProcessError(f"{' '.join(command)} ended: {line}{stream.read()}")
        yield process, line
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        stream.close()


@contextmanager
def running_stack(core: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run a whole stack on one core; give its process id and its description."""
    with running(UP, core) as (process, line):
        yield process.pid, json.loads(line)


def resident_memory(pid: int) -> int:
    """Bytes that a process has in memory, its children's not included (a stack has none)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessError(f"process {pid} has no memory: it has ended")


class CpuMeter:
    """A measurement of calls a second that also notes how many calls a process gets done in a second of its own time.

    The first number suffers from whatever else wants the core, the second hardly does.
    """

    def __init__(self, pid: int, measure: Callable[[float], float]) -> None:
        self._pid, self._measure = pid, measure
        self.calls_per_cpu_second: list[float] = []

    def __call__(self, seconds: float) -> float:
        used, began = _cpu_seconds(self._pid), time.perf_counter()
        rate = self._measure(seconds)
        calls = rate * (time.perf_counter() - began)
        self.calls_per_cpu_second.append(calls / max(_cpu_seconds(self._pid) - used, 0.01))
        return rate


def _cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
