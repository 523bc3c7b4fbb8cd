"""The gateway's ingress beside a plain copy of bytes: throughput, and the memory of connections that are idle.

An app sends through one connection, as fast as it is taken. App and client share the other core; over TLS the client
needs more of that than the ingress does, so bytes per second of the forwarder's processor time are compared, too.
"""

import contextlib
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

from bench.figure import Bar, Effort, Figure, alternate, median, ratio
from bench.ingress_server import DOMAIN, GO
from bench.processes import OTHER_CORE, SERVER_CORE, CpuMeter, on_core, resident_memory, running
from dstack_emu.transport.tls import client_context

TERMINATED_BAR: Final = 0.6
PASSTHROUGH_BAR: Final = 0.9
MEMORY_BAR: Final = 400.0
_TIMEOUT: Final = 30.0
_MIB: Final = 2**20
_SPARE_FILES: Final = 100

Connect = Callable[[], socket.socket]


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure MiB per second through the ingress, and their ratio to a copy's; then hold idle connections."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        _make_certificate(folder)
        _, app = _start(stack, OTHER_CORE, "app", folder, 0)
        ingress, port = _start(stack, SERVER_CORE, "ingress", folder, app)
        copy, copy_port = _start(stack, SERVER_CORE, "copy", folder, app)
        stack.enter_context(on_core(OTHER_CORE))
        terminated = CpuMeter(ingress, _throughput(lambda: _connect_tls(port)))
        passed = CpuMeter(ingress, _throughput(lambda: _connect_through(port)))
        copied = CpuMeter(copy, _throughput(lambda: _connect(copy_port)))
        rates = alternate(effort, terminated, passed, copied)
        yield from _compared("terminated", terminated, rates[0], copied, rates[2], TERMINATED_BAR)
        yield from _compared("passthrough", passed, rates[1], copied, rates[2], PASSTHROUGH_BAR)
        yield Figure("copy_throughput", median(rates[2]), "MiB/s")
        yield _idle_memory(stack, ingress, port, effort.calls)


def _compared(
    name: str, meter: CpuMeter, rates: list[float], copied: CpuMeter, copied_rates: list[float], bar: float
) -> Iterator[Figure]:
    yield Figure(f"{name}_throughput", median(rates), "MiB/s")
    yield Figure(f"{name}_to_copy", ratio(rates, copied_rates), "x a copy by asyncio streams", Bar(bar))
    share = ratio(meter.calls_per_cpu_second, copied.calls_per_cpu_second)
    yield Figure(f"{name}_to_copy_per_cpu_second", share, "x a copy's MiB/CPU s")


def _start(stack: ExitStack, core: int, kind: str, folder: str, app: int) -> tuple[int, int]:
    """Start a process; return its id and its port."""
    command = (sys.executable, "-m", "bench.ingress_server", kind, folder, str(app))
    process, line = stack.enter_context(running(command, core))
    return process.pid, int(json.loads(line)["port"])


def _make_certificate(folder: str) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{folder}/app.key")
    name = ("-subj", f"/CN={DOMAIN}", "-addext", f"subjectAltName=DNS:*.{DOMAIN}", "-out", f"{folder}/app.crt")
    subprocess.run(("openssl", "req", "-x509", *key, *name), check=True, capture_output=True)


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT)


def _connect_tls(port: int) -> ssl.SSLSocket:
    return client_context().wrap_socket(_connect(port), server_hostname=f"app.{DOMAIN}")


def _connect_through(port: int) -> socket.socket:
    sock, hello = _connect(port), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        client_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname=f"app-s.{DOMAIN}").do_handshake()
    sock.sendall(hello.read())
    return sock


def _throughput(connect: Connect) -> Callable[[float], float]:
    def measure(seconds: float) -> float:
        with connect() as sock:
            sock.sendall(GO)
            into, received, began = bytearray(256 * 1024), 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                received += sock.recv_into(into)
            return received / _MIB / (time.perf_counter() - began)

    return measure


def _idle_memory(stack: ExitStack, ingress: int, port: int, connections: int) -> Figure:
    """Hold connections whose TLS is terminated, half as many as this process and the ingress may have files open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for pid in (os.getpid(), ingress):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    connections = min(connections, (hard - _SPARE_FILES) // 2)
    for _ in range(connections):
        stack.enter_context(_connect_tls(port))
    memory = resident_memory(ingress) / _MIB
    return Figure("ingress_idle_memory", memory, f"MiB, {connections} connections", Bar(MEMORY_BAR, at_most=True))
