"""Campaign `listeners`: what clients send wrong harms no listener of a stack.

An act sends bytes to a listener: a valid request that is changed (`campaigns.listener_requests`), at once, in pieces,
up to a stall, or with a reset. After a case the listener has to answer a valid request with the bytes that it answered
at the beginning; the log has no traceback; no answer is a server's error; and the process has no more open files and
threads, and not much more memory.
"""

import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final

from campaigns.case import Act, Finding, Outcome, Script, World
from campaigns.listener_places import Place, Process, places, running_stack
from campaigns.listener_requests import BINARY, CHANGES

NAMES: Final = (
    "agent socket",
    "tappd socket",
    "agent",
    "KMS",
    "KMS without TLS",
    "KMS to onboard",
    "agent gRPC",
    "KMS gRPC",
    "auth-simple",
    "auth-eth-bun",
    "auth-mock",
    "PCCS",
    "verifier",
    "VMM",
    "gateway admin",
    "gateway RPC",
    "gateway RPC without TLS",
    "ingress",
    "ingress in TLS",
    "chain",
    "control",
)
HOW: Final = ("at once", "in pieces", "stalled", "reset", "half closed")
SERVER_ERROR: Final = re.compile(rb"HTTP/1\.[01] (5\d\d)")
DOCUMENTED: Final[frozenset[tuple[str, bytes]]] = frozenset()
"""Answers of a server's error that a listener documents: its name and the status."""
FILES: Final = 24
"""So many more open files than at the beginning: connections to other parts are kept for some time."""
THREADS: Final = 48
"""So many more threads: those of the pools, which are bounded."""
MEMORY: Final = 96 * 1024 * 1024
"""So many more bytes of resident memory than after the first cases; the journal keeps a bounded number of calls."""
FIRST_CASES: Final = 40
SETTLED: Final = 20.0
"""Seconds within which the files of closed connections are closed."""


class Listeners:
    """The world: a stack, and what its listeners answered at first."""

    def __init__(self, found: list[Place], processes: list[Process]) -> None:
        self._places = {place.name: place for place in found}
        self._processes, self._cases = processes, 0
        self._first = {place.name: place.answer() for place in found}
        for name, answer in self._first.items():
            if self._places[name].answer() != answer:
                raise RuntimeError(f"{name} has no constant answer: {answer[:300]!r}")
        self._files, self._threads, self._memory = self._held()

    def run(self, script: Script) -> Outcome:
        """Send all, eight at a time; then judge."""
        outcome = Outcome()
        for process in self._processes:
            process.new_log()
        with ThreadPoolExecutor(8) as pool:
            for act, said in zip(script, pool.map(self._send, script), strict=True):
                place = act.fields["listener"]
                outcome.counts["answered" if said else "closed, or no answer"] += 1
                for status in set(SERVER_ERROR.findall(said)):
                    if (place, status) not in DOCUMENTED:
                        text = f"{act.name} {act.fields['how']}: {said[:500]!r}"
                        outcome.findings.append(Finding(f"{place}: status {status.decode()}", text))
        for name in sorted({act.fields["listener"] for act in script}):
            outcome.findings += self._alive(name)
            outcome.counts["valid requests answered"] += 1
        outcome.findings += self._tidy()
        for trace in [trace for process in self._processes for trace in process.tracebacks()]:
            outcome.findings.append(Finding(f"traceback: {trace.rpartition(chr(10))[2][:80]}", trace[-3000:]))
        return outcome

    def _send(self, act: Act) -> bytes:
        place, chance = self._places[act.fields["listener"]], Random(act.fields["number"])
        data = CHANGES[act.name](chance.choice(place.requests), place.requests, chance)
        return place.send(data, act.fields["how"], chance)

    def _alive(self, name: str) -> Iterator[Finding]:
        try:
            answer = self._places[name].answer()
        except OSError as error:
            yield Finding(f"{name}: no answer to a valid request", repr(error))
            return
        if answer != self._first[name]:
            yield Finding(f"{name}: another answer", f"{answer[:500]!r}, before {self._first[name][:500]!r}")

    def _held(self) -> tuple[int, int, int]:
        """Return the open files, the threads and the resident memory of all processes."""
        every = self._processes
        return (
            sum(each.files() for each in every),
            sum(each.threads() for each in every),
            sum(each.memory() for each in every),
        )

    def _tidy(self) -> Iterator[Finding]:
        """Compare what the processes hold with the beginning."""
        end = time.monotonic() + SETTLED
        while (held := self._held())[0] > self._files + FILES and time.monotonic() < end:
            time.sleep(0.05)
        files, threads, memory = held
        if files > self._files + FILES:
            yield Finding("open files", f"{files}, {self._files} at the beginning")
        if threads > self._threads + THREADS:
            yield Finding("threads", f"{threads}, {self._threads} at the beginning")
        self._cases += 1
        if self._cases <= FIRST_CASES:
            self._memory = max(self._memory, memory)
        elif memory > self._memory + MEMORY:
            yield Finding("memory", f"{memory} bytes, {self._memory} after the first {FIRST_CASES} cases")


class Campaign:
    """The campaign."""

    name = "listeners"
    about = "malformed requests to every listener of a stack, which has to go on answering valid ones"

    def draw(self, chance: Random) -> Script:
        """Draw a listener or two, and what is sent to them."""
        names = [chance.choice(NAMES) for _ in range(chance.choice((1, 1, 2)))]
        return tuple(self._act(chance, chance.choice(names)) for _ in range(16))

    def _act(self, chance: Random, listener: str) -> Act:
        raw = listener in ("ingress", "KMS without TLS", "gateway RPC without TLS") or "gRPC" in listener
        change = chance.choice(BINARY if raw else [*CHANGES])
        if listener == "chain" and not chance.randrange(3):
            change = "WebSocket"
        how = chance.choice(HOW)
        fields = {"listener": listener, "how": how, "number": chance.randrange(1 << 32)}
        return Act(change, fields, f"{listener}: {change}")

    @contextmanager
    def world(self) -> Iterator[World]:
        """Run a stack."""
        with tempfile.TemporaryDirectory(prefix="listeners-") as folder, running_stack(Path(folder)) as stack:
            found = places(stack)
            if missing := set(NAMES) ^ {place.name for place in found}:
                raise RuntimeError(f"these listeners are named, or there, but not both: {', '.join(sorted(missing))}")
            yield Listeners(found, [stack.process, stack.mock_process])


CAMPAIGN: Final = Campaign()
