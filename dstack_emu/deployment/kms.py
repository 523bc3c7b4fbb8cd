"""The KMS of a stack, each in its own trust domain, including those that are added while it runs."""

import shutil
import socket
from collections.abc import Callable
from typing import Any

from dstack_emu.deployment.authorization import Phase
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.foreign_kms import ForeignKms
from dstack_emu.deployment.guest_config import local_key_provider
from dstack_emu.deployment.guests import start_guest
from dstack_emu.deployment.running_kms import RunningKms
from dstack_emu.deployment.specs import KmsSpec
from dstack_emu.deployment.state import KmsState
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.server import KmsServer, KmsServerState
from dstack_emu.simulator.app_keys import OwnKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.listen import reachable
from dstack_emu.transport.localhost_socket import bound_host


class EmulatedKms(RunningKms):
    """A KMS of ours, in this process."""

    server: KmsServer

    @property
    def phase(self) -> str:
        """Its phase."""
        return self.server.phase

    @property
    def has_judged_itself(self) -> bool:
        """Whether it has verified its own evidence, which it does once in the life of its process."""
        return self.server.has_judged_itself

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
                instruments=instrumentation.kms_instruments(
                    service, context.verifier(service), context.headers_to_kms(service, *context.config.kms)
                ),
                release=release,
            )
            self._exit.push_async_callback(self.server.stop)
            with context.logs.of(service):
                await self.server.start()
        except (KmsError, ConfigError) as error:
            raise StackError(f"{service}: {error}") from error
        self._publish_url()

    def _publish_url(self) -> None:
        """Publish its URL, whose scheme depends on its phase; while it does not answer, the one before stays."""
        if self.server.is_serving:
            self._context.urls[self.spec.service] = self.server.url

    async def refresh(self) -> None:
        """Publish its URL anew: a user may have finished its onboard phase."""
        self._publish_url()

    def _document(self, webhook: str, sock: socket.socket, *, grpc: bool) -> dict[str, Any]:
        """Build its kms.toml."""
        emulator = {
            "rpc_cert_evidence": self.spec.rpc_cert_evidence,
            "rpc_cert_names": [*self._context.kms_names, *self._names_at_ingress],
            "auth_api_cache": self._has_auth_api_cache(),
            "grpc": {"enabled": grpc},
        }
        settings = self._settings(webhook, bound_host(sock), sock.getsockname()[1])
        return {**settings.document(), "emulator": emulator}

    @property
    def _names_at_ingress(self) -> list[str]:
        """The names by which the ingress passes clients through to it."""
        config = self._context.config
        return [f"*.{config.base_domain}"] if config.gateway else []

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

    async def ended(self) -> None:
        """Wait until it ends; raise the error it ended with, if any."""
        await self.server.wait()

    async def restart(self) -> None:
        """Start it anew at the same address with its keys; raise `StackError` if it does not run or start."""
        try:
            await self.server.restart()
        except KmsError as error:
            raise StackError(f"{self.spec.service}: {error}") from error
        self._publish_url()

    async def close(self) -> None:
        """Stop the KMS and its own webhook. Its trust domain continues."""
        await super().close()
        self._context.instrumentation.drop_verifier(self.spec.service)

    @property
    def admin_url(self) -> str | None:
        """The URL of its admin listener."""
        return self.server.admin_url

    # ---- its phase

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

    async def require_restorable(self, state: KmsState) -> None:
        """Raise `StackError` if a captured state cannot be restored here: that of another program has no keys."""
        if state.foreign_root is not None:
            raise StackError(f"{self.spec.service} was another program when the state was taken, which has its keys")

    async def restore(self, state: KmsState) -> None:
        """Restore a captured state of a KMS with the same specification; raise `KmsError` if it does not start."""
        await self.server.restore(
            KmsServerState(state.phase, state.files, state.own_boot_info, state.requests, state.failures)
        )
        self._publish_url()
        self.measured = state.measured


async def start_kms(
    context: StackContext, spec: KmsSpec, progress: Callable[[str], None], *, keeps_files: bool
) -> RunningKms:
    """Start a KMS in a trust domain with keys of a local key provider, as a production KMS has.

    It is ours, unless the stack's settings name another program. With `keeps_files` it has the keys and the policy that
    an earlier run left. Raises `StackError` if it does not start.
    """
    if not keeps_files:
        delete_files(context, spec)
    seed = context.seed.child(f"kms {spec.name}")
    try:
        guest = await start_guest(context, spec.guest, f"agent-{spec.name}", seed)
    except GuestError as error:
        raise StackError(str(error)) from error
    program = context.config.kms.get(spec.name)
    kms: RunningKms = EmulatedKms(context, spec, guest)
    if program is not None:
        kms = ForeignKms(context, spec, guest, program, progress)
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
        await stop_kms(context, kms, keeps_files=keeps_files)
        raise
    return kms


async def stop_kms(context: StackContext, kms: RunningKms, *, keeps_files: bool) -> None:
    """Stop a KMS and its trust domain, and withdraw their services."""
    await kms.close()
    await kms.guest.close()
    for service in (kms.spec.service, kms.guest.service):
        context.withdraw(service)
    if kms.spec.webhook == "own":
        context.withdraw(f"auth-{kms.name}")
    if not keeps_files:
        delete_files(context, kms.spec)


def delete_files(context: StackContext, spec: KmsSpec) -> None:
    """Delete the keys of a KMS that was added while the stack ran, and its own policy."""
    shutil.rmtree(context.state / spec.service / "certs", ignore_errors=True)
    if spec.webhook == "own":
        context.policies.remove(spec.name)
