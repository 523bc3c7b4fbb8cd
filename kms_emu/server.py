"""The KMS as a process: two phases on one port, plain HTTP while it is fresh, then TLS.

`/finish` ends the onboard phase; the same socket then serves the runtime phase. What each phase serves is in
`onboard_phase` and `runtime_phase`, on which sockets in `listeners`. Source: dstack `kms/src/main.rs` at 312dc605.
"""

import asyncio
import functools
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.certificate import load_der
from dstack_emu.attest.moment import iso
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.kms_emu.api_auth import KmsAuth
from dstack_emu.kms_emu.auth_api import AuthApi
from dstack_emu.kms_emu.config import Core, KmsConfig
from dstack_emu.kms_emu.dependencies import KmsDependencies
from dstack_emu.kms_emu.dependencies import KmsInstruments as KmsInstruments
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.keys import Entropy
from dstack_emu.kms_emu.listeners import KmsListeners
from dstack_emu.kms_emu.metrics import AttestationMetrics
from dstack_emu.kms_emu.onboard_service import OnboardService
from dstack_emu.kms_emu.rpc_certificate import reissue_certificates
from dstack_emu.kms_emu.service import KmsService
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.pccs_client import Clock

Phase = Literal["starting", "onboard", "runtime", "stopped"]


@dataclass(frozen=True, slots=True)
class KmsServerState:
    """The state of a running KMS: its phase, its files, and what it keeps in memory.

    `own_boot_info` is its own boot info, once it was measured; `requests` and `failures` are its metrics' counters.
    """

    phase: Literal["onboard", "runtime"]
    files: Mapping[str, bytes]
    own_boot_info: BootInfo | None = None
    requests: int = 0
    failures: int = 0


class KmsServer:
    """One KMS. `start` returns when it answers; `wait` until it ended, raising what it ended with; `stop` ends it.

    `agent_address` is where its guest agent listens; `clock` is what evidence is verified by, `issue_clock` what
    certificates are dated by (the same unless given); `sock` a bound socket to serve on; `environment` may have the
    tokens of its listeners; `auth` decides in place of the configured webhook. It closes both `auth` and a verifier
    that it was given. For gRPC, if it is switched on: `grpc_socks` are sockets that were bound already, by their keys
    in `emulator.grpc`; `grpc_interceptors` grpc.aio's. `release` is the dstack release that it is.
    """

    def __init__(
        self,
        config: KmsConfig,
        agent_address: str,
        *,
        entropy: Entropy,
        clock: Clock,
        issue_clock: Clock | None = None,
        sock: socket.socket | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        auth: AuthApi | None = None,
        grpc_socks: Mapping[str, socket.socket] | None = None,
        grpc_interceptors: Sequence[Any] = (),
        instruments: KmsInstruments | None = None,
        release: Release = DEFAULT,
    ) -> None:
        instruments = instruments or KmsInstruments()
        self.config = config
        self.phase: Phase = "starting"
        config.require_settings_of(release)
        self._auth = KmsAuth.of(config.core, environment, release)
        self._deps = KmsDependencies.build(
            config,
            agent_address,
            entropy=entropy,
            clock=clock,
            issue_clock=issue_clock,
            auth=auth,
            instruments=instruments,
            release=release,
        )
        self._listeners = KmsListeners(
            config,
            self._deps,
            sock=sock,
            auth=self._auth,
            grpc_socks=grpc_socks or {},
            grpc_interceptors=grpc_interceptors,
            middlewares=instruments.middlewares,
        )
        self._service: KmsService | None = None
        self._metrics = AttestationMetrics()
        self._leaving: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._runtime = asyncio.Event()

    @property
    def log(self) -> EventLog:
        """Return what it logs to."""
        return self._deps.log

    @property
    def url(self) -> str:
        """Return where it answers now; the scheme follows the phase."""
        return self._listeners.url

    @property
    def is_serving(self) -> bool:
        """Whether it answers: not while the phases change, nor after it ended."""
        return self._listeners.is_serving

    @property
    def runtime_address(self) -> str:
        """Return where it answers in the runtime phase, from its start on: `host:port`."""
        return self._listeners.runtime_address

    @property
    def grpc_targets(self) -> dict[str, str]:
        """Return where its gRPC listeners are, by their keys in `emulator.grpc`; empty if they are switched off."""
        return self._listeners.grpc_targets

    @property
    def admin_url(self) -> str | None:
        """Return where its admin listener answers in the runtime phase; None without one."""
        return self._listeners.admin_url

    async def start(self) -> None:
        """Bind, finish or discard what a crash left, and enter the phase that the stored keys call for."""
        self._ended = asyncio.get_running_loop().create_future()
        self._deps.folder.prepare()
        self._warn(self.config.core, self._auth)
        self._listeners.bind()
        await self._enter()

    async def _enter(self, onboard: bool | None = None) -> None:
        """Enter the phase that the stored keys call for, or the one that is named."""
        config = self.config.core.onboard
        fresh = config.enabled and not self._deps.folder.has_keys() if onboard is None else onboard
        try:
            self._listeners.bind_optional()
            if fresh and config.auto_bootstrap_domain:
                await OnboardService(self._deps, self._finish).auto_bootstrap(config.auto_bootstrap_domain)
            elif fresh:
                await self._enter_onboard()
                return
            await self._enter_runtime()
        except BaseException:
            await self.stop()
            raise

    def capture(self) -> KmsServerState:
        """Return the state as it is now; raise `KmsError` unless it is in its onboard or runtime phase."""
        if self.phase not in ("onboard", "runtime"):
            raise KmsError(f"{self.phase}: no earlier phase to return to")
        own = None if self._service is None else self._service.gate.own_boot_info
        files = self._deps.folder.contents()
        return KmsServerState(self.phase, files, own, self._metrics.requests, self._metrics.failures)

    async def restore(self, state: KmsServerState) -> None:
        """Put a captured state back. If phase or files differ it restarts at the same address, as a new process.

        So the RPC certificate, which may prove what its agent showed at an earlier restart, is issued anew.
        """
        folder = self._deps.folder
        is_same = folder.contents() == state.files
        if self.phase == state.phase == "onboard":
            if not is_same:
                folder.overwrite(state.files)
        elif self.phase != state.phase or not is_same:
            await self._restart(state.files, onboard=state.phase == "onboard")
        if self._service is not None:
            self._service.gate.own_boot_info = state.own_boot_info
            self._service.forget_answers()
        self._metrics.requests, self._metrics.failures = state.requests, state.failures

    @property
    def has_judged_itself(self) -> bool:
        """Whether it has verified its own evidence, which it does once."""
        return self._service is not None and self._service.gate.own_boot_info is not None

    async def restart(self) -> None:
        """Begin again at the same address with the present files, as a new process; raise `KmsError` if it cannot.

        One that did not start anew before can be restarted, too.
        """
        if self.phase == "starting":
            raise KmsError(f"{self.phase}: it does not run")
        onboard = None if self.phase == "stopped" else self.phase == "onboard"
        await self._restart(self._deps.folder.contents(), onboard=onboard)

    async def _restart(self, files: Mapping[str, bytes], *, onboard: bool | None) -> None:
        """End what is served, put other files in place, and begin again at the same address in that phase."""
        await self._cancel_leaving()
        self._leaving = None
        self._runtime.clear()
        where = self._listeners.addresses()
        try:
            await self._close(keeps_ports=True)
            self._deps.folder.overwrite(files)
            self._deps.folder.prepare()
            self._service, self._metrics = None, AttestationMetrics()
            self._listeners.rebind(where)
        except BaseException:
            await self._listeners.close()
            raise
        if self._ended is not None and self._ended.done():  # it did not start anew before
            self._ended = asyncio.get_running_loop().create_future()
        await self._enter(onboard)

    def _warn(self, core: Core, auth: KmsAuth) -> None:
        """Log the settings that make this KMS weaker than it looks."""
        warn = functools.partial(self.log.warning, "weakened")
        if core.auth_api.type == "dev":
            reason = "no webhook decides: every KMS and every app whose evidence is valid is allowed"
            warn(setting='core.auth_api.type = "dev"', reason=reason)
        if not core.image.verify:
            reason = "os image verification is disabled; os_image_hash is believed as the caller claims it"
            warn(setting="core.image.verify = false", reason=reason)
        if not core.enforce_self_authorization:
            reason = "self-authorization is disabled; trusted RPCs do not depend on this KMS's own attestation"
            warn(setting="core.enforce_self_authorization = false", reason=reason)
        if not core.attest_rpc_cert:
            warn(setting="core.attest_rpc_cert = false", reason="the RPC certificate carries no attestation")
        if early := _before_root(self._deps):
            self.log.warning("early clock", reason=early)
        for setting, reason in self.config.ineffective(self._deps.release):
            self.log.warning("no effect", setting=setting, reason=reason)
        if core.pccs_url and not self._deps.release.core_pccs_url:
            reason = "this release knows core.attestation.urls.pccs alone; the emulator reads either"
            self.log.warning("old key", setting="core.pccs_url", reason=reason)
        if core.admin.enabled and auth.admin.is_open:
            warn(setting="core.admin.insecure_no_auth = true", reason="the admin listener requires no credential")

    async def reached_runtime(self) -> None:
        """Wait until the runtime phase answers; raise what ended the KMS before."""
        waiter = asyncio.ensure_future(self._runtime.wait())
        assert self._ended is not None  # noqa: S101 - start() made it
        await asyncio.wait((waiter, self._ended), return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self._ended.done():
            self._ended.result()

    async def wait(self) -> None:
        """Wait until the KMS ended; raise the error it ended with, if any."""
        assert self._ended is not None  # noqa: S101 - start() made it
        await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """End it: answers in progress get a short while, then everything is closed."""
        if self._leaving is not asyncio.current_task():
            await self._cancel_leaving()
        await self._close()
        self._end(None)

    async def _cancel_leaving(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)

    async def _close(self, *, keeps_ports: bool = False) -> None:
        self.phase = "stopped"
        await self._listeners.close(keeps_ports=keeps_ports)
        await self._deps.close()

    def _end(self, error: BaseException | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
            self._ended.exception()  # retrieved here: nobody has to be waiting

    # ---- the phases

    async def _enter_onboard(self) -> None:
        onboard = self.config.core.onboard
        if self._deps.release.onboard_token and self._auth.onboard.is_open and not _is_loopback(onboard.address):
            reason = f"whoever reaches {onboard.address} can bootstrap this KMS or end its onboard phase"
            self.log.warning("weakened", setting="core.onboard.auth_token is not set", reason=reason)
        await self._listeners.enter_onboard(OnboardService(self._deps, self._finish), self._finish)
        self.phase = "onboard"
        self.log.info("onboard phase", url=self.url)

    def _finish(self) -> None:
        if self._leaving is None:
            self.log.info("finish", has_keys=self._deps.folder.has_keys())
            # Before the answer is sent: a client that has it, and connects, waits for TLS.
            self._listeners.stop_listening()
            self._leaving = asyncio.create_task(self._leave_onboard(), name="kms leaves the onboard phase")

    async def _leave_onboard(self) -> None:
        try:
            await self._listeners.leave_onboard()  # after the answers in progress, /finish's own among them
            if not self._deps.folder.has_keys():
                raise KmsError("Failed to onboard")
            await self._enter_runtime()
        except Exception as error:  # the task's edge: `wait` raises it
            self.log.error("ended", reason=error)
            await self._close()
            self._end(error)

    async def _enter_runtime(self) -> None:
        kms_keys = await reissue_certificates(self._deps)
        self._service = KmsService(self._deps, kms_keys)
        await self._listeners.enter_runtime(self._service, self._metrics)
        self.phase = "runtime"
        self._runtime.set()
        self.log.info("runtime phase", url=self.url, domain=kms_keys.domain)


def _before_root(deps: KmsDependencies) -> str:
    """Say that the clock is before the root of verification, as that of a machine that was set back; else empty."""
    if deps.verifier.anchor.root_ca is None:
        return ""
    now, first = deps.clock(), load_der(deps.verifier.anchor.root_ca).not_valid_before_utc
    if now >= first.timestamp():
        return ""
    return f"the clock of this KMS is at {iso(now)}, before the root under which it verifies, which is of {iso(first)}"


def _is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
