"""The trust domains of a stack and their agents, including those that are added while it runs."""

import asyncio
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.deployment.agent_listeners import AgentAddresses, AgentListeners, Instruments, SocketFile
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.reach import AGENT_PORT, FindEndpoint, endpoint_of
from dstack_emu.deployment.specs import GuestSpec
from dstack_emu.deployment.state import GuestState, KeysState
from dstack_emu.deployment.trust_domains import boot_domain
from dstack_emu.gateway.routing import Endpoint
from dstack_emu.observability.spans import entered, headers_of, remote_trace
from dstack_emu.simulator.agent import GuestAgent, ProvidedKeys
from dstack_emu.simulator.app_keys import AppKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.gateway_keys import Registration
from dstack_emu.simulator.guest_boot import KmsIssuer, fetch_keys
from dstack_emu.simulator.guest_files import (
    DECRYPTED_ENV,
    decrypt_environment,
    remove_environment,
    write_environment,
)
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import TrustDomain, TrustDomainState
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.ratls import TIMEOUT as KMS_TIMEOUT
from dstack_emu.transport.ratls import RaTlsClient

if TYPE_CHECKING:
    from dstack_emu.deployment.gateway_registration import GatewayMembership
    from dstack_emu.simulator.gateway_client import GatewayClient

log = logging.getLogger("dstack_emu.stack")

_OPTION = "--state DIR"
"""The option that sets the folder of a stack's socket files."""

_FOLDER_MODE = 0o755
"""The mode of the folder of the sockets: a container may mount it for any user. The state folder above is private."""


class RunningGuest:
    """A trust domain whose agent runs. `boot` fetches keys from a KMS; `close` stops the agent.

    `service` is the name of its agent's service in the stack; `streams` are its random streams. `encrypted_env` is the
    encrypted environment of its deployment, `environment` what of it was decrypted at its boot. `boot_error` is why it
    runs without a gateway, empty if it has one or needs none. `find_program` says where its ports are;
    `when_booted` is awaited once it has keys.
    """

    def __init__(self, context: StackContext, spec: GuestSpec, service: str, domain: TrustDomain, seed: Seed) -> None:
        self.spec, self.service, self.domain = spec, service, domain
        self.streams = {name: seed.stream(name) for name in ("agent", "boot", "gateway")}
        self.agent = GuestAgent(domain, self.streams["agent"])
        self.encrypted_env = decode_hex(spec.encrypted_env)
        self.environment: Mapping[str, str] = {}
        self.boot_error = ""
        self.find_program: FindEndpoint = self._on_app_host
        self.when_booted: Callable[[], Awaitable[None]] | None = None
        self.booting = asyncio.Lock()
        """Held while it boots: two boots at once would measure into one log."""
        self._context = context
        self._membership: GatewayMembership | None = None
        self._issuer: KmsIssuer | None = None
        self._kms = ""
        self._listeners: AgentListeners | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name

    @property
    def source(self) -> str:
        """The name of the KMS from which it has keys; empty if it has none, or its own."""
        return self._kms

    @property
    def folder(self) -> Path:
        """The folder of its socket files."""
        return self._context.state / self.name

    @property
    def dstack_sock(self) -> Path:
        """The socket file of DstackGuest."""
        return self.folder / "dstack.sock"

    @property
    def tappd_sock(self) -> Path:
        """The socket file of Tappd."""
        return self.folder / "tappd.sock"

    @property
    def url(self) -> str:
        """The URL of its agent's TCP port."""
        return "" if self._listeners is None else self._listeners.url

    # ---- running

    async def listen(self) -> None:
        """Let the agent listen on two socket files and a TCP port, and for gRPC if the stack serves it."""
        context, grpc = self._context, self._context.config.grpc
        self.folder.mkdir(exist_ok=True)
        if self.folder.stat().st_uid == os.geteuid():  # not if it is a volume that belongs to another user
            self.folder.chmod(_FOLDER_MODE)
        addresses = AgentAddresses(
            tcp=context.ports.take(self.service),
            dstack_sock=SocketFile(self.dstack_sock, _OPTION),
            tappd_sock=SocketFile(self.tappd_sock, _OPTION),
            grpc=context.ports.take(f"{self.service}-grpc") if grpc else None,
            grpc_sock=SocketFile(self.folder / "grpc.sock", _OPTION) if grpc else None,
        )
        instruments = Instruments(
            lambda app: context.instrumentation.instrument(self.service, app),
            context.instrumentation.interceptors(self.service) if grpc else (),
        )
        with context.logs.of(self.service):
            self._listeners = await AgentListeners.open(self.agent, addresses, instruments)
        context.urls[self.service] = self._listeners.url
        context.reach.add(self.domain.instance_id, self.endpoint)
        if grpc:
            context.grpc[f"{self.service}-grpc"] = self._listeners.grpc_target

    async def boot(self, kms: Sequence[str], verifier: AttestationVerifier) -> None:
        """Fetch keys from these KMS, tried in order, whose evidence `verifier` verifies, and run with them.

        Raises `GuestError` with the refusal; then the trust domain is unchanged.
        """
        instrumentation = self._context.instrumentation
        before, registration = self.domain.capture(), self._registration
        positions = {name: stream.capture() for name, stream in self.streams.items() if name != "agent"}
        call = instrumentation.journal.begin(self.name, "Boot", None, 0, "stack", remote_trace())
        status, error = 400, ""
        try:
            with entered(call):
                await self._fetch_keys(kms, verifier)
                if self.when_booted is not None:
                    await self.when_booted()
            status = 200
        except GuestError as refusal:
            self.domain.restore(before)
            await self._restore_gateway(registration)
            for name, position in positions.items():
                self.streams[name].restore(position)
            error = instrumentation.journal.scrub(str(refusal))
            raise
        finally:
            instrumentation.journal.end(call, status, error)

    async def _fetch_keys(self, kms: Sequence[str], verifier: AttestationVerifier) -> None:
        names = {self._context.urls[f"kms-{name}"]: name for name in kms}
        keys, issuer = await fetch_keys(
            self.domain,
            tuple(names),
            verifier,
            self.streams["boot"],
            self._context.instrumentation.clock.issue(),
            patience=self._kms_timeout,
            headers=self._context.headers_to_kms(self.name, *kms),
        )
        try:
            environment = decrypt_environment(self.domain, self.encrypted_env, keys)
            await self._register(keys, issuer)
            await self.agent.provide(keys, issuer)
        except BaseException:
            await issuer.close()
            raise
        self._write_environment(environment)
        await self._use(issuer, names[issuer.url.removesuffix("/prpc")])

    # ---- its gateway

    def endpoint(self, port: int) -> Endpoint | None:
        """Return what listens at one of its ports: its agent at 8090, and its program at the others."""
        return endpoint_of(self.url) if port == AGENT_PORT else self.find_program(port)

    def _on_app_host(self, port: int) -> Endpoint | None:
        host = self._context.app_host
        return None if host is None else (host, port)

    async def _register(self, keys: AppKeys, issuer: KmsIssuer) -> None:
        """Register at the stack's gateway, if it has one and the app wants it."""
        self.boot_error = ""
        if self._context.gateways and self.domain.manifest.has_gateway:
            client = self._gateway_client(keys, issuer)
            self.boot_error = await self._joined().join(client, self.domain.release)
            if self.boot_error:
                self._log_gateway(self.boot_error)

    def _joined(self) -> "GatewayMembership":
        """Return what keeps it registered."""
        from dstack_emu.deployment.gateway_registration import GatewayMembership  # most stacks have no gateway

        if self._membership is None:
            clock, gateways = self._context.instrumentation.clock, self._context.gateways
            self._membership = GatewayMembership(lambda: gateways, clock, self._log_gateway)
        return self._membership

    @property
    def _registration(self) -> Registration | None:
        return None if self._membership is None else self._membership.capture()

    async def _leave_gateway(self) -> None:
        if self._membership is not None:
            await self._membership.leave()

    def _gateway_client(self, keys: AppKeys, issuer: KmsIssuer) -> "GatewayClient":
        from dstack_emu.simulator.gateway_client import GatewayClient  # likewise

        clock, entropy = self._context.instrumentation.clock, self.streams["gateway"]
        headers, timeout = headers_of(self.name), self._kms_timeout
        return GatewayClient(self.domain, keys, issuer, entropy, clock, self.folder, timeout=timeout, headers=headers)

    def _log_gateway(self, text: str) -> None:
        log.warning("the trust domain %s: dstack-gateway: %s", self.name, text)

    # ---- its environment

    @property
    def decrypted_env(self) -> Path | None:
        """The file of its decrypted environment, None if it has none, or no keys yet."""
        path = self.folder / DECRYPTED_ENV
        return path if self.encrypted_env and path.exists() else None

    def _write_environment(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        if self.encrypted_env:
            write_environment(self.folder, environment)

    def _remove_environment(self) -> None:
        self.environment = {}
        remove_environment(self.folder)

    def power_cycle(self) -> None:
        """Boot the trust domain again until it needs keys; its agent keeps its keys."""
        self.domain.restore(boot_domain(self._context, self.spec).capture())

    @property
    def _kms_timeout(self) -> float:
        return self._context.instrumentation.patience or KMS_TIMEOUT

    async def _use(self, issuer: KmsIssuer | None, kms: str) -> None:
        """Use the issuer of a KMS from now on, and close the connections of the previous one."""
        before, self._issuer, self._kms = self._issuer, issuer, kms
        if before is not None and before is not issuer:
            await before.close()

    async def close(self) -> None:
        """Stop listening, and remove what must not outlast the trust domain."""
        self._remove_environment()
        self._context.reach.remove(self.domain.instance_id, self.endpoint)
        await self._leave_gateway()
        if self._listeners is not None:
            await self._listeners.close()
        await self._use(None, "")

    # ---- state

    def capture(self) -> GuestState:
        """Return the present state."""
        domain = self.domain.capture()
        streams = {name: stream.capture() for name, stream in self.streams.items()}
        keys = self._captured_keys()
        return GuestState.model_construct(
            spec=self.spec,
            rtmr3=domain.rtmr3,
            events=domain.events,
            streams=streams,
            keys=keys,
            encrypted_env=self.encrypted_env,
            gateway=self._registration,
        )

    def _captured_keys(self) -> KeysState | None:
        """Return the keys from a KMS; keys that were generated here are determined by the seed."""
        provided = self.agent.capture()
        if provided is None or self._issuer is None:
            return None
        return KeysState.model_construct(
            keys=provided.keys,
            identity=self._issuer.identity,
            kms=self._kms,
            demo_certificate=provided.demo_certificate,
        )

    async def restore(self, state: GuestState) -> None:
        """Restore a captured state of a trust domain with the same specification."""
        self.domain.restore(TrustDomainState(state.rtmr3, state.events))
        for name, stream in self.streams.items():
            stream.restore(state.streams.get(name, 0))
        encrypted, known = state.encrypted_env, self.encrypted_env
        self.encrypted_env = decode_hex(self.spec.encrypted_env) if encrypted is None else encrypted
        if self._captured_keys() != state.keys or self.encrypted_env != known:
            await self._restore_keys(state.keys)
        if self._registration != state.gateway:
            await self._restore_gateway(state.gateway)

    async def _restore_keys(self, state: KeysState | None) -> None:
        if state is None:
            self.agent.restore(None)
            self._remove_environment()
            await self._use(None, "")
            return
        url = f"{self._context.urls[f'kms-{state.kms}']}/prpc"
        headers = self._context.headers_to_kms(self.name, state.kms)
        connect = functools.partial(RaTlsClient, timeout=self._kms_timeout, headers=headers)
        self._write_environment(decrypt_environment(self.domain, self.encrypted_env, state.keys))
        issuer = KmsIssuer.of(self.domain, url, state.identity, state.keys.ca_cert, connect=connect)
        self.agent.restore(ProvidedKeys(state.keys, issuer, state.demo_certificate))
        await self._use(issuer, state.kms)

    async def _restore_gateway(self, registration: Registration | None) -> None:
        """Register with what it had, once it has its keys again."""
        provided = self.agent.capture()
        await self._leave_gateway()
        if registration is not None and provided is not None and self._issuer is not None:
            client = self._gateway_client(provided.keys, self._issuer)
            client.restore(registration)
            await self._joined().restore(client)


async def start_guest(context: StackContext, spec: GuestSpec, service: str, seed: Seed | None = None) -> RunningGuest:
    """Boot a trust domain and start its agent; raise `GuestError` if it cannot boot.

    Its random streams are derived from `seed`, by default from a seed of its own.
    """
    try:
        domain = boot_domain(context, spec)
    except FormatError as error:
        raise GuestError(f"trust domain {spec.name}: {error}") from error
    guest = RunningGuest(context, spec, service, domain, seed or context.seed.child(f"guest {spec.name}"))
    try:
        await guest.listen()
    except BaseException:
        await guest.close()
        raise
    return guest
