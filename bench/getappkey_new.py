"""GetAppKey over a new connection for each call, each with its own certificate, key and evidence.

No cache can help such a caller: TLS handshake, parsing and the complete verification are necessary. The reference of
the bar is `dcap-qvl`'s verification of one quote. Another reference is a bare aiohttp server that accepts the same
connections, and requests and verifies nothing. If client and webhook on the other core are the bottleneck, calls per
second of the KMS's processor time show its capacity.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import dcap_qvl

from bench.figure import Bar, Effort, Figure, alternate, median, rate_of, ratio
from bench.kms import MeasuredKms, measured_kms
from bench.processes import SERVER_CORE, cpu_seconds, on_core
from bench.reference import bare_kms, request_evidence
from dstack_emu.transport.tls import client_context

CALLERS = 250
"""Number of new callers for each second of a round."""
THREADS = 32
"""Enough that the KMS never waits for them: they share one core with webhook and PCCS."""
BAR = 0.20


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure calls per second, and their ratio to bare verifications."""
    with ExitStack() as stack:
        kms = stack.enter_context(measured_kms(effort.release))
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        body, now, root = kms.app_key_request(), int(time.time()), kms.root_der
        app = asyncio.run(request_evidence(kms, kms.stack["app"]["dstack_sock"]))
        verify = rate_of(lambda: dcap_qvl.verify_with_root_ca(app.quote, app.collateral, root, now))

        def verify_on_its_core(seconds: float) -> float:
            with on_core(SERVER_CORE):  # the servers are idle during this
                return verify(seconds)

        port = stack.enter_context(bare_kms(kms, documents=0, questions=0, answer=b"{}"))
        per_cpu_second: list[float] = []
        # Many rounds, because the speed of the machine varies: a disturbed round must not decide.
        turns = replace(effort, rounds=effort.rounds * 3, seconds=effort.seconds * 0.6)
        rates, verified, bare = alternate(
            turns,
            _new_callers(kms, pool, body, per_cpu_second),
            verify_on_its_core,
            _new_callers(kms, pool, body, port=port),
        )
    yield Figure("getappkey_new_connection", median(rates), "calls/s")
    yield Figure("getappkey_new_to_dcap_qvl", ratio(rates, verified), "x bare dcap-qvl", Bar(BAR))
    yield Figure("getappkey_new_to_bare_server", ratio(rates, bare), "x bare aiohttp, 0 inner calls")
    yield Figure("getappkey_new_per_cpu_second", median(per_cpu_second), "calls/CPU s of the KMS")


def _new_callers(
    kms: MeasuredKms,
    pool: ThreadPoolExecutor,
    body: bytes,
    per_cpu_second: list[float] | None = None,
    *,
    port: int | None = None,
) -> Callable[[float], float]:
    def call(context: ssl.SSLContext) -> None:
        connection = kms.connect(context, "GetAppKey", body, port)
        try:
            connection.call()
        finally:
            connection.close()

    def measured(seconds: float) -> float:
        contexts = [client_context(identity) for identity in kms.identities(max(THREADS, int(CALLERS * seconds)))]
        used, began = cpu_seconds(kms.pid), time.perf_counter()
        list(pool.map(call, contexts))
        took = time.perf_counter() - began
        if per_cpu_second is not None:
            per_cpu_second.append(len(contexts) / (cpu_seconds(kms.pid) - used))
        return len(contexts) / took

    return measured
