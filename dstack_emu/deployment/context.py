"""The objects that the parts of a stack share. Each part gets them; none refers to the deployment that starts it."""

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dstack_emu.attest.release import Release, release
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.auth.policy import Contract, parse_contract
from dstack_emu.auth.server import simple_app
from dstack_emu.deployment.chain_webhooks import AskedChain, eth_settings, given_chain
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.gateway_names import GATEWAY
from dstack_emu.deployment.guest_network import HOST_IN_GUEST, LOOPBACK, is_loopback
from dstack_emu.deployment.instrumentation import App, Instrumentation
from dstack_emu.deployment.kms_names import kms_names
from dstack_emu.deployment.own_app import OwnApp
from dstack_emu.deployment.policy_files import PolicyFiles
from dstack_emu.deployment.reach import InstanceReach
from dstack_emu.deployment.service_logs import ServiceLogs
from dstack_emu.observability.decisions import decision_recorder
from dstack_emu.observability.fault_effects import Stale
from dstack_emu.observability.recorders import RecordingVerifier
from dstack_emu.observability.spans import headers_of, trace_headers
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.listen import Server, bind_tcp, serve

if TYPE_CHECKING:
    from dstack_emu.deployment.stack_chain import StackChain


class ServicePorts:
    """The TCP sockets of the services. Those of a stack's first services are bound before any of them starts."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._bound: dict[str, socket.socket] = {}

    def bind(self, service: str, port: int, *, setting: str) -> None:
        """Bind a service's port (0: a free one); raise `ListenError`, which names `setting`, if it is taken."""
        self._bound[service] = bind_tcp(self._host, port, setting=setting)

    def take(self, service: str) -> socket.socket:
        """Return the bound socket of a service, or a new one on a free port; the caller closes it."""
        return self._bound.pop(service, None) or bind_tcp(self._host, 0)

    def port(self, service: str) -> int:
        """Return the port of a service whose bound socket was not taken yet."""
        number: int = self._bound[service].getsockname()[1]
        return number

    def close(self) -> None:
        """Close the sockets that were not taken."""
        for sock in self._bound.values():
            sock.close()


CHAIN: Final = "chain"
"""The service of the stack's own chain."""


@dataclass(frozen=True, slots=True)
class StackContext:
    """One stack as its parts see it: settings, trust root, instruments, and the addresses of its services.

    `chain` is its own chain, if it has one. `reach` knows where its instances listen, and `gateways` are the URLs at
    which they register. `urls` has the URL of each service, of the ingress its `host:port`, `grpc` the `host:port` of
    each gRPC listener, both by name.
    """

    config: StackConfig
    state: Path
    seed: Seed
    intel: Intel
    image: OsImage
    instrumentation: Instrumentation
    logs: ServiceLogs
    ports: ServicePorts
    policies: PolicyFiles
    app: OwnApp
    chain: "StackChain | None" = None
    reach: InstanceReach = field(default_factory=InstanceReach)
    gateways: list[str] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)
    grpc: dict[str, str] = field(default_factory=dict)

    @property
    def app_host(self) -> str | None:
        """The host of what listens at the ports of trust domains that are no machines; None if that is not known."""
        host = self.config.host
        return self.config.app_host or (LOOPBACK if is_loopback(host) else None)

    def joins_gateway(self, name: str) -> bool:
        """Return whether a trust domain whose app-compose is generated has `gateway_enabled` in it."""
        return self.config.gateway and name != GATEWAY and not name.startswith("kms-")

    @property
    def kms_names(self) -> tuple[str, ...]:
        """The names in the certificates of its KMS; the first one is the domain. Raises `StackError`.

        Machines of a VMM also use the name of their host.
        """
        names = kms_names(self.config.host, self.config.domains)
        return (*names, HOST_IN_GUEST) if self.config.vmm and HOST_IN_GUEST not in names else names

    def require_names(self) -> None:
        """Raise `StackError` if the certificates of its KMS cannot have the configured names."""
        kms_names(self.config.host, self.config.domains)

    def release_of(self, name: str | None) -> Release:
        """Return the dstack release of a part: the named one, or the stack's."""
        return release(name or self.config.release)

    @property
    def root_ca(self) -> Path:
        """The file with the emulated Intel's root certificate (PEM)."""
        return self.state / "root-ca.pem"

    async def serve(self, service: str, app: App, *, stale: Stale | None = None) -> Server:
        """Serve an instrumented application on the service's port; the caller closes the server."""
        return await self._serve(service, self.instrumentation.instrument(service, app, stale=stale))

    async def serve_chain(self, chain: "StackChain") -> Server:
        """Serve the JSON-RPC of the stack's own chain; the caller closes the server."""
        return await self._serve(
            CHAIN, self.instrumentation.instrument_chain(CHAIN, chain.app(), chain.methods, chain.faulty_node)
        )

    async def _serve(self, service: str, app: App) -> Server:
        with self.logs.of(service):
            server = await serve(app, self.ports.take(service))
        self.urls[service] = server.url
        return server

    def withdraw(self, service: str) -> None:
        """Remove the addresses of a service that has ended."""
        self.urls.pop(service, None)
        self.instrumentation.calls.drop(service)
        for suffix in ("grpc", "grpc-mtls"):
            self.grpc.pop(f"{service}-{suffix}", None)

    def contract_of(self, release_name: str | None = None) -> Contract:
        """Return the contract of a KMS's own webhook: the stack's, or that of the KMS's release."""
        given = self.config.auth_contract
        return self.release_of(release_name).auth_contract if given is None else parse_contract(given)

    async def serve_webhook(self, kms: str, release_name: str | None = None) -> Server:
        """Serve the webhook of the KMS of that name, which is of that release.

        It is auth-simple over its policy, or auth-eth-bun.
        """
        if self.config.asks_chain(kms):
            from dstack_emu.auth.eth import KeptHead  # few stacks ask a chain: the others start sooner
            from dstack_emu.auth.eth_server import eth_app

            headers = trace_headers if self.chain is None else headers_of(f"auth-{kms}")
            settings = eth_settings(self._asked_chain(), self.release_of(release_name))
            head = KeptHead(self.config.eth_block_cache, lambda: self.instrumentation.clock.now())
            self.instrumentation.on_clear.append(head.forget)
            app = eth_app(settings, observer=decision_recorder(), headers=headers, head=head)
            return await self.serve(f"auth-{kms}", app)
        path = str(self.policies.paths[kms])
        app = simple_app(path, contract=self.contract_of(release_name), observer=decision_recorder())
        return await self.serve(f"auth-{kms}", app)

    def _asked_chain(self) -> AskedChain:
        if self.chain is None:
            return given_chain(self.config)
        return AskedChain(self.urls[CHAIN], self.chain.kms_address, self.chain.chain_id)

    def headers_to_kms(self, caller: str, *kms: str) -> MoreHeaders:
        """Return the headers of a part's requests to these KMS: if one is another program, only those of a trace."""
        return trace_headers if self.config.kms.keys() & set(kms) else headers_of(caller)

    def chain_of(self, kms: str) -> "StackChain | None":
        """Return the stack's own chain if it decides for a KMS."""
        return self.chain if self.config.asks_chain(kms) else None

    def webhook_of(self, kms: str) -> str:
        """Return what the specification of a first KMS names as its webhook: `own`, or a URL without a policy here."""
        if self.config.asks_chain(kms) and self.chain is None:
            return self.urls[f"auth-{kms}"]
        return self.config.webhooks.get(kms, "own")

    def scrub(self, text: str) -> str:
        """Replace what differs from run to run by names: ports, and the state folder."""
        for name, url in self.urls.items():
            text = text.replace(url.rpartition("://")[2], name)
        return text.replace(str(self.state), "STATE")

    def verifier(self, caller: str) -> RecordingVerifier:
        """Make the verifier of a part."""
        return self.instrumentation.verifier(caller, self.urls["pccs"], TrustAnchor(self.intel.root_der))
