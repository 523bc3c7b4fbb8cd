"""GetAppKey over a new connection for each call, each with a certificate, a key and evidence of its own.

Nothing can be known of such a caller: TLS handshake, parsing and the whole verification are due. The reference is
`dcap-qvl`'s verification of one quote alone.
"""

import asyncio
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import dcap_qvl

from bench.figure import Bar, Effort, Figure, median, rate_of, ratio
from bench.kms import measured_kms, tls
from bench.processes import SERVER_CORE, on_core
from bench.reference import ask_evidence

CALLERS = 250
"""New callers for each second of a round."""
THREADS = 8
BAR = 0.25


def measure(effort: Effort) -> Iterator[Figure]:
    """Calls a second, and as a share of bare verifications."""
    with measured_kms() as kms, ThreadPoolExecutor(THREADS) as pool:
        body, now, root = kms.app_key_request(), int(time.time()), kms.root_der
        app = asyncio.run(ask_evidence(kms, kms.stack["app"]["dstack_sock"]))
        verify = rate_of(lambda: dcap_qvl.verify_with_root_ca(app.quote, app.collateral, root, now))

        def call(context: ssl.SSLContext) -> None:
            connection = kms.connect(context, "GetAppKey", body)
            try:
                connection.call()
            finally:
                connection.close()

        def new_callers(seconds: float) -> float:
            contexts = [tls(identity) for identity in kms.identities(int(CALLERS * seconds))]
            began = time.perf_counter()
            list(pool.map(call, contexts))
            return len(contexts) / (time.perf_counter() - began)

        new_callers(effort.seconds / 2)
        rates, bare_rates = list[float](), list[float]()
        for _ in range(effort.rounds):
            rates.append(new_callers(effort.seconds))
            with on_core(SERVER_CORE):  # the KMS is idle meanwhile
                bare_rates.append(verify(effort.seconds))
    yield Figure("getappkey_new_connection", median(rates), "calls/s")
    yield Figure("getappkey_new_to_dcap_qvl", ratio(rates, bare_rates), "x bare dcap-qvl", Bar(BAR))
