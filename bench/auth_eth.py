"""Decisions of auth-eth-bun over kept-alive connections, with a chain behind it that answers at once.

Each decision makes four calls of the chain, each over a connection of its own. The chain has the other core, so that
the rate is the webhook's; a real chain adds its time.
"""

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

from bench.figure import Bar, Effort, Figure, median
from bench.load import Connection, closed_loop, post
from bench.processes import OTHER_CORE, SERVER_CORE, CpuMeter, on_core, running

CONNECTIONS: Final = 8
BAR: Final = 150
CONTRACT: Final = "0x" + "12" * 20
BOOT_INFO: Final = {
    "mrAggregated": "11" * 32,
    "osImageHash": "22" * 32,
    "appId": "33" * 20,
    "composeHash": "44" * 32,
    "instanceId": "55" * 20,
    "deviceId": "66" * 32,
    "tcbStatus": "UpToDate",
    "advisoryIds": [],
}


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure decisions per second; the webhook has its own core."""
    with ExitStack() as stack:
        stub = (sys.executable, "-m", "bench.json_rpc_stub")
        _, line = stack.enter_context(running(stub, OTHER_CORE))
        options = ("--listen", "127.0.0.1:0", "--eth-rpc-url", json.loads(line)["url"], "--kms-contract", CONTRACT)
        webhook = (sys.executable, "-m", "dstack_emu", "auth", "eth", "--eth-compat", "next", "--json", *options)
        process, ready = stack.enter_context(running(webhook, SERVER_CORE))
        stack.enter_context(on_core(OTHER_CORE))
        address = ("127.0.0.1", int(json.loads(ready)["url"].rpartition(":")[2]))
        request = post("/bootAuth/app", json.dumps(BOOT_INFO).encode())
        connections = [Connection(socket.create_connection(address), request) for _ in range(CONNECTIONS)]
        for connection in connections:
            stack.callback(connection.close)
        if json.loads(connections[0].call())["isAllowed"] is not True:
            raise RuntimeError("the webhook does not allow what the chain allows")
        meter = CpuMeter(process.pid, closed_loop(connections))
        rates = [meter(effort.seconds) for _ in range(effort.rounds)]
    yield Figure("auth_eth_decisions", median(rates), "decisions/s", Bar(BAR))
    yield Figure("auth_eth_per_cpu_second", median(meter.calls_per_cpu_second), "decisions/CPU s of the webhook")
