"""The cost of the journal: GetAppKey of a stack with it and without it; and the duration of snapshot and revert.

Both sides are the same stack, switched by its control API between rounds. KMS, PCCS and webhook are one process here,
so a call costs more than in `getappkey`, and the journal records each of its inner calls.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from google.protobuf.empty_pb2 import Empty

from bench.figure import Bar, Effort, Figure, alternate, median, ratio
from bench.kms import TIMEOUT, call
from bench.load import Connection, closed_loop, connect_tls, post
from bench.processes import OTHER_CORE, SERVER_CORE, CpuMeter, on_core, running_stack
from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.issuing import load_authority
from dstack_emu.attest.kdf import load_p256_pem, p256_from_uniform
from dstack_emu.attest.proto import dstack_guest_pb2, kms_pb2
from dstack_emu.deployment.config import StackConfig
from dstack_emu.stack import Stack
from dstack_emu.transport.client import PrpcClient
from dstack_emu.transport.ratls import make_identity
from dstack_emu.transport.tls import Identity, client_context

CONNECTIONS = 8
BAR, REVERT_BAR = 0.95, 5.0


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure the ratio of the rates with and without the journal, and the milliseconds of a snapshot and a revert."""
    with ExitStack() as stack:
        pid, description = stack.enter_context(running_stack(SERVER_CORE, effort.release))
        stack.enter_context(on_core(OTHER_CORE))
        services, connections = description["services"], app_connections(stack, description)
        on, off = (CpuMeter(pid, closed_loop(connections)) for _ in range(2))
        # The difference is small, and the speed of the machine varies: more and shorter rounds.
        turns = replace(effort, rounds=effort.rounds * 20, seconds=effort.seconds / 8)
        rates, _ = alternate(turns, *(_switched(services["control"], *side) for side in (("on", on), ("off", off))))
    yield Figure("getappkey_with_journal", median(rates), "calls/s")
    # Per second of the stack's processor time, which other programs disturb less.
    share = ratio(on.calls_per_cpu_second, off.calls_per_cpu_second)
    yield Figure("journal_to_no_journal", share, "x calls/CPU s without", Bar(BAR))
    snapshots, reverts = asyncio.run(_going_back(effort.rounds * 4))
    yield Figure("snapshot", median(snapshots), "ms", Bar(REVERT_BAR, at_most=True))
    yield Figure("revert", median(reverts), "ms", Bar(REVERT_BAR, at_most=True))


def app_connections(stack: ExitStack, description: dict[str, Any], connections: int = CONNECTIONS) -> list[Connection]:
    """Connect to a stack's KMS as its app, for GetAppKey; the connections are closed when the ExitStack is left."""
    kms, agent = description["services"]["kms-src"], description["app"]["dstack_sock"]
    vm_config: str = json.loads(call(agent, "Info"))["vm_config"]
    request = post("/prpc/KMS.GetAppKey?json", json.dumps({"api_version": 1, "vm_config": vm_config}).encode())
    url, context = urlsplit(kms), client_context(asyncio.run(_identity(kms, agent)))
    address = (str(url.hostname), int(url.port or 0))
    made = [Connection(connect_tls(address, context), request) for _ in range(connections)]
    for connection in made:
        stack.callback(connection.close)
    return made


def _switched(control: str, turn: str, load: Callable[[float], float]) -> Callable[[float], float]:
    headers = {"Content-Type": "application/json"}

    def measured(seconds: float) -> float:
        request = urllib.request.Request(f"{control}/journal/{turn}", b"{}", headers, method="POST")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT).close()
        return load(seconds)

    return measured


async def _identity(kms: str, agent: str) -> Identity:
    """Make a certificate for the stack's app, with evidence."""
    async with PrpcClient(f"{kms}/prpc", timeout=TIMEOUT, ssl=client_context()) as client:
        temp = await client.call("GetTempCaCert", Empty(), kms_pb2.GetTempCaCertResponse)
    authority = load_authority(temp.temp_ca_cert, load_p256_pem(temp.temp_ca_key, "key"), "temporary CA")
    async with PrpcClient(agent, timeout=TIMEOUT) as client:

        async def attester(report_data: bytes) -> Attestation:
            question = dstack_guest_pb2.RawQuoteArgs(report_data=report_data)
            return decode((await client.call("Attest", question, dstack_guest_pb2.AttestResponse)).attestation)

        return await make_identity(authority, p256_from_uniform(b"journal" * 7), attester, int(time.time()))


async def _going_back(times: int) -> tuple[list[float], list[float]]:
    """Change what a test changes, and revert it; return the milliseconds of each snapshot and each revert."""
    snapshots, reverts = [], []
    async with Stack(StackConfig.on_free_ports()) as stack:
        control = stack.control
        for _ in range(times):
            began = time.perf_counter()
            control.snapshot()
            snapshots.append(1000 * (time.perf_counter() - began))
            control.deny("src", "app")
            control.set_platform("host of app", tcb_status="OutOfDate")
            control.set_clock(advance=3600)
            control.add_fault(service="auth-src", kind="status")
            control.emit_event("app", "event", "00")
            began = time.perf_counter()
            await control.revert()
            reverts.append(1000 * (time.perf_counter() - began))
    return snapshots, reverts
