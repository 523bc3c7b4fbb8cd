"""Campaign `soak`: a mixed load on one stack, with connections that come, go, stall and reset; nothing may grow.

A case is a burst of calls and of connections that misbehave, from several threads, on a stack that all cases share.
When they are over, the stack says how much memory, how many descriptors, tasks, threads and open calls it has. After a
warm-up their trend, by linear regression, has to be level, and the stack has logged no error.
"""

import json
import random
import socket
import ssl
import statistics
import struct
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import Any, Final
from urllib.parse import urlsplit

from campaigns.case import Act, Finding, Outcome, Script, World
from tests.running import RunningStack, running_stack

ACTS: Final = 60
THREADS: Final = 8
PERIOD: Final = 3.0
"""Seconds from the beginning of a case to that of the next one, unless it takes longer. Under a steady load, which is a
third of a core, what does not leak is level."""
WARM_UP: Final = 120
"""Cases before the first sample that counts: the journal is full then."""
MIN_SAMPLES: Final = 20
"""Samples from which a trend is judged."""
SETTLED: Final = 10.0
"""Seconds that the stack has to get back to no open calls but that for the metrics."""
GROWTH: Final[dict[str, float]] = {
    "process_resident_memory_bytes": 24 * 2**20,
    "process_open_fds": 6,
    "dstack_emu_tasks": 6,
    "dstack_emu_threads": 6,
    "dstack_emu_open_calls": 2,
}
"""By how much each may be higher at the end than at the beginning of all samples, by their regression line."""
TARGETS: Final = ("kms-src", "kms-dst", "pccs", "auth-src", "control", "verifier", "gateway", "vmm")
MISBEHAVIOURS: Final = ("connect", "half a head", "half a body", "reset", "stall", "no TLS")


class Load:
    """The world: a stack that runs, and what was measured."""

    def __init__(self, stack: RunningStack) -> None:
        self._stack = stack
        self._samples: dict[str, list[float]] = {name: [] for name in GROWTH}
        self._cases = self._said = 0
        self._next = 0.0
        self._stalled: list[socket.socket] = []

    def run(self, script: Script) -> Outcome:
        """Do all acts of a case at once, wait until the stack is idle, and measure."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + PERIOD
        outcome = Outcome()
        with ThreadPoolExecutor(THREADS) as threads:
            for what in threads.map(self._act, script):
                outcome.counts[what] += 1
        for held in self._stalled:
            held.close()
        self._stalled.clear()
        self._measure(outcome)
        self._read_log(outcome)
        return outcome

    def close(self) -> None:
        """Close what stalls."""
        for held in self._stalled:
            held.close()

    # ---- acts

    def _act(self, act: Act) -> str:
        url = self._stack.services.get(str(act.fields.get("service", "")), "")
        if act.name == "call":
            return f"{act.fields['call']}: {self._call(str(act.fields['call']))}"
        if not url.startswith("http"):
            return "no such service"
        try:
            self._misbehave(str(act.fields["how"]), urlsplit(url))
        except OSError as error:
            return f"{act.fields['how']}: {type(error).__name__}"
        return f"{act.fields['how']}: done"

    def _call(self, name: str) -> str:
        control = self._stack.services["control"]
        calls: dict[str, Callable[[], Any]] = {
            "GetMeta": lambda: _get(
                f"{self._stack.services['kms-src']}/prpc/GetMeta?json".replace("http://", "https://")
            ),
            "boot": lambda: _get(f"{control}/guests/app/boot", {}),
            "stack": lambda: _get(f"{control}/stack"),
            "journal": lambda: _get(f"{control}/journal?limit=50"),
            "snapshot": lambda: _get(f"{control}/snapshots", {"name": f"s{random.randrange(4)}"}),
            "policy": lambda: _get(f"{control}/policies"),
            "root CA": lambda: _get(f"{self._stack.services['pccs']}/sgx/certification/v4/rootcacrl"),
            "health": lambda: _get(f"{self._stack.services['auth-src']}/"),
        }
        try:
            calls[name]()
        except urllib.error.HTTPError as error:
            return f"status {error.code}"
        except OSError as error:
            return type(error).__name__
        return "answered"

    def _misbehave(self, how: str, url: Any) -> None:
        client = socket.create_connection((url.hostname, url.port), timeout=10)
        if url.scheme == "https" and how != "no TLS":
            client = _tls().wrap_socket(client, server_hostname=url.hostname)
        head = f"POST /prpc/KMS.GetMeta HTTP/1.1\r\nHost: {url.hostname}\r\n".encode()
        if how == "half a head":
            client.sendall(head)
        elif how in ("half a body", "stall"):
            client.sendall(head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        elif how == "no TLS":
            client.sendall(b"\x16\x03\x01\x00\x05hello")
        if how == "stall":
            self._stalled.append(client)  # until the case is over
            return
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    # ---- judging

    def _measure(self, outcome: Outcome) -> None:
        found = self._metrics()
        until = time.monotonic() + SETTLED
        while found["dstack_emu_open_calls"] > 1 and time.monotonic() < until:
            time.sleep(0.1)
            found = self._metrics()
        outcome.measured |= found
        self._cases += 1
        if self._cases <= WARM_UP:
            return
        for name, samples in self._samples.items():
            samples.append(found[name])
        outcome.counts["samples"] += 1
        if self._cases < WARM_UP + MIN_SAMPLES:
            return
        outcome.counts["trends judged"] += 1
        for name, samples in self._samples.items():
            growth = rise(samples)
            if growth > GROWTH[name]:
                text = f"by {growth:.0f} over {len(samples)} samples, from {samples[0]:.0f} to {samples[-1]:.0f}"
                outcome.findings.append(Finding(f"{name} grows", text))

    def _metrics(self) -> dict[str, float]:
        text = _get(f"{self._stack.services['control']}/metrics").decode()
        lines = (line.split() for line in text.splitlines() if not line.startswith("#"))
        return {words[0]: float(words[1]) for words in lines if words[0] in GROWTH}

    def _read_log(self, outcome: Outcome) -> None:
        """Find errors and tracebacks in what the stack has said since the last case."""
        said = self._stack.said()
        new, self._said = said[self._said :], len(said)
        for line in new.splitlines():
            if " error " in line or line.startswith("Traceback"):
                outcome.findings.append(Finding("an error in the log", line[:500]))


def rise(samples: list[float]) -> float:
    """Return by how much the regression line of samples rises from the first to the last one."""
    return statistics.linear_regression(range(len(samples)), samples).slope * (len(samples) - 1)


def _tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _get(url: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_tls()))
    with urllib.request.build_opener(*handlers).open(request, timeout=30) as response:
        found: bytes = response.read()
        return found


class Soak:
    """The campaign."""

    name = "soak"
    about = "memory, descriptors, tasks and threads of a stack under a mixed load with bad connections have to be level"

    def draw(self, chance: Random) -> Script:
        """Draw the calls and connections of a burst."""
        calls = ("GetMeta", "boot", "stack", "journal", "snapshot", "policy", "root CA", "health")
        return tuple(
            Act("call", {"call": call}, f"call {call}")
            if chance.random() < 0.6
            else Act("misbehave", {"how": how, "service": chance.choice(TARGETS)}, how)
            for _ in range(ACTS)
            for call, how in ((chance.choice(calls), chance.choice(MISBEHAVIOURS)),)
        )

    @contextmanager
    def world(self) -> Iterator[World]:
        """Start the stack."""
        with running_stack("--gateway", "--grpc", "--vmm") as stack:
            load = Load(stack)
            try:
                yield load
            finally:
                load.close()


CAMPAIGN: Final = Soak()
