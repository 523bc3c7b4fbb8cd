"""Apps in the policy of one stack: the webhook's decisions about a listed app and about another one, and GetAppKey."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from bench.journal import app_connections
from bench.load import Connection, connect_tcp, make_calls, post
from bench.scale.growth import Effort, Quantity, Subject, Values
from bench.scale.usage import GrowingStack, Spent, growing_stack

CONNECTIONS = 8
KEPT = 2000
"""The records that a journal keeps: so many denials are in it when the memory is measured."""


def measure(effort: Effort) -> Iterator[tuple[int, Values]]:
    """Write policies with more and more apps beside the stack's own."""
    with ExitStack() as closing:
        spent = Spent()
        stack = growing_stack(closing, spent)
        policy, own = stack.call("GET", "/policies/src"), stack.call("GET", "/guests/app")
        keys = app_connections(closing, stack.description)
        for size in [0, *effort.sizes()]:
            others = {f"0x{number:040x}": _entry(number) for number in range(1, size + 1)}
            writing = Spent()
            writing.pids = [stack.pid]
            with writing.counting():
                stack.call("PUT", "/policies/src", {**policy, "apps": {**others, **policy["apps"]}})
                make_calls(_asking(closing, stack, own)[:1], 1)
            yield size, _values(writing, stack, own, keys, effort)


def _entry(number: int) -> dict[str, Any]:
    return {"composeHashes": [f"0x{number:064x}"], "devices": [], "allowAnyDevice": True}


def _asking(closing: ExitStack, stack: GrowingStack, app: dict[str, Any], **changed: str) -> list[Connection]:
    """Connect to the webhook, as a KMS that asks about an app."""
    boot_info = {
        "mrAggregated": app["mr_aggregated"],
        "osImageHash": app["os_image_hash"],
        "appId": app["app_id"],
        "composeHash": app["compose_hash"],
        "instanceId": app["instance_id"],
        "deviceId": app["device_id"],
        "tcbStatus": "UpToDate",
        "advisoryIds": [],
        **changed,
    }
    url = urlsplit(stack.description["services"]["auth-src"])
    request = post("/bootAuth/app", json.dumps(boot_info).encode())
    address = (str(url.hostname), int(url.port or 0))
    connections = [Connection(connect_tcp(address), request) for _ in range(CONNECTIONS)]
    for connection in connections:
        closing.callback(connection.close)
    return connections


def _values(writing: Spent, stack: GrowingStack, own: dict[str, Any], keys: list[Connection], effort: Effort) -> Values:
    spent, values = Spent(), writing.values()
    spent.pids = [stack.pid]
    values["keys"] = spent.calls_per_cpu_second(keys, effort.seconds)
    with ExitStack() as closing:
        listed, unlisted = _asking(closing, stack, own), _asking(closing, stack, own, appId="ff" * 20)
        values["allowed"] = spent.calls_per_cpu_second(listed, effort.seconds)
        values["denied"] = spent.calls_per_cpu_second(unlisted, effort.seconds)
        make_calls(unlisted, KEPT)
    return values | {"memory": spent.values()["memory"]}


SUBJECT = Subject(
    "apps",
    "Apps in a policy",
    "apps in the policy beside the stack's own",
    largest=1024,
    largest_quick=16,
    quantities=(
        Quantity("wall", "From the new policy to a decision by it", "s"),
        Quantity("cpu", "Processor time from the new policy to a decision", "CPU s"),
        Quantity("memory", f"Memory, with {KEPT} denials in the journal", "MiB"),
        Quantity("allowed", "Decisions about an app that is listed", "calls per CPU s", kind="each"),
        Quantity("denied", "Decisions about an app that is not listed", "calls per CPU s", kind="each"),
        Quantity("keys", "GetAppKey of an app that is listed", "calls per CPU s", kind="each"),
    ),
    measure=measure,
)
