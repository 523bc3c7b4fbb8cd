"""Stacks side by side on one machine: each a process with its own ports, seed and state folder, all running at once."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

from bench.processes import command
from bench.scale.growth import Effort, Quantity, Subject, Values
from bench.scale.trust_domains import quoting
from bench.scale.usage import Spent, started
from dstack_emu.attest.release import DEFAULT


def measure(effort: Effort) -> Iterator[tuple[int, Values]]:
    """Start as many stacks as run already, all at once, until there are enough."""
    with ExitStack() as closing:
        spent, sockets = Spent(), list[str]()
        for size in effort.sizes():
            with spent.counting():
                new = range(len(sockets), size)
                commands = [command("up", DEFAULT, "--free-ports", "--seed", f"stack {number}") for number in new]
                processes, lines = started(closing, commands)
                spent.pids += processes
            sockets += [json.loads(line)["app"]["dstack_sock"] for line in lines]
            yield size, _values(spent, sockets, effort)


def _values(spent: Spent, sockets: list[str], effort: Effort) -> Values:
    values = spent.values()
    with ExitStack() as closing:
        values["calls"] = spent.calls_per_cpu_second(quoting(closing, sockets), effort.seconds)
    return values


SUBJECT = Subject(
    "stacks",
    "Stacks side by side on one machine",
    "stacks that run at once",
    largest=64,
    largest_quick=2,
    quantities=(
        Quantity("wall", "Time until all are ready", "s"),
        Quantity("cpu", "Processor time until all are ready", "CPU s"),
        Quantity("memory", "Memory of all", "MiB"),
        Quantity("calls", "GetQuote, of all of them in turn", "calls per CPU s", kind="each"),
        Quantity("descriptors", "Open files and sockets of all", "number", is_counted=True),
    ),
    measure=measure,
    rounds=2,
)
