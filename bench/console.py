"""The cost of an open console to the stack that it shows: GetAppKey with a follower of the journal, and without one.

The follower reads what a page of the console reads, and throws it away, so that only the stack's own work is compared:
a browser on the same machine takes processor time, too, and how much depends on the machine. All sides are the same
stack in one run, in its processor time per call.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

from bench.figure import Bar, Effort, Figure, alternate, median, ratio
from bench.journal import app_connections
from bench.kms import TIMEOUT
from bench.load import closed_loop
from bench.processes import OTHER_CORE, SERVER_CORE, CpuMeter, on_core, running_stack

BAR = 0.9
FOLLOWERS = 1, 4


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure the processor time of calls with followers and without, and the ratio."""
    with ExitStack() as stack:
        pid, description = stack.enter_context(running_stack(SERVER_CORE, effort.release))
        stack.enter_context(on_core(OTHER_CORE))
        connections = app_connections(stack, description)
        port = int(urlsplit(description["services"]["control"]).port or 0)
        sides = [CpuMeter(pid, _followed(port, number, closed_loop(connections))) for number in (0, *FOLLOWERS)]
        turns = replace(effort, rounds=effort.rounds * 10, seconds=effort.seconds / 4)
        alternate(turns, *sides)
    without, *followed = (side.calls_per_cpu_second for side in sides)
    yield Figure("calls_unfollowed", 1e6 / median(without), "CPU ms per 1000 calls")
    yield Figure("calls_followed", 1e6 / median(followed[0]), "CPU ms per 1000 calls")
    yield Figure("console_to_no_console", ratio(followed[0], without), "x calls/CPU s without", Bar(BAR))
    yield Figure("four_consoles_to_none", ratio(followed[1], without), "x calls/CPU s without")


def _followed(port: int, number: int, load: Callable[[float], float]) -> Callable[[float], float]:
    def measured(seconds: float) -> float:
        with ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(_follower(port))
            return load(seconds)

    return measured


@contextmanager
def _follower(port: int) -> Iterator[None]:
    """Read the stream of the journal in a thread until the block ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as sock:
        sock.sendall(b"GET /journal/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        sock.recv(1)  # it is followed from here on
        reader = threading.Thread(target=_drain, args=(sock,))
        reader.start()
        try:
            yield
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            reader.join()


def _drain(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass
