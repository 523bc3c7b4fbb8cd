"""GetAppKey over kept-alive mTLS connections, against a bare aiohttp server that makes the same inner calls.

Every call revalidates the collateral at the PCCS, and requests two decisions of the webhook. The reference makes the
same three requests by an aiohttp session, each over a connection of its own, and does nothing else; the KMS also
derives and signs keys.
"""

from collections.abc import Iterator
from contextlib import ExitStack

from bench.figure import Bar, Effort, Figure, alternate, median, ratio
from bench.kms import measured_kms
from bench.load import closed_loop
from bench.processes import CpuMeter
from bench.reference import bare_kms
from dstack_emu.transport.tls import client_context

CONNECTIONS = 8
BAR, SHARE_BAR = 1200, 0.9


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure calls per second, their ratio to the bare server's, and calls per second of the KMS's processor time."""
    with ExitStack() as stack:
        kms = stack.enter_context(measured_kms(effort.release))
        body, contexts = kms.app_key_request(), [client_context(identity) for identity in kms.identities(CONNECTIONS)]
        ours = [kms.connect(context, "GetAppKey", body) for context in contexts]
        port = stack.enter_context(bare_kms(kms, documents=1, questions=2, answer=ours[0].call()))
        bare = [kms.connect(context, "GetAppKey", body, port) for context in contexts]
        for connection in (*ours, *bare):
            stack.callback(connection.close)
        meter = CpuMeter(kms.pid, closed_loop(ours))
        rates, bare_rates = alternate(effort, meter, closed_loop(bare))
    yield Figure("getappkey_keepalive", median(rates), "calls/s", Bar(BAR))
    share = ratio(rates, bare_rates)
    yield Figure("getappkey_to_bare_server", share, "x bare aiohttp, 3 inner calls", Bar(SHARE_BAR))
    yield Figure("getappkey_per_cpu_second", median(meter.calls_per_cpu_second), "calls/CPU s of the KMS")
