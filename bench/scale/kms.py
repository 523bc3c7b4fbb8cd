"""KMS in one stack: each in a trust domain of its own, onboarded from kms-src, and asking kms-src's webhook."""

from collections.abc import Iterator
from contextlib import ExitStack

from bench.journal import app_connections
from bench.scale.growth import Effort, Quantity, Subject, Values
from bench.scale.usage import GrowingStack, Spent, growing_stack


def measure(effort: Effort) -> Iterator[tuple[int, Values]]:
    """Add KMS to a stack by the control API, allow each, and onboard it."""
    with ExitStack() as closing:
        spent, urls = Spent(), list[str]()
        stack = growing_stack(closing, spent)
        recorded = 0
        yield 0, _values(spent, stack, [stack.description["services"]["kms-src"]], effort) | {"recorded": 0.0}
        for size in effort.sizes():
            before = stack.recorded()
            with spent.counting():
                while len(urls) < size:
                    urls.append(_add(stack, f"k{len(urls)}"))
            recorded += stack.recorded() - before
            yield size, _values(spent, stack, urls, effort) | {"recorded": float(recorded)}


def _add(stack: GrowingStack, name: str) -> str:
    stack.call("POST", "/kms", {"name": name, "webhook": "src"})
    stack.call("POST", "/policies/src/allow", {"guest": f"kms-{name}"})
    url: str = stack.call("POST", f"/kms/{name}/onboard", {"source": "src"})["url"]
    return url


def _values(spent: Spent, stack: GrowingStack, urls: list[str], effort: Effort) -> Values:
    values = spent.values()
    with ExitStack() as closing:
        services = stack.description["services"]
        described = [{**stack.description, "services": {**services, "kms-src": url}} for url in urls]
        connections = [app_connections(closing, each, 1)[0] for each in described]
        for connection in connections:
            connection.call()  # a KMS verifies its own evidence at its first call
        values["calls"] = spent.calls_per_cpu_second(connections, effort.seconds)
    stack.forget_calls()
    return values


SUBJECT = Subject(
    "kms",
    "KMS in one stack, onboarded from kms-src",
    "KMS added to the two of the stack",
    largest=32,
    largest_quick=4,
    quantities=(
        Quantity("wall", "Time until all are onboarded", "s"),
        Quantity("cpu", "Processor time until all are onboarded", "CPU s"),
        Quantity("memory", "Memory", "MiB"),
        Quantity("calls", "GetAppKey, of all of them in turn", "calls per CPU s", kind="each"),
        Quantity("descriptors", "Open files and sockets", "number", is_counted=True),
        Quantity("recorded", "Calls from outside that the journal records", "number", is_counted=True),
    ),
    measure=measure,
)
