"""Trust domains in one stack: each on a platform of its own, with its own instance id, and with keys from kms-src."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from bench.load import Connection, connect_unix, make_calls, post
from bench.scale.growth import Effort, Quantity, Subject, Values
from bench.scale.usage import GrowingStack, Spent, growing_stack

CALLED = 64
"""So many trust domains at most are called at once: a client that waits for a thousand measures itself."""


def measure(effort: Effort) -> Iterator[tuple[int, Values]]:
    """Add trust domains to a stack by the control API, and let each boot."""
    with ExitStack() as closing:
        spent, sockets = Spent(), list[str]()
        stack = growing_stack(closing, spent)
        recorded = 0
        yield 0, _values(spent, stack, [stack.description["app"]["dstack_sock"]], effort) | {"recorded": 0.0}
        app_id = stack.description["app"]["app_id"]
        for size in effort.sizes():
            before = stack.recorded()
            with spent.counting():
                while len(sockets) < size:
                    sockets.append(add_trust_domain(stack, len(sockets), app_id))
            recorded += stack.recorded() - before
            yield size, _values(spent, stack, sockets, effort) | {"recorded": float(recorded)}


def add_trust_domain(stack: GrowingStack, number: int, app_id: str) -> str:
    """Add a trust domain of that number, and let it boot; return the path of its agent's socket file."""
    name = f"guest-{number}"
    spec = {"name": name, "platform": f"host {number}", "instance": name, "app_id": app_id, "compose": _COMPOSE}
    sock: str = stack.call("POST", "/guests", spec)["dstack_sock"]
    if number == 0:  # all of them have the same app id and compose hash
        stack.call("POST", "/policies/src/allow", {"guest": name})
    stack.call("POST", f"/guests/{name}/boot", {})
    return sock


_COMPOSE = json.dumps({"manifest_version": 2, "name": "many", "runner": "docker-compose"})


def _values(spent: Spent, stack: GrowingStack, sockets: list[str], effort: Effort) -> Values:
    values = spent.values()
    with ExitStack() as closing:
        values["calls"] = spent.calls_per_cpu_second(quoting(closing, sockets), effort.seconds)
    stack.forget_calls()
    return values


def quoting(closing: ExitStack, sockets: Sequence[str]) -> list[Connection]:
    """Connect to the agents with these socket files, of which the last `CALLED` are called, for GetQuote."""
    request = post("/GetQuote", json.dumps({"report_data": os.urandom(64).hex()}).encode())
    connections = [Connection(connect_unix(sock), request) for sock in sockets[-CALLED:]]
    for connection in connections:
        closing.callback(connection.close)
    make_calls(connections, 2 * len(connections))  # the first calls of an agent fill its caches
    return connections


SUBJECT = Subject(
    "trust-domains",
    "Trust domains with keys in one stack",
    "trust domains added to the stack",
    largest=1024,
    largest_quick=16,
    quantities=(
        Quantity("wall", "Time until all have keys", "s"),
        Quantity("cpu", "Processor time until all have keys", "CPU s"),
        Quantity("memory", "Memory", "MiB"),
        Quantity("calls", "GetQuote, of up to 64 of them in turn", "calls per CPU s", kind="each"),
        Quantity("descriptors", "Open files and sockets", "number", is_counted=True),
        Quantity("recorded", "Calls from outside that the journal records", "number", is_counted=True),
    ),
    measure=measure,
    rounds=2,
)
