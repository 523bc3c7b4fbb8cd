"""The cost of `core.image.verify`: GetAppKey with and without it, and the check alone, with and without its cache.

Two KMS that differ in that key are called alternately. The figure is the number of calls per second of processor time,
because the cores that they run on differ, too. The check alone is timed for new VM configs (each with another memory
size and document), and for one that was just checked.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.figure import Bar, Effort, Figure, alternate, median, ratio
from bench.kms import measured_kms
from bench.load import closed_loop
from bench.processes import SERVER_CORE, CpuMeter, on_core
from bench.quotes import booted_domain
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.verify import VerifiedAttestation, VerifiedQuote
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.tls import client_context

CONNECTIONS = 8
SHARE_BAR = 0.85
FIRST_BAR, KNOWN_BAR = 2.0, 0.1
"""Milliseconds."""

FIRST_TIMES = 40


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure the ratio of GetAppKey's rates with and without it, and the milliseconds of the check."""
    with ExitStack() as stack:
        meters = []
        for verifies in (False, True):
            kms = stack.enter_context(measured_kms(effort.release, verify_images=verifies))
            body = kms.app_key_request()
            contexts = [client_context(identity) for identity in kms.identities(CONNECTIONS)]
            connections = [kms.connect(context, "GetAppKey", body) for context in contexts]
            for connection in connections:
                stack.callback(connection.close)
            meters.append(CpuMeter(kms.pid, closed_loop(connections)))
        alternate(effort, *meters)
    believing, verifying = (meter.calls_per_cpu_second for meter in meters)
    yield Figure("image_verify_to_without", ratio(verifying, believing), "x GetAppKey without it", Bar(SHARE_BAR))
    first, known = _check_milliseconds()
    yield Figure("image_verify_first_time", first, "ms", Bar(FIRST_BAR, at_most=True))
    yield Figure("image_verify_known", known, "ms", Bar(KNOWN_BAR, at_most=True))


def _check_milliseconds() -> tuple[float, float]:
    """Time the check on boots of images that were not seen before, and on the same again."""
    _, domain = booted_domain()
    report, boots = domain.report(bytes(64)), []
    for number in range(FIRST_TIMES):
        image = OsImage.from_seed(Seed.of(f"bench {number}").derive)
        vm_config = image.vm_config(memory_size=(4 + number) << 30)
        registers, log = image.boot(vm_config)
        quoted = replace(
            report, mr_td=registers.mrtd, rt_mr0=registers.rtmr0, rt_mr1=registers.rtmr1, rt_mr2=registers.rtmr2
        )
        evidence = Attestation(b"", log, (), bytes(64), vm_config.to_json())
        boots.append(VerifiedAttestation(evidence, VerifiedQuote("UpToDate", (), bytes(16), quoted)))
    with on_core(SERVER_CORE):
        return asyncio.run(_check_twice(boots))


async def _check_twice(boots: Sequence[VerifiedAttestation]) -> tuple[float, float]:
    store = ImageStore(Path("unused"), "http://127.0.0.1/unused", 1)
    taken: list[list[float]] = [[], []]
    for times in taken:
        for evidence in boots:
            began = time.perf_counter()
            await store.verify(evidence)
            times.append((time.perf_counter() - began) * 1000)
    return median(taken[0]), median(taken[1])
