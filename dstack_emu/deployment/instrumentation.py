"""One stack's clock, journal and faults, and how its services are instrumented with them."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from aiohttp import web

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
from dstack_emu.observability.middleware import HttpInstruments
from dstack_emu.observability.recorders import RecordingAuth, RecordingVerifier
from dstack_emu.observability.spans import headers_of
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.http import Application
from dstack_emu.transport.pccs_client import DEFAULT_TIMEOUT, PccsClient

if TYPE_CHECKING:
    from dstack_emu.observability.interceptor import CallInterceptor

App = TypeVar("App", Application, web.Application)


class Instrumentation:
    """The instruments of one stack; `patience` is the seconds that its services wait (None: as long as upstream's)."""

    def __init__(
        self, seed: Seed, *, patience: float | None = None, kept: int = JOURNAL_SIZE, journal_file: Path | None = None
    ) -> None:
        self.clock = StackClock()
        self.faults = FaultRules(seed)
        self.journal = Journal(self.clock, kept=kept, file=journal_file)
        self.patience = patience
        self._verifiers: dict[str, RecordingVerifier] = {}

    def instrument(self, service: str, app: App, *, stale: Stale | None = None) -> App:
        """Put journal and faults around the application of a service, which is not served yet."""
        instruments = HttpInstruments(service, self.journal, self.faults, stale=stale)
        if isinstance(app, Application):
            app.middlewares.insert(0, instruments.middleware)
        else:
            app.middlewares.insert(0, aiohttp_middleware(instruments))
        return app

    def interceptors(self, service: str) -> "list[CallInterceptor]":
        """Make the interceptors that do the same for what a service serves by gRPC."""
        from dstack_emu.observability.interceptor import CallInterceptor  # grpcio costs time and memory: only if wanted

        return [CallInterceptor(service, self.journal, self.faults)]

    def kms_instruments(self, service: str, verifier: RecordingVerifier) -> KmsInstruments:
        """Make the instruments of a KMS."""
        middleware = HttpInstruments(service, self.journal, self.faults).middleware
        return KmsInstruments((middleware,), verifier, headers_of(service), self.patience, now=lambda: self.clock.now())

    def webhook_client(self, caller: str, url: str, *, own: bool, release: Release, timeout: float) -> AuthApi:
        """Make the client of a webhook, as a KMS of that release has it.

        A webhook is the stack's `own`, or a foreign one, which is sent no header of ours. `timeout` is the KMS's, in
        seconds; nobody waits for longer than the stack's patience.
        """
        timeout = min(timeout, self.patience or timeout)
        if own:
            return WebhookAuth(url, timeout=timeout, headers=headers_of(caller), release=release)
        return RecordingAuth(WebhookAuth(url, timeout=timeout, release=release), "webhook", caller, self.journal)

    # ---- verifiers

    def verifier(self, caller: str, pccs_url: str, anchor: TrustAnchor) -> RecordingVerifier:
        """Make the verifier of one part of the stack; the part closes it and drops it at its end."""
        patience, headers = self.patience or DEFAULT_TIMEOUT, headers_of(caller)
        pccs = PccsClient(
            pccs_url, timeout=patience, headers=headers, revalidates_at_once=True
        )  # it is the stack's own
        made = self._verifiers[caller] = RecordingVerifier(pccs, anchor, self.clock, self.journal)
        return made

    def drop_verifier(self, caller: str) -> None:
        """Forget the verifier of a part that has ended."""
        self._verifiers.pop(caller, None)

    def clear_caches(self) -> None:
        """Empty the caches of all verifiers, so that their next requests are made in full."""
        for verifier in self._verifiers.values():
            verifier.forget()
