"""The whole deployment in one process: PCCS, verifier, two webhooks, two KMS in their trust domains, and an app's.

All parts communicate over real sockets and the public interfaces of a real deployment: the KMS state their measurements
on request, policy files allow them, and the app gets its keys by GetAppKey. Other services, such as the control API,
are added as an `Extension`.
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from dstack_emu.deployment import policy_files
from dstack_emu.deployment.added_parts import AddedParts, naming
from dstack_emu.deployment.authorization import Progress
from dstack_emu.deployment.config import DESCRIPTION_FILE, StackConfig
from dstack_emu.deployment.deployer import Deployer
from dstack_emu.deployment.description import describe, measured_by
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.extension import Extension, Listeners
from dstack_emu.deployment.gateway_names import GATEWAY
from dstack_emu.deployment.guests import RunningGuest, start_guest
from dstack_emu.deployment.kms import start_kms, stop_kms
from dstack_emu.deployment.own_app import RememberedApp
from dstack_emu.deployment.preparation import prepare, write_state
from dstack_emu.deployment.running_kms import PERMANENT, RunningKms
from dstack_emu.deployment.service_logs import ServiceLogs
from dstack_emu.deployment.shared_services import serve_pccs, serve_verifier
from dstack_emu.deployment.specs import GuestSpec, KmsSpec
from dstack_emu.deployment.stack_authorization import StackAuthorization
from dstack_emu.deployment.state import RestorableService, RunningGateway
from dstack_emu.deployment.supervision import Supervisor
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.intel import Intel
from dstack_emu.transport.open_calls import named_by
from dstack_emu.vmm.state import FleetState

SERVICES: Final = frozenset(
    {"pccs", "verifier", "auth-src", "auth-dst", "agent-src", "agent-dst", "kms-src", "kms-dst", "app"}
)
"""The services of a deployment without extensions."""

log = logging.getLogger("dstack_emu.stack")


class Deployment:
    """One deployment. Enter it to start it; leaving it stops every part.

    When a part fails meanwhile, the block is cancelled and ends with a `PartEndedError`. Once it is entered, `services`
    has URLs and `grpc` targets by name, `intel` and `root_ca` the trust root, `kms` and `guests` the running parts,
    `kms_info` what both KMS measure, `app.domain` the app, `machines` those of its VMM, `gateway` what its gateway has
    registered, and `logs` what the parts log. `progress` is told of each step.
    """

    def __init__(self, config: StackConfig | None = None, progress: Progress = log.info) -> None:
        self.config = config or StackConfig()
        self.logs = ServiceLogs()
        self.guests: dict[str, RunningGuest] = {}
        self.kms: dict[str, RunningKms] = {}
        self.machines: RestorableService[FleetState] | None = None
        self.gateway: RunningGateway | None = None
        self.progress = progress
        self._extensions: list[Extension] = []
        self._exit = AsyncExitStack()
        self._supervisor: Supervisor | None = None
        self._added: AddedParts | None = None

    def extend(self, extension: Extension) -> None:
        """Add an extension, before the deployment is entered."""
        self._extensions.append(extension)

    async def __aenter__(self) -> Self:
        self.logs.attach()
        self._exit.callback(self.logs.detach)
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        self._supervisor = Supervisor({self.kms[name].spec.service: self.kms[name].ended for name in PERMANENT})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._supervisor is None:
            raise RuntimeError("the stack was not entered")
        self._supervisor.stop()
        await self._exit.aclose()
        self._supervisor.raise_failure(kind)

    # ---- starting

    async def _start(self) -> None:
        services = SERVICES.union(*(extension.names for extension in self._extensions))
        self.context, remembered = prepare(self.config, self.logs, services, self._exit)
        self._before = RememberedApp.of(remembered)
        self.context.instrumentation.calls.domains = self.guests.keys
        self._exit.enter_context(named_by(self._names))
        write_state(self.root_ca, self.intel.root_pem)
        self._close_at_end(await serve_pccs(self.context))
        self._app_verifier = self.context.verifier("app")
        self._exit.push_async_callback(self._app_verifier.pccs.close)
        self._close_at_end(await serve_verifier(self.context, self._exit))
        self._place_policies()
        if self.context.chain is not None:
            self.progress("starting the chain")
            await self.context.chain.deploy()
            self._close_at_end(await self.context.serve_chain(self.context.chain))
        for name in PERMANENT:
            if name in self.config.webhooks:
                continue
            self._close_at_end(await self.context.serve_webhook(name))
        self._exit.push_async_callback(self._close_parts)
        await self._start_parts(remembered.get("kms") or {})
        await self._start_extensions()
        # Lift all faults before anything closes: a server waits for its calls, and a fault could block them.
        self._exit.callback(self.context.instrumentation.faults.clear)
        if self.config.fresh:
            await self._flow.measure_fresh_kms()
        else:
            await self._authorize()
        await self._bring_back(AddedParts(self.state))
        write_state(self.state / DESCRIPTION_FILE, json.dumps(self.description()) + "\n")
        for extension in self._extensions:
            extension.became_ready()

    def _names(self) -> dict[str, str]:
        """Return the name of each service by its URL, and of each gRPC listener by its address."""
        return {address: name for name, address in (*self.services.items(), *self.grpc.items())}

    # ---- its parts

    def _close_at_end(self, server: Listeners) -> None:
        self._exit.push_async_callback(server.close)

    def _place_policies(self) -> None:
        policies = self.context.policies
        try:
            policy_files.place(policies.paths.values())
        except OSError as error:
            raise StackError(f"the policies folder {policies.folder} cannot be written: {error.strerror}") from error

    async def _start_parts(self, measured: Mapping[str, Any]) -> None:
        for name in PERMANENT:
            self.progress(f"starting kms-{name}")
            kms = await self.start_kms(KmsSpec(name=name, webhook=self.context.webhook_of(name)))
            # A KMS with keys does not state its measurements; those of an earlier run are in the state folder.
            kms.measured = measured.get(name)
        self.progress("starting the app's trust domain")
        await self.start_guest(self.context.app.spec)
        await asyncio.gather(*(kms.ready() for kms in self.kms.values()))
        if dropped := self.context.app.dropped:
            log.warning(
                "allowed_envs of the app-compose does not name %s: the app's guest drops what it does not name",
                ", ".join(map(repr, dropped)),
            )

    async def _start_extensions(self) -> None:
        for extension in self._extensions:
            self._exit.push_async_callback(extension.close)
            name = extension.names[0]
            with self.logs.of(name):
                self._close_at_end(await extension.start(self.context.ports.take(name)))

    async def _close_parts(self) -> None:
        self.remember_added()
        for kms in reversed(self.kms.values()):
            await kms.close()
        for guest in reversed(self.guests.values()):
            await guest.close()

    async def start_guest(self, spec: GuestSpec, service: str | None = None) -> RunningGuest:
        """Start a trust domain without keys, whose agent answers; raise `GuestError` if it cannot boot.

        `service` is the name of its agent's service, by default its own name.
        """
        if spec.name in self.guests:
            raise GuestError(f"there is a trust domain {spec.name} already")
        guest = self.guests[spec.name] = await start_guest(self.context, spec, service or spec.name)
        self._remember(guest)
        return guest

    async def stop_guest(self, guest: RunningGuest) -> None:
        """Stop a trust domain and forget it."""
        await guest.close()
        self.context.withdraw(guest.service)
        self.guests.pop(guest.name, None)
        self._forget(guest.name)

    async def start_kms(self, spec: KmsSpec, *, comes_back: bool = False) -> RunningKms:
        """Start a KMS in a trust domain of its own; raise `StackError` if it does not start.

        It has no keys, unless it is one of every stack, or comes back with those that an earlier run left.
        """
        if spec.name in self.kms:
            raise StackError(f"there is a KMS {spec.name} already")
        if spec.service in self.guests:
            raise StackError(f"there is a trust domain {spec.service} already")
        keeps_files = comes_back or spec.name in PERMANENT
        kms = await start_kms(self.context, spec, self.progress, keeps_files=keeps_files)
        self.kms[spec.name], self.guests[spec.service] = kms, kms.guest
        if self._added is not None:
            self._added.put_kms(kms)
        return kms

    async def stop_kms(self, kms: RunningKms) -> None:
        """Stop a KMS with its trust domain, and forget both."""
        await stop_kms(self.context, kms, keeps_files=kms.name in PERMANENT)
        self.guests.pop(kms.guest.name, None)
        self.kms.pop(kms.name, None)
        self._forget(kms.spec.service)

    # ---- parts that were added in an earlier run

    def remember_added(self) -> None:
        """Record in the state folder which trust domains and KMS were added, and which of them have keys."""
        if self._added is not None:
            self._added.replace(self.kms.values(), self.guests.values())

    def _remember(self, guest: RunningGuest) -> None:
        """Record one trust domain."""
        if self._added is not None:
            self._added.put_guest(guest)

    def _forget(self, name: str) -> None:
        if self._added is not None:
            self._added.drop(name)

    async def _bring_back(self, added: AddedParts) -> None:
        """Start the parts that were added in an earlier run; raise `StackError` if one does not start.

        A trust domain that had keys fetches them again, and runs without if the KMS refuses.
        """
        for kms in added.kms():
            with naming(kms.path):
                self.progress(f"starting {kms.part.spec.service} again")
                (await self.start_kms(kms.part.spec, comes_back=True)).measured = kms.part.measured
        for guest in added.guests():
            with naming(guest.path):
                self.progress(f"starting the trust domain {guest.part.spec.name} again")
                await self._boot_again(await self.start_guest(guest.part.spec), guest.part.kms)
        if self.config.state is not None:
            self._added = added
            self.remember_added()

    async def _boot_again(self, guest: RunningGuest, kms: str) -> None:
        if not kms:
            return
        try:
            if kms not in self.kms:
                raise GuestError(f"kms-{kms} was removed")
            await self.boot(guest, (kms,))
        except GuestError as error:
            log.warning("the trust domain %s has no keys now: %s", guest.name, error)

    # ---- keys

    async def _authorize(self) -> None:
        """Carry out the whole flow: measure, allow, bootstrap, onboard, finish, and boot the app."""
        flow = self._flow
        measured = await flow.give_keys()
        for extension in self._extensions:
            await extension.keys_are_released()
        self.progress("booting the app through kms-src")
        try:
            await self.boot(self.app, ("src",))
        except GuestError as error:
            await flow.app_was_refused(error, is_new=bool(measured))

    @property
    def _flow(self) -> StackAuthorization:
        gateway = self.guests.get(GATEWAY)
        domain = None if gateway is None else gateway.domain
        return StackAuthorization(self.context, self.kms, self.app, domain, self._before, self.progress)

    async def boot(self, guest: RunningGuest, kms: Sequence[str]) -> None:
        """Let a trust domain fetch its keys from the KMS of these names, tried in order.

        Raises `GuestError` with the refusal. The variables of the stack's own app are encrypted before its first boot.
        """
        if guest is self.app and self.context.app.variables and not guest.encrypted_env:
            source = next((name for name in kms if self.kms[name].phase == "runtime"), kms[0])
            guest.encrypted_env = await Deployer(self.context).encrypt(guest.domain.app_id, self.kms[source])
        await guest.boot(kms, self._app_verifier)
        self._remember(guest)

    # ---- its description

    @property
    def app(self) -> RunningGuest:
        """The trust domain of the stack's own app."""
        return self.guests[self.context.app.spec.name]

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.context.state

    @property
    def intel(self) -> Intel:
        """The emulated Intel, with its platforms."""
        return self.context.intel

    @property
    def root_ca(self) -> Path:
        """The file with the emulated Intel's root certificate (PEM)."""
        return self.context.root_ca

    @property
    def kms_ca(self) -> Path:
        """The file with the KMS's root certificate (PEM), once there are keys."""
        return self.state / "kms-src" / "certs" / ROOT_CA_CERT

    @property
    def services(self) -> dict[str, str]:
        """The URL of each service."""
        return self.context.urls

    @property
    def grpc(self) -> dict[str, str]:
        """The `host:port` of each gRPC listener."""
        return self.context.grpc

    @property
    def policies(self) -> dict[str, Path]:
        """The policy file of each KMS that has one of its own."""
        return self.context.policies.paths

    def log_lines(self, service: str, level: int) -> list[str]:
        """Return what a service has logged at a level or above; of a KMS that is another program, what it printed."""
        printed = [line for kms in self.kms.values() if kms.spec.service == service for line in kms.printed()]
        return printed or self.logs.lines(service, level)

    @property
    def kms_info(self) -> dict[str, dict[str, Any]]:
        """The answer of each KMS to GetAttestationInfo."""
        return measured_by(self.kms)

    def description(self) -> dict[str, Any]:
        """Return everything a client needs to know, as `--json` prints it."""
        return describe(self.context, self.kms, self.app, self.kms_ca)
