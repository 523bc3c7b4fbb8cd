"""The KMS of a stack, each in its own trust domain, including those that are added while it runs."""

import shutil
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.authorization import KmsOnboarding, Phase
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.guest_config import local_key_provider
from dstack_emu.deployment.guests import RunningGuest, start_guest
from dstack_emu.deployment.kms_toml import KmsSettings
from dstack_emu.deployment.specs import KmsSpec
from dstack_emu.deployment.state import KmsState
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.server import KmsServer, KmsServerState
from dstack_emu.observability.spans import headers_of
from dstack_emu.simulator.app_keys import OwnKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.listen import reachable

PERMANENT: Final = ("src", "dst")
"""The KMS of every stack. The state folder keeps their files; other KMS start without files."""

KMS_DOMAIN: Final = "127.0.0.1"
"""The name in the KMS's certificates, an IP address, so that the printed URLs are valid under the KMS's root."""


class RunningKms:
    """A running KMS, with its own webhook and gRPC listeners if it has any.

    `measured` is its answer to GetAttestationInfo in the onboard phase, None if that was not requested.
    """

    server: KmsServer

    def __init__(self, context: StackContext, spec: KmsSpec, guest: RunningGuest) -> None:
        self.spec, self.guest = spec, guest
        self.measured: dict[str, Any] | None = None
        self._context = context
        self._exit = AsyncExitStack()

    @property
    def name(self) -> str:
        """Its name: `src` for the service `kms-src`."""
        return self.spec.name

    @property
    def url(self) -> str:
        """The URL of its service."""
        return self._context.urls[self.spec.service]

    @property
    def cert_dir(self) -> Path:
        """The folder of its keys."""
        return self.guest.folder / "certs"

    # ---- starting and stopping

    async def start(self, entropy_seed: Seed) -> None:
        """Start the KMS; raise `StackError` if it does not start."""
        context, service = self._context, self.spec.service
        self.guest.streams["kms"] = entropy = entropy_seed.stream("kms")
        webhook, is_own = await self._webhook()
        sock = context.ports.take(service)
        self._exit.callback(sock.close)
        grpc_socks = self._grpc_sockets()
        instrumentation, release = context.instrumentation, context.release_of(self.spec.release)
        try:
            config = KmsConfig.from_document(self._document(webhook, sock, grpc=bool(grpc_socks)), "kms.toml")
            timeout = config.core.auth_api.webhook.timeout
            self.server = KmsServer(
                config,
                f"unix:{self.guest.dstack_sock}",
                entropy=entropy,
                clock=instrumentation.clock,
                issue_clock=instrumentation.clock.issue,
                sock=sock,
                grpc_socks=grpc_socks,
                grpc_interceptors=instrumentation.interceptors(service) if grpc_socks else (),
                auth=instrumentation.webhook_client(service, webhook, own=is_own, release=release, timeout=timeout),
                instruments=instrumentation.kms_instruments(service, context.verifier(service)),
                release=release,
            )
            self._exit.push_async_callback(self.server.stop)
            with context.logs.of(service):
                await self.server.start()
        except (KmsError, ConfigError) as error:
            raise StackError(f"{service}: {error}") from error
        self._publish_url()

    def _publish_url(self) -> None:
        """Publish its URL, whose scheme depends on its phase."""
        self._context.urls[self.spec.service] = self.server.url

    def _document(self, webhook: str, sock: socket.socket, *, grpc: bool) -> dict[str, Any]:
        """Build its kms.toml."""
        context = self._context
        host, port = sock.getsockname()[:2]
        settings = KmsSettings(
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
        emulator = {
            "rpc_cert_evidence": self.spec.rpc_cert_evidence,
            "auth_api_cache": self._has_auth_api_cache(),
            "grpc": {"enabled": grpc},
        }
        return {**settings.document(), "emulator": emulator}

    def _has_auth_api_cache(self) -> bool:
        if self.spec.auth_api_cache is not None:
            return self.spec.auth_api_cache
        release = self._context.release_of(self.spec.release)
        return self._context.config.auth_api_cache and release.auth_api_cache_seconds > 0

    def _grpc_sockets(self) -> dict[str, socket.socket]:
        """Return the bound ports of its gRPC listeners, by their keys in kms.toml; none if the stack serves no gRPC."""
        context, socks = self._context, {}
        if not context.config.grpc:
            return {}
        for key, suffix in (("port", "grpc"), ("mtls_port", "grpc-mtls")):
            name = f"{self.spec.service}-{suffix}"
            socks[key] = context.ports.take(name)
            self._exit.callback(socks[key].close)
            context.grpc[name] = reachable(socks[key])
        return socks

    async def _webhook(self) -> tuple[str, bool]:
        """Return the URL of its webhook, and whether that is part of the stack; start the webhook if it is its own."""
        context, webhook = self._context, self.spec.webhook
        if webhook.startswith(("http://", "https://")):
            return webhook, webhook.rstrip("/") in context.urls.values()
        service = f"auth-{self.name if webhook == 'own' else webhook}"
        if webhook == "own" and service not in context.urls:
            context.policies.add(self.name)
            server = await context.serve_webhook(self.name, self.spec.release)
            self._exit.push_async_callback(server.close)
        if service not in context.urls:
            raise StackError(f"webhook: own, the name of a KMS, or a URL expected, got {webhook!r:.100}")
        return context.urls[service], True

    async def restart(self) -> None:
        """Start it anew at the same address with its keys; raise `StackError` if it does not run or start."""
        try:
            await self.server.restart()
        except KmsError as error:
            raise StackError(f"{self.spec.service}: {error}") from error
        self._publish_url()

    async def close(self) -> None:
        """Stop the KMS and its own webhook. Its trust domain continues."""
        await self._exit.aclose()
        self._context.instrumentation.drop_verifier(self.spec.service)

    # ---- its onboard phase

    @property
    def onboarding(self) -> KmsOnboarding:
        """The public interface of its onboard phase."""
        has_alias = self._context.release_of(self.spec.release).attestation_mode_alias
        return KmsOnboarding(self.spec.service, self.url, KMS_DOMAIN, self, headers_of("stack"), has_alias)

    async def current(self) -> Phase:
        """Return its phase; raise `StackError` if it does not run."""
        phase = self.server.phase
        if phase not in ("onboard", "runtime"):
            raise StackError(f"{self.spec.service} is {phase}")
        return phase

    async def reached_runtime(self) -> None:
        """Wait until the KMS answers over TLS; raise `StackError` if it ends before."""
        try:
            await self.server.reached_runtime()
        except KmsError as error:
            raise StackError(f"{self.spec.service}: {error}") from error
        self._publish_url()

    # ---- state

    def capture(self) -> KmsState:
        """Return the present state; raise `StackError` if it does not run."""
        try:
            server = self.server.capture()
        except KmsError as error:
            raise StackError(f"{self.spec.service} is {error}") from error
        return KmsState.model_construct(
            spec=self.spec,
            phase=server.phase,
            files=dict(server.files),
            own_boot_info=server.own_boot_info,
            requests=server.requests,
            failures=server.failures,
            measured=self.measured,
        )

    async def restore(self, state: KmsState) -> None:
        """Restore a captured state of a KMS with the same specification; raise `KmsError` if it does not start."""
        await self.server.restore(
            KmsServerState(state.phase, state.files, state.own_boot_info, state.requests, state.failures)
        )
        self._publish_url()
        self.measured = state.measured


async def start_kms(context: StackContext, spec: KmsSpec) -> RunningKms:
    """Start a KMS in a trust domain with keys of a local key provider, as a production KMS has.

    Raises `StackError` if it does not start.
    """
    if spec.name not in PERMANENT:
        delete_files(context, spec)
    seed = context.seed.child(f"kms {spec.name}")
    try:
        guest = await start_guest(context, spec.guest, f"agent-{spec.name}", seed)
    except GuestError as error:
        raise StackError(str(error)) from error
    kms = RunningKms(context, spec, guest)
    try:
        provider = local_key_provider(context.seed, spec.service)
        try:
            guest.domain.complete(provider)
        except GuestError as error:
            raise StackError(str(error)) from error
        sealing_key = seed.derive("sealing key", 32)
        own = OwnKeys.from_seed(guest.domain, sealing_key, provider, context.instrumentation.clock.issue)
        await guest.agent.provide(own.keys, own.issuer)
        await kms.start(seed)
    except BaseException:
        await stop_kms(context, kms)
        raise
    return kms


async def stop_kms(context: StackContext, kms: RunningKms) -> None:
    """Stop a KMS and its trust domain, and withdraw their services."""
    await kms.close()
    await kms.guest.close()
    for service in (kms.spec.service, kms.guest.service):
        context.withdraw(service)
    if kms.spec.webhook == "own":
        context.withdraw(f"auth-{kms.name}")
    if kms.name not in PERMANENT:
        delete_files(context, kms.spec)


def delete_files(context: StackContext, spec: KmsSpec) -> None:
    """Delete the keys of a KMS that was added while the stack ran, and its own policy."""
    shutil.rmtree(context.state / spec.service / "certs", ignore_errors=True)
    if spec.webhook == "own":
        context.policies.remove(spec.name)
