"""GetQuote over the agent's socket, against a bare aiohttp handler that returns the same bytes from memory."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench.figure import Bar, Effort, Figure, alternate, median, ratio
from bench.load import Connection, closed_loop, connect_unix, post
from bench.processes import OTHER_CORE, SERVER_CORE, CpuMeter, command, on_core, running

CONNECTIONS = 8
BAR, SHARE_BAR = 2000, 0.6


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure quotes per second over a unix socket; the server has its own core."""
    with ExitStack() as stack:
        process, ready = stack.enter_context(running(command("agent", effort.release), SERVER_CORE))
        socket_path = json.loads(ready)["dstack_sock"]
        stack.enter_context(on_core(OTHER_CORE))
        request = post("/GetQuote", json.dumps({"report_data": os.urandom(64).hex()}).encode())
        ours = [Connection(connect_unix(socket_path), request) for _ in range(CONNECTIONS)]
        body = Path(stack.enter_context(tempfile.TemporaryDirectory()), "answer")
        body.write_bytes(ours[0].call())
        server = (sys.executable, "-m", "bench.bare_server", "constant", str(body))
        _, line = stack.enter_context(running(server, SERVER_CORE))
        bare = [Connection(connect_unix(json.loads(line)["socket"]), request) for _ in range(CONNECTIONS)]
        for connection in (*ours, *bare):
            stack.callback(connection.close)
        meter = CpuMeter(process.pid, closed_loop(ours))
        rates, bare_rates = alternate(effort, meter, closed_loop(bare))
    yield Figure("getquote_socket", median(rates), "calls/s", Bar(BAR))
    yield Figure("getquote_to_bare_server", ratio(rates, bare_rates), "x bare aiohttp, same bytes", Bar(SHARE_BAR))
    yield Figure("getquote_per_cpu_second", median(meter.calls_per_cpu_second), "calls/CPU s of the agent")
