"""One stack's clock, journal and faults, and how they come in around its services."""

from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.deployment.clock import StackClock
from dstack_emu.deployment.config import JOURNAL_SIZE
from dstack_emu.kms_emu.auth_api import TIMEOUT as WEBHOOK_TIMEOUT
from dstack_emu.kms_emu.auth_api import AuthApi, WebhookAuth
from dstack_emu.kms_emu.server import KmsInstruments
from dstack_emu.observability.fault_effects import Stale
from dstack_emu.observability.fault_rules import FaultRules
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.middleware import journal_middleware
from dstack_emu.observability.recorders import RecordingAuth, RecordingVerifier
from dstack_emu.observability.spans import headers_of
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.pccs_client import DEFAULT_TIMEOUT, PccsClient

if TYPE_CHECKING:
    from dstack_emu.observability.interceptor import CallInterceptor


class Instrumentation:
    """What is around the services of one stack; `patience` is how long they wait (None: as long as upstream)."""

    def __init__(
        self, seed: Seed, *, patience: float | None = None, kept: int = JOURNAL_SIZE, journal_file: Path | None = None
    ) -> None:
        self.clock = StackClock()
        self.faults = FaultRules(seed)
        self.journal = Journal(self.clock, kept=kept, file=journal_file)
        self.patience = patience
        self.verifiers: dict[str, RecordingVerifier] = {}

    def around(self, service: str, app: web.Application, *, stale: Stale | None = None) -> web.Application:
        """Put journal and faults before a service's application, which is not served yet."""
        app.middlewares.insert(0, journal_middleware(service, self.journal, self.faults, stale=stale))
        return app

    def verifier(self, caller: str, pccs_url: str, anchor: TrustAnchor) -> RecordingVerifier:
        """Make who judges for one part of the stack, which closes it."""
        pccs = PccsClient(pccs_url, timeout=self.patience or DEFAULT_TIMEOUT, headers=headers_of(caller))
        made = self.verifiers[caller] = RecordingVerifier(pccs, anchor, self.clock, self.journal)
        return made

    def webhook(self, caller: str, url: str, *, own: bool) -> AuthApi:
        """Make the client of a webhook: one of the stack's `own`, or somebody else's, who is sent no header of ours."""
        timeout = self.patience or WEBHOOK_TIMEOUT
        if own:
            return WebhookAuth(url, timeout=timeout, headers=headers_of(caller))
        return RecordingAuth(WebhookAuth(url, timeout=timeout), "webhook", caller, self.journal)

    def surroundings(self, service: str, verifier: RecordingVerifier) -> KmsInstruments:
        """What a KMS of the stack is given."""
        before = journal_middleware(service, self.journal, self.faults)
        return KmsInstruments((before,), verifier, headers_of(service), self.patience)

    def interceptors(self, service: str) -> "list[CallInterceptor]":
        """The same as `around` for what a service serves by gRPC."""
        from dstack_emu.observability.interceptor import (
            CallInterceptor,  # costs time and memory that nobody else should pay
        )

        return [CallInterceptor(service, self.journal, self.faults)]

    def forget(self) -> None:
        """Empty the caches of who judges: what is asked next is asked in full."""
        for verifier in self.verifiers.values():
            verifier.forget()
