"""A running KMS of a stack, our own or another program, as the deployment and its control see it."""

from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.authorization import KmsOnboarding, PhaseSource
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.kms_toml import KmsSettings
from dstack_emu.deployment.reach import KMS_PORT, endpoint_of
from dstack_emu.deployment.specs import KmsSpec
from dstack_emu.deployment.state import KmsState
from dstack_emu.gateway.routing import Endpoint
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.validation import suggestion

PERMANENT: Final = ("src", "dst")
"""The KMS of every stack. Their files are never deleted; those of another KMS are, when it is removed."""


class RunningKms(PhaseSource, ABC):
    """A running KMS, with its own webhook and gRPC listeners if it has any.

    `measured` is its answer to GetAttestationInfo in the onboard phase, None if that was not requested.
    """

    def __init__(self, context: StackContext, spec: KmsSpec, guest: RunningGuest) -> None:
        self.spec, self.guest = spec, guest
        self.measured: dict[str, Any] | None = None
        self._context = context
        self._exit = AsyncExitStack()
        guest.find_program = self._endpoint

    @property
    def name(self) -> str:
        """Its name: `src` for the service `kms-src`."""
        return self.spec.name

    @property
    def url(self) -> str:
        """The URL of its service."""
        return self._context.urls[self.spec.service]

    def _endpoint(self, port: int) -> Endpoint | None:
        """Return where it is reached at a port of its trust domain."""
        return endpoint_of(self.url) if port == KMS_PORT and self.spec.service in self._context.urls else None

    @property
    def admin_url(self) -> str | None:
        """The URL of its admin listener, if it has one and that is known."""
        return None

    @property
    def cert_dir(self) -> Path:
        """The folder of its keys."""
        return self.guest.folder / "certs"

    @property
    def domain(self) -> str:
        """The name in its certificate; the others are an addition of the emulator."""
        return self._context.kms_names[0]

    @property
    def files(self) -> dict[str, str]:
        """The files and the agent's address, for the user who starts the KMS; empty unless it is another program."""
        return {}

    @property
    @abstractmethod
    def phase(self) -> str:
        """Its phase as far as it is known without a request: `onboard`, `runtime`, or why it is in neither."""

    @property
    @abstractmethod
    def has_judged_itself(self) -> bool:
        """Whether it has verified its own evidence, which it does once in the life of its process."""

    async def refresh(self) -> None:
        """Find out its phase, if that takes a request. A KMS that does not answer is no error."""

    # ---- starting and stopping

    @abstractmethod
    async def start(self, entropy_seed: Seed) -> None:
        """Start the KMS; raise `StackError` if it does not start."""

    async def ready(self) -> None:
        """Wait until it answers; raise `StackError` if it does not."""

    @abstractmethod
    async def ended(self) -> None:
        """Wait until it ends; raise the error it ended with, if any."""

    @abstractmethod
    async def restart(self) -> None:
        """Start it anew at the same address with its keys; raise `StackError` if it does not run or start."""

    def printed(self) -> list[str]:
        """Return the lines that another program has printed; our own logs to the stack's log."""
        return []

    async def close(self) -> None:
        """Stop the KMS and its own webhook. Its trust domain continues."""
        await self._exit.aclose()

    def _settings(self, webhook: str, host: str, port: int) -> KmsSettings:
        """Return what its kms.toml says."""
        context = self._context
        return KmsSettings(
            host=host,
            port=port,
            cert_dir=self.cert_dir,
            image_cache=context.state / "images",
            pccs=context.urls["pccs"],
            root_ca=context.root_ca,
            webhook=webhook,
            site_name=f"dstack-emu {self.name}",
            settings=self.spec.settings,
            release=context.release_of(self.spec.release),
        )

    async def _webhook(self) -> tuple[str, bool]:
        """Return the URL of its webhook, and whether that is part of the stack; start the webhook if it is its own."""
        context, webhook = self._context, self.spec.webhook
        if self.spec.asks_foreign_webhook:
            return webhook, webhook.rstrip("/") in context.urls.values()
        service = f"auth-{self.name if webhook == 'own' else webhook}"
        if webhook == "own" and service not in context.urls:
            context.policies.add(self.name)
            server = await context.serve_webhook(self.name, self.spec.release)
            self._exit.push_async_callback(server.close)
        if service not in context.urls:
            near = suggestion(webhook, ("own", *context.policies.paths))
            raise StackError(f"webhook: own, the name of a KMS, or a URL expected, got {webhook!r:.100}{near}")
        return context.urls[service], True

    # ---- its onboard phase

    @property
    def _token(self) -> str:
        """The token in its kms.toml that its onboard phase demands, empty if it demands none."""
        onboard = self.spec.settings.get("onboard")
        token = onboard.get("auth_token") if isinstance(onboard, dict) else None
        return token.strip() if isinstance(token, str) else ""

    @property
    def onboarding(self) -> KmsOnboarding:
        """The public interface of its onboard phase."""
        has_alias, token = self._context.release_of(self.spec.release).attestation_mode_alias, self._token
        headers = self._context.headers_to_kms("stack", self.name)
        return KmsOnboarding(self.spec.service, self.url, self.domain, self, headers, has_alias, token)

    # ---- state

    @abstractmethod
    def capture(self) -> KmsState:
        """Return the present state; raise `StackError` if it does not run."""

    async def require_restorable(self, state: KmsState) -> None:
        """Raise `StackError` if a captured state cannot be restored here."""

    @abstractmethod
    async def restore(self, state: KmsState) -> None:
        """Restore a captured state of a KMS with the same specification; raise `KmsError` if it does not start."""
