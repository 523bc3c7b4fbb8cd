"""The memory of a KMS after many GetAppKey, and its growth during the second half of them.

Most calls use kept-alive connections. One in twenty comes from a new caller, with its own key, certificate and
evidence: the caches of callers are what could grow.
"""

from collections.abc import Iterator
from contextlib import ExitStack

from bench.figure import Bar, Effort, Figure
from bench.kms import measured_kms
from bench.load import make_calls
from bench.processes import resident_memory
from dstack_emu.transport.tls import client_context

CONNECTIONS = 8
BATCH, NEW_CALLERS = 20, 1
BAR, GROWTH_BAR = 110.0, 3.0


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure the resident memory after all calls (a MiB is 2^20 bytes), and its growth since half of them."""
    with ExitStack() as stack:
        kms = stack.enter_context(measured_kms(effort.release))
        body, half = kms.app_key_request(), effort.calls // 2
        kept = [kms.connect(client_context(identity), "GetAppKey", body) for identity in kms.identities(CONNECTIONS)]
        for connection in kept:
            stack.callback(connection.close)
        held = []
        for _ in range(2):
            for identity in kms.identities(half // BATCH * NEW_CALLERS):
                make_calls(kept, BATCH - NEW_CALLERS)
                caller = kms.connect(client_context(identity), "GetAppKey", body)
                caller.call()
                caller.close()
            held.append(resident_memory(kms.pid) / 2**20)
    yield Figure("kms_memory", held[1], f"MiB after {effort.calls} calls", Bar(BAR, at_most=True))
    growth = max(held[1] - held[0], 0.0)
    yield Figure("kms_memory_growth", growth, f"MiB in the last {half}", Bar(GROWTH_BAR, at_most=True))
