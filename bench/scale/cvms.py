"""CVMs of one VMM: deployed by its RPCs, each a trust domain that boots, with keys from kms-src, and no containers."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.load import Connection, connect_tcp, post
from bench.scale.growth import Effort, Quantity, Subject, Values
from bench.scale.trust_domains import quoting
from bench.scale.usage import GrowingStack, Spent, call_json, growing_stack, processes_of
from dstack_emu.attest.release import DEFAULT

_PAUSE = 0.02
"""Seconds before a CVM that boots is asked again."""
_COMPOSE = json.dumps(
    {
        "manifest_version": 2,
        "name": "many",
        "runner": "docker-compose",
        "docker_compose_file": "services: {}",
        "kms_enabled": True,
    }
)
_APP_HASH = hashlib.sha256(_COMPOSE.encode()).hexdigest()


class Vmm:
    """The VMM of a stack, asked as vmm-cli.py does: in JSON, with a connection for each call.

    `ids` are those of its CVMs, to which new ones are added.
    """

    def __init__(self, stack: GrowingStack, ids: list[str]) -> None:
        self._stack, self.ids = stack, ids
        self._url = stack.description["services"]["vmm"]

    def grow(self, size: int) -> None:
        """Deploy CVMs one after another until there are so many, and wait until all of them run and have keys."""
        if not self.ids:  # all of them have the same app id and compose hash
            policy = self._stack.call("GET", "/policies/src")
            app = {"composeHashes": [f"0x{_APP_HASH}"], "devices": [], "allowAnyDevice": True}
            self._stack.call("PUT", "/policies/src", {**policy, "apps": {**policy["apps"], f"0x{_APP_HASH[:40]}": app}})
        while len(self.ids) < size:
            self.ids.append(self._rpc("CreateVm", _configuration(len(self.ids)))["id"])
        self.wait()

    def wait(self) -> None:
        """Wait until all CVMs run and have keys."""
        for vm_id in self.ids:
            while (info := self._rpc("GetInfo", {"id": vm_id})["info"])["boot_progress"] != "done":
                if info["boot_error"]:
                    raise RuntimeError(f"{info['name']} has not booted: {info['boot_error']}")
                time.sleep(_PAUSE)

    def connect(self, method: str, request: dict[str, Any]) -> Connection:
        """Return a kept-alive connection that makes a call again and again."""
        url = urlsplit(self._url)
        asked = post(f"/prpc/{method}?json", json.dumps(request).encode())
        return Connection(connect_tcp((str(url.hostname), int(url.port or 0))), asked)

    def sockets(self) -> list[str]:
        """Return the socket files of the guest agents."""
        machines = Path(self._stack.description["state"]) / "vms"
        return [str(machines / vm_id / "run" / "dstack.sock") for vm_id in self.ids]

    def _rpc(self, method: str, request: dict[str, Any]) -> Any:
        return call_json("POST", f"{self._url}/prpc/{method}?json", request)


def _configuration(number: int) -> dict[str, Any]:
    return {
        "name": f"cvm-{number}",
        "image": f"dstack-emu-{DEFAULT.version}",
        "compose_file": _COMPOSE,
        "vcpu": 1,
        "memory": 2048,
        "disk_size": 20,
    }


def measure(effort: Effort) -> Iterator[tuple[int, Values]]:
    """Deploy CVMs by the VMM of a stack, and let each boot."""
    with ExitStack() as closing:
        spent = Spent()
        stack = growing_stack(closing, spent, "--vmm")
        vmm = Vmm(stack, [])
        yield 0, _totals(spent, stack)
        for size in effort.sizes():
            with spent.counting():
                vmm.grow(size)
            yield size, _totals(spent, stack) | _rates(spent, vmm, effort)
            stack.forget_calls()


def _totals(spent: Spent, stack: GrowingStack) -> Values:
    return spent.values() | {"processes": float(len(processes_of(stack.pid)))}


def _rates(spent: Spent, vmm: Vmm, effort: Effort) -> Values:
    with ExitStack() as closing:
        listing, asking = vmm.connect("Status", {}), vmm.connect("GetInfo", {"id": vmm.ids[-1]})
        quoting_all = quoting(closing, vmm.sockets())
        for connection in (listing, asking):
            closing.callback(connection.close)
            connection.call()
        return {
            "listed": len(vmm.ids) * spent.calls_per_cpu_second([listing], effort.seconds),
            "info": spent.calls_per_cpu_second([asking], effort.seconds),
            "quotes": spent.calls_per_cpu_second(quoting_all, effort.seconds),
        }


SUBJECT = Subject(
    "cvms",
    "CVMs of one VMM, with keys",
    "CVMs of the stack's VMM",
    largest=1000,  # as many as the VMM has CIDs for
    largest_quick=16,
    quantities=(
        Quantity("wall", "Time until all run and have keys", "s"),
        Quantity("cpu", "Processor time until all run and have keys", "CPU s"),
        Quantity("memory", "Memory", "MiB"),
        Quantity("listed", "Status, which lists all of them", "CVMs listed per CPU s", kind="each"),
        Quantity("info", "GetInfo of one of them", "calls per CPU s", kind="each"),
        Quantity("quotes", "GetQuote, of up to 64 of them in turn", "calls per CPU s", kind="each"),
        Quantity("descriptors", "Open files and sockets", "number", is_counted=True),
        Quantity("processes", "Processes of the stack, and of its CVMs", "number", is_counted=True),
    ),
    measure=measure,
    rounds=2,
)
