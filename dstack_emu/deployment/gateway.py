"""The gateway of a stack: a trust domain whose keys come from the stack's KMS, its RPCs, and its ingress.

The ingress runs from the start, so that the KMS are reached through it before they have keys. The RPCs are served once
the trust domain has its keys, from which their certificate comes.
"""

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.clock import wall_clock
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.gateway_names import ADMIN, AGENT, CA_FILE, GATEWAY, INGRESS
from dstack_emu.deployment.guest_network import is_loopback
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.ingress import GatewayPages, IngressCertificates, StackRoutes, interruptions, recorder
from dstack_emu.deployment.specs import GuestSpec
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.configured_ingress import ingress_settings
from dstack_emu.gateway.connections import Connections
from dstack_emu.gateway.errors import GatewayConfigError, GatewayError
from dstack_emu.gateway.gateway import Gateway
from dstack_emu.gateway.identity import stored_authority
from dstack_emu.gateway.ingress.app_address import AppAddresses, TxtTable
from dstack_emu.gateway.ingress.server import Ingress
from dstack_emu.gateway.ingress.tls import TlsByDomain
from dstack_emu.gateway.server import ADMIN as ADMIN_LISTENER
from dstack_emu.gateway.server import RPC, GatewayDependencies, GatewayServer
from dstack_emu.gateway.state import CredentialEntry, DomainEntry, GatewayState
from dstack_emu.observability.spans import headers_of
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.files import replace_file_durably
from dstack_emu.transport.listen import reachable
from dstack_emu.transport.localhost_socket import bound_host
from dstack_emu.transport.port_relay import PortRelay, forward_tcp
from dstack_emu.transport.settings import validate

CREDENTIAL: Final = "dstack-emu"
"""The id of the DNS credential that the base domain names: there is no DNS provider."""
TOKEN_FILE: Final = "gateway-admin.token"  # noqa: S105 - the name of a file


def _spec(context: StackContext) -> GuestSpec:
    """Return its trust domain; on a chain its app id is the address of its contract."""
    return GuestSpec(name=GATEWAY, app_id=None if context.chain is None else context.chain.app_id(GATEWAY))


class GatewayListeners:
    """The open listeners of the extension, as the deployment closes them."""

    def __init__(self, held: AsyncExitStack) -> None:
        self._held = held

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        await self._held.aclose()


class GatewayExtension:
    """The gateway as a service of a deployment."""

    names = (GATEWAY, ADMIN, INGRESS, AGENT)

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._server: GatewayServer | None = None
        self._socks: dict[str, socket.socket] = {}
        self._held = AsyncExitStack()
        self._root = ""
        self._refusing: list[PortRelay] = []
        self._connections = Connections()
        self.txt_records: dict[str, str] = {}

    async def start(self, sock: socket.socket) -> GatewayListeners:
        """Start its trust domain and its ingress; raise `StackError`."""
        context = self._deployment.context
        self._socks = {RPC: sock, ADMIN_LISTENER: context.ports.take(ADMIN)}
        for each in self._socks.values():
            self._held.callback(each.close)
        self._held.push_async_callback(self._end)
        try:
            self._guest = await self._deployment.start_guest(_spec(context), AGENT)
            self._authority = stored_authority(self._config(), os.urandom, wall_clock())
        except (GuestError, GatewayConfigError) as error:
            raise StackError(f"gateway: {error}") from error
        self._guest.when_booted = self._serve
        context.gateways.append(f"https://{reachable(sock)}")
        await self._refuse()
        await self._start_ingress()
        self._deployment.gateway = self
        return GatewayListeners(self._held)

    async def _start_ingress(self) -> None:
        context, sock = self._deployment.context, self._deployment.context.ports.take(INGRESS)
        context.urls[INGRESS] = reachable(sock)
        self._ingress_port = sock.getsockname()[1]
        base_domain = context.config.base_domain
        ingress = Ingress(
            routes=StackRoutes(self.find, self._kms),
            reach=context.reach,
            find_tls=TlsByDomain(IngressCertificates(base_domain, self._authority, self.find).find),
            this_node=GatewayPages(self._guest, self.find),
            app_addresses=AppAddresses(TxtTable(self.txt_records)),
            settings=ingress_settings(self._config(), context.release_of(None)),
            connections=self._connections,
            on_end=recorder(context.instrumentation),
            interrupt=interruptions(context.instrumentation),
        )
        self._held.push_async_callback(ingress.close)
        with context.logs.of(INGRESS):
            await ingress.start([sock])

    def find(self) -> Gateway | None:
        """Return the gateway, None before it has keys."""
        return None if self._server is None else self._server.gateway

    def _kms(self) -> Sequence[RunningGuest]:
        return [each.guest for each in self._deployment.kms.values()]

    # ---- its RPCs

    async def keys_are_released(self) -> None:
        """Boot its trust domain, and serve its RPCs; a resumed stack goes on without if its policy denies that."""
        try:
            await self._deployment.boot(self._guest, ("src",))
        except GuestError as error:
            self._deployment.progress(
                f"gateway: {error}; it serves no RPCs until its trust domain boots: {self._advice}"
            )

    @property
    def _advice(self) -> str:
        """What to do if it has been refused."""
        domain = self._guest.domain
        allow = f"let your webhook allow the app {domain.app_id.hex()}, compose hash {domain.compose_hash.hex()}"
        if "src" in self._deployment.policies:
            allow = "allow it with `dstack-emu ctl policy allow src gateway`"
        return f"{allow}, and boot it with `dstack-emu ctl guest boot gateway`"

    async def _serve(self) -> None:
        """Serve its RPCs, with a certificate of its agent; raise `GuestError` if it cannot."""
        await self._end()
        context = self._deployment.context
        given = GatewayDependencies(
            clock=context.instrumentation.clock,
            entropy=self._guest.streams["gateway"],
            agent_address=f"unix:{self._guest.dstack_sock}",
            reach=context.reach,
            connections=self._connections,
            verifier=context.verifier(GATEWAY),
            authority=self._authority,
            socks={name: sock.dup() for name, sock in self._socks.items()},
            environment={"DSTACK_GATEWAY_ADMIN_TOKEN": self._admin_token()},
            headers=headers_of(GATEWAY),
            instrument=lambda name, app: context.instrumentation.instrument(
                {RPC: GATEWAY, ADMIN_LISTENER: ADMIN}[name], app
            ),
        )
        server = GatewayServer(self._config(), given, release=context.release_of(None))
        try:
            self._certs.mkdir(mode=0o700, exist_ok=True)
            with context.logs.of(GATEWAY):
                await server.start()
            self._add_base_domain(server.gateway)
        except (GatewayError, GatewayConfigError, OSError) as error:
            await self._refuse()
            raise GuestError(str(error)) from error
        self._server, self._root = server, self._guest.agent.keys.ca_cert
        context.urls.update({GATEWAY: server.urls[RPC], ADMIN: server.urls[ADMIN_LISTENER]})

    async def _stop(self) -> None:
        """Serve no RPCs until its trust domain has keys again."""
        await self._end()
        await self._refuse()

    async def _refuse(self) -> None:
        """Reset the connections to its RPCs, as nobody would answer them."""
        self._refusing = [await forward_tcp(sock.dup(), lambda: None) for sock in self._socks.values()]

    async def _end(self) -> None:
        while self._refusing:
            await self._refusing.pop().close()
        server, self._server = self._server, None
        if server is not None:
            await server.stop()
            for service in (GATEWAY, ADMIN):
                self._deployment.context.withdraw(service)
            self._deployment.context.instrumentation.drop_verifier(GATEWAY)

    def _add_base_domain(self, gateway: Gateway) -> None:
        """Let it be the gateway of the base domain, as an operator does by AddZtDomain."""
        domain, now = self._deployment.config.base_domain, gateway.context.clock()
        records = gateway.records
        records.credentials.setdefault(
            CREDENTIAL,
            CredentialEntry(
                name=CREDENTIAL,
                api_token="emulated",  # noqa: S106 - there is no DNS provider
                api_url=None,
                txt_ttl=60,
                max_wait=1,
                created_at=now,
                updated_at=now,
            ),
        )
        records.default_credential = records.default_credential or CREDENTIAL
        records.domains[domain] = DomainEntry(credential=CREDENTIAL, port=self._ingress_port, node=None, priority=100)
        gateway.save()
        gateway.certbot.begin(domain)

    # ---- its configuration

    @property
    def _data_dir(self) -> Path:
        return (self._deployment.state / CA_FILE).parent

    @property
    def _certs(self) -> Path:
        return self._deployment.state / GATEWAY / "certs"

    def _config(self) -> GatewayConfig:
        files, address = self._certs, reachable(self._socks[RPC])
        document: dict[str, Any] = {
            "address": address,
            "tls": {
                "key": str(files / "gateway-rpc.key"),
                "certs": str(files / "gateway-rpc.cert"),
                "mutual": {"ca_certs": str(files / "gateway-ca.cert")},
            },
            "core": {
                "rpc_domain": self._deployment.context.kms_names[0],
                "admin": {"enabled": True, "insecure_no_auth": self._is_private},
                "sync": {"node_id": 1, "my_url": f"https://{address}", "data_dir": str(self._data_dir)},
            },
        }
        return validate(GatewayConfig, document, "gateway.toml")

    @property
    def _is_private(self) -> bool:
        return is_loopback(bound_host(self._socks[ADMIN_LISTENER]))

    def _admin_token(self) -> str:
        """Return the token of the admin listener, empty on a loopback address, where none is demanded."""
        if self._is_private:
            return ""
        token = self._deployment.config.control_token or secrets.token_hex(32)
        replace_file_durably(self._deployment.state / TOKEN_FILE, f"{token}\n".encode(), 0o600)
        return token

    # ---- the deployment

    def became_ready(self) -> None:
        """Do nothing: it was ready before the app."""

    async def close(self) -> None:
        """Do nothing: its listeners are closed, and its trust domain is the deployment's."""

    def capture(self) -> GatewayState | None:
        """Return what it has registered, None before it has keys."""
        gateway = self.find()
        return None if gateway is None else gateway.capture()

    async def restore(self, state: GatewayState | None) -> None:
        """Make it what it was: its trust domain was restored before. Raises `StackError`."""
        if state is None or not self._guest.agent.has_keys:
            await self._stop()
            return
        try:
            if self._server is None or self._root != self._guest.agent.keys.ca_cert:
                await self._serve()
            if self._server is not None:
                self._server.gateway.restore(state)
        except (GuestError, GatewayError) as error:
            raise StackError(str(error)) from error
