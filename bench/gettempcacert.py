"""GetTempCaCert over kept-alive TLS, against a bare aiohttp server that also calls the webhook.

The caller has no certificate, so there is no evidence: the only inner call is the KMS's self check.
"""

from collections.abc import Iterator
from contextlib import ExitStack

from bench.figure import Bar, Effort, Figure, alternate, median, ratio
from bench.kms import measured_kms
from bench.load import closed_loop
from bench.reference import bare_kms
from dstack_emu.transport.tls import client_context

CONNECTIONS = 8
SHARE_BAR = 0.9


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure calls per second, and their ratio to the bare server's."""
    with ExitStack() as stack:
        kms = stack.enter_context(measured_kms(effort.release))
        ours = [kms.connect(client_context(), "GetTempCaCert") for _ in range(CONNECTIONS)]
        port = stack.enter_context(bare_kms(kms, documents=0, questions=1, answer=ours[0].call()))
        bare = [kms.connect(client_context(), "GetTempCaCert", port=port) for _ in range(CONNECTIONS)]
        for connection in (*ours, *bare):
            stack.callback(connection.close)
        rates, bare_rates = alternate(effort, closed_loop(ours), closed_loop(bare))
    yield Figure("gettempcacert_keepalive", median(rates), "calls/s")
    share = ratio(rates, bare_rates)
    yield Figure("gettempcacert_to_bare_server", share, "x bare aiohttp, 1 inner call", Bar(SHARE_BAR))
