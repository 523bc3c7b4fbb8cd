"""One stack's clock, journal and faults, and how they come in around its services."""

from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.deployment.clock import StackClock
from dstack_emu.deployment.config import JOURNAL_SIZE
from dstack_emu.kms_emu.auth_api import TIMEOUT as WEBHOOK_TIMEOUT
from dstack_emu.kms_emu.auth_api import AuthApi, WebhookAuth
from dstack_emu.kms_emu.server import Surroundings
from dstack_emu.observability.fault_effects import Stale
from dstack_emu.observability.fault_rules import Faults
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.middleware import front
from dstack_emu.observability.recorders import NotedAuth, NotedVerifier
from dstack_emu.observability.spans import headers_of
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.pccs_client import DEFAULT_TIMEOUT, PccsClient

if TYPE_CHECKING:
    from dstack_emu.observability.interceptor import GrpcFront


class World:
    """What is around the services of one stack; `patience` is how long they wait (None: as long as upstream)."""

    def __init__(
        self, seed: Seed, *, patience: float | None = None, kept: int = JOURNAL_SIZE, journal_file: Path | None = None
    ) -> None:
        self.clock = StackClock()
        self.faults = Faults(seed)
        self.journal = Journal(self.clock, kept=kept, file=journal_file)
        self.patience = patience
        self.verifiers: dict[str, NotedVerifier] = {}

    def around(self, service: str, app: web.Application, *, stale: Stale | None = None) -> web.Application:
        """Put journal and faults before a service's application, which is not served yet."""
        app.middlewares.insert(0, front(service, self.journal, self.faults, stale=stale))
        return app

    def verifier(self, caller: str, pccs_url: str, anchor: TrustAnchor) -> NotedVerifier:
        """Make who judges for one part of the stack, which closes it."""
        pccs = PccsClient(pccs_url, timeout=self.patience or DEFAULT_TIMEOUT, headers=headers_of(caller))
        made = self.verifiers[caller] = NotedVerifier(pccs, anchor, self.clock, self.journal)
        return made

    def webhook(self, caller: str, url: str, *, own: bool) -> AuthApi:
        """Make the client of a webhook: one of the stack's `own`, or somebody else's, who is sent no header of ours."""
        timeout = self.patience or WEBHOOK_TIMEOUT
        if own:
            return WebhookAuth(url, timeout=timeout, headers=headers_of(caller))
        return NotedAuth(WebhookAuth(url, timeout=timeout), "webhook", caller, self.journal)

    def surroundings(self, service: str, verifier: NotedVerifier) -> Surroundings:
        """What a KMS of the stack is given."""
        before = front(service, self.journal, self.faults)
        return Surroundings((before,), verifier, headers_of(service), self.patience)

    def interceptors(self, service: str) -> "list[GrpcFront]":
        """The same as `around` for what a service serves by gRPC."""
        from dstack_emu.observability.interceptor import GrpcFront  # costs time and memory that nobody else should pay

        return [GrpcFront(service, self.journal, self.faults)]

    def forget(self) -> None:
        """Empty the caches of who judges: what is asked next is asked in full."""
        for verifier in self.verifiers.values():
            verifier.forget()
