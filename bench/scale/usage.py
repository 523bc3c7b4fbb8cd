"""What a process uses (of the kernel's own counts), and a stack that grows by its control API."""

import json
import os
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.load import Connection, closed_loop
from bench.processes import command, cpu_seconds, running
from bench.scale.growth import Values
from dstack_emu.attest.release import DEFAULT

_TIMEOUT = 120.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def proportional_memory(pid: int) -> float:
    """Return the memory of a process in MiB; what it shares with others is divided among them (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} has no memory: it has ended")


def descriptors(pid: int) -> int:
    """Return the number of open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


class Spent:
    """Wall and processor time that processes need for what is measured, without what only measures."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self._wall = self._cpu = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the time of the block; processes that it adds to `pids` count from their beginning."""
        began, before = time.perf_counter(), self._used()
        yield
        self._wall += time.perf_counter() - began
        self._cpu += self._used() - before

    def _used(self) -> float:
        return sum(map(cpu_seconds, self.pids))

    def values(self) -> Values:
        """Return what is spent, and what the processes have now."""
        return {
            "wall": self._wall,
            "cpu": self._cpu,
            "memory": sum(map(proportional_memory, self.pids)),
            "descriptors": sum(map(descriptors, self.pids)),
        }

    def calls_per_cpu_second(self, connections: Sequence[Connection], seconds: float) -> float:
        """Call on all connections for some seconds; return the calls per second of the processes' processor time."""
        began, before = time.perf_counter(), self._used()
        rate = closed_loop(connections)(seconds)
        return rate * (time.perf_counter() - began) / (self._used() - before)


def processes_of(pid: int) -> list[int]:
    """Return a process and all that it has started, with what those have started."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = [child for thread in threads for child in (thread / "children").read_text().split()]
    return [pid, *(found for child in children for found in processes_of(int(child)))]


def call_json(method: str, url: str, body: Any = None) -> Any:
    """Make a call in JSON, with a connection of its own; return the answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with _direct.open(request, timeout=_TIMEOUT) as answer:
        return json.load(answer)


class GrowingStack:
    """A stack in a process of its own, and its control API."""

    def __init__(self, pid: int, description: dict[str, Any]) -> None:
        self.pid, self.description = pid, description
        self._control: str = description["services"]["control"]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Make a call of the control API; return the answer."""
        return call_json(method, self._control + path, body)

    def recorded(self) -> int:
        """Return how many calls from outside the stack has recorded since it began."""
        return int(self.call("GET", "/journal?limit=0")["position"])

    def forget_calls(self) -> None:
        """Empty the journal: calls that were made to measure are no part of the memory that is measured next."""
        self.call("DELETE", "/journal")


def started(closing: ExitStack, commands: Sequence[Sequence[str]]) -> tuple[list[int], list[str]]:
    """Run commands, all at once, until `closing` ends; return their process ids and their first lines."""
    managers = [running(each) for each in commands]
    with ThreadPoolExecutor(max(1, len(managers))) as threads:
        entered = list(threads.map(closing.enter_context, managers))
    return [process.pid for process, _ in entered], [line for _, line in entered]


def growing_stack(closing: ExitStack, spent: Spent, *options: str) -> GrowingStack:
    """Run a stack until `closing` ends; its start is counted as spent."""
    with spent.counting():
        pids, (line,) = started(closing, [command("up", DEFAULT, "--free-ports", *options)])
        spent.pids += pids
    return GrowingStack(pids[0], json.loads(line))
