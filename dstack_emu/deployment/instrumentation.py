"""The clock, the journal and the faults of a stack, and the functions that instrument its services with them."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from aiohttp import web

from dstack_emu.attest.proto import kms_pb2
from dstack_emu.attest.release import Release
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.deployment.clock import StackClock
from dstack_emu.deployment.config import JOURNAL_SIZE
from dstack_emu.kms_emu.auth_api import AuthApi, WebhookAuth
from dstack_emu.kms_emu.server import KmsInstruments
from dstack_emu.observability.aiohttp_middleware import aiohttp_middleware
from dstack_emu.observability.fault_effects import Stale
from dstack_emu.observability.fault_rules import FaultRules
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.metrics import Metrics
from dstack_emu.observability.middleware import HttpInstruments
from dstack_emu.observability.recorders import RecordingAuth, RecordingVerifier
from dstack_emu.observability.service_calls import ServiceCalls
from dstack_emu.observability.spans import headers_of, trace_headers
from dstack_emu.observability.tracing import Tracer
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.http import Application
from dstack_emu.transport.pccs_client import DEFAULT_TIMEOUT, PccsClient

if TYPE_CHECKING:
    from dstack_emu.chain.faulty import FaultyNode
    from dstack_emu.observability.interceptor import CallInterceptor
    from dstack_emu.observability.otlp import OtlpExport

App = TypeVar("App", Application, web.Application)


KMS_CALLS: Final = frozenset(
    (
        "/",
        "/finish",
        "/health",
        "/metrics",
        *(name for service in kms_pb2.DESCRIPTOR.services_by_name.values() for name in service.methods_by_name),
    )
)
"""The calls of a KMS in both phases and on all its listeners."""

GRPC_CALLS: Final = ("/grpc.health.v1.Health/Check",)
"""The calls that a service has over gRPC alone."""


class Instrumentation:
    """The instruments of a stack; `patience` is the timeout of its services in seconds (None: that of upstream)."""

    def __init__(
        self, seed: Seed, *, patience: float | None = None, kept: int = JOURNAL_SIZE, journal_file: Path | None = None
    ) -> None:
        self.clock = StackClock()
        self.on_clear: list[Callable[[], None]] = []
        self.faults = FaultRules(seed)
        self.journal = Journal(self.clock, kept=kept, file=journal_file)
        self.patience = patience
        self.calls = ServiceCalls()
        self.metrics = Metrics(self.calls.names)
        self.journal.count = self.metrics.count
        self.exported: OtlpExport | None = None
        self._seed = seed
        self._verifiers: dict[str, RecordingVerifier] = {}

    def export(self, export: "OtlpExport") -> None:
        """Export what the journal records from now on."""
        self.exported = export
        self.journal.tracer = Tracer(self._seed.derive("trace ids", 32), export.put)

    def instrument(self, service: str, app: App, *, stale: Stale | None = None) -> App:
        """Add journal and faults to the application of a service, before it is served."""
        instruments = HttpInstruments(service, self.journal, self.faults, stale=stale)
        if isinstance(app, Application):
            self.calls.add(service, app.paths)
            app.middlewares.insert(0, instruments.middleware)
        else:
            self.calls.add(service, [resource.canonical for resource in app.router.resources()])
            app.middlewares.insert(0, aiohttp_middleware(instruments))
        return app

    def instrument_chain(
        self, service: str, app: web.Application, methods: Collection[str], node: "FaultyNode"
    ) -> web.Application:
        """Add journal and faults to the JSON-RPC of a chain, by its methods, before it is served."""
        from dstack_emu.observability.chain_calls import (  # few stacks have a chain
            BATCH,
            UNKNOWN,
            chain_middleware,
            faults_of,
        )

        self.calls.add(service, [*methods, BATCH, UNKNOWN])
        app.middlewares.insert(
            0, chain_middleware(HttpInstruments(service, self.journal, self.faults, own=faults_of(node)), methods)
        )
        return app

    def interceptors(self, service: str) -> "list[CallInterceptor]":
        """Make the interceptors that add journal and faults to a service's gRPC."""
        from dstack_emu.observability.interceptor import CallInterceptor  # grpcio costs time and memory

        self.calls.add(service, GRPC_CALLS)
        return [CallInterceptor(service, self.journal, self.faults)]

    def kms_instruments(self, service: str, verifier: RecordingVerifier, to_source: MoreHeaders) -> KmsInstruments:
        """Make the instruments of a KMS; `to_source` are the headers of its requests to a KMS with keys."""
        self.calls.add(service, KMS_CALLS)
        middleware = HttpInstruments(service, self.journal, self.faults).middleware
        return KmsInstruments(
            (middleware,), verifier, headers_of(service), to_source, self.patience, now=lambda: self.clock.now()
        )

    def webhook_client(self, caller: str, url: str, *, own: bool, release: Release, timeout: float) -> AuthApi:
        """Make the client of a webhook for a KMS of that release.

        Only the stack's `own` webhooks get the header that connects calls in the journal; the others get those of a
        trace, if there is one. `timeout` is the KMS's, in
        seconds; nobody waits for longer than the stack's patience.
        """
        timeout = min(timeout, self.patience or timeout)
        if own:
            return WebhookAuth(url, timeout=timeout, headers=headers_of(caller), release=release)
        client = WebhookAuth(url, timeout=timeout, headers=trace_headers, release=release)
        return RecordingAuth(client, "webhook", caller, url, self.journal)

    # ---- verifiers

    def verifier(self, caller: str, pccs_url: str, anchor: TrustAnchor) -> RecordingVerifier:
        """Make the verifier of a part; the part must close and drop it when it ends."""
        patience, headers = self.patience or DEFAULT_TIMEOUT, headers_of(caller)
        pccs = PccsClient(
            pccs_url, timeout=patience, headers=headers, revalidates_at_once=True
        )  # it is the stack's own
        made = self._verifiers[caller] = RecordingVerifier(pccs, anchor, self.clock, self.journal)
        return made

    def drop_verifier(self, caller: str) -> None:
        """Remove the verifier of a part that has ended."""
        self._verifiers.pop(caller, None)

    def clear_caches(self) -> None:
        """Empty the caches of all verifiers, so that their next requests are made in full, and call `on_clear`."""
        for verifier in self._verifiers.values():
            verifier.forget()
        for forget in self.on_clear:
            forget()
