"""What the parts of one stack share. Each part is given it; none of them knows the deployment that starts them."""

import socket
from dataclasses import dataclass, field
from pathlib import Path

from dstack_emu.attest.release import Release, release
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.auth.server import simple_app
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.instrumentation import App, Instrumentation
from dstack_emu.deployment.policy_files import PolicyFiles
from dstack_emu.deployment.service_logs import ServiceLogs
from dstack_emu.observability.decisions import decision_recorder
from dstack_emu.observability.fault_effects import Stale
from dstack_emu.observability.recorders import RecordingVerifier
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.listen import Server, bind_tcp, serve


class ServicePorts:
    """The TCP sockets of the services: those of the services that a stack begins with are bound before any starts."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._bound: dict[str, socket.socket] = {}

    def bind(self, service: str, port: int, *, host: str | None = None, setting: str) -> None:
        """Bind a service's port (0: a free one); raise `ListenError`, which names `setting`, if it is taken."""
        self._bound[service] = bind_tcp(host or self._host, port, setting=setting)

    def take(self, service: str) -> socket.socket:
        """Hand the bound socket of a service over, or a new one on a free port; whoever takes it closes it."""
        return self._bound.pop(service, None) or bind_tcp(self._host, 0)

    def close(self) -> None:
        """Close the sockets that nobody took."""
        for sock in self._bound.values():
            sock.close()


@dataclass(frozen=True, slots=True)
class StackContext:
    """One stack as its parts see it: settings, trust root, instruments, and where each service answers.

    `urls` has the URL of each service, `grpc` the `host:port` of each gRPC listener, both by name.
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
    urls: dict[str, str] = field(default_factory=dict)
    grpc: dict[str, str] = field(default_factory=dict)

    def release_of(self, name: str | None) -> Release:
        """Return the dstack release of a part: the named one, or the stack's."""
        return release(name or self.config.release)

    @property
    def root_ca(self) -> Path:
        """The file with the emulated Intel's root certificate (PEM)."""
        return self.state / "root-ca.pem"

    async def serve(self, service: str, app: App, *, stale: Stale | None = None) -> Server:
        """Serve an instrumented application on the service's port; the caller closes the server."""
        app = self.instrumentation.instrument(service, app, stale=stale)
        with self.logs.of(service):
            server = await serve(app, self.ports.take(service))
        self.urls[service] = server.url
        return server

    def withdraw(self, service: str) -> None:
        """Forget where a service answered that has ended."""
        self.urls.pop(service, None)
        for suffix in ("grpc", "grpc-mtls"):
            self.grpc.pop(f"{service}-{suffix}", None)

    async def serve_webhook(self, kms: str, release_name: str | None = None) -> Server:
        """Serve auth-simple over the policy of the KMS of that name, under the contract of its release."""
        path = str(self.policies.paths[kms])
        return await self.serve(
            f"auth-{kms}",
            simple_app(path, contract=self.release_of(release_name).auth_contract, observer=decision_recorder(path)),
        )

    def scrub(self, text: str) -> str:
        """Put names in place of what differs from run to run: ports, and the state folder."""
        for name, url in self.urls.items():
            text = text.replace(url.partition("://")[2], name)
        return text.replace(str(self.state), "STATE")

    def verifier(self, caller: str) -> RecordingVerifier:
        """Make the verifier of one part."""
        return self.instrumentation.verifier(caller, self.urls["pccs"], TrustAnchor(self.intel.root_der))
