"""A gateway as a process: its certificate, its listeners for RPCs, operators and tests, and what runs beside them.

Source: dstack `gateway/src/main.rs` at 312dc605.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dstack_emu.attest.issuing import CertificateAuthority
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.gateway.admin_auth import admin_auth
from dstack_emu.gateway.agent import DEFAULT_ADDRESS, GuestAgent
from dstack_emu.gateway.apps import admin_app, debug_app, rpc_app
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.configured_ingress import bind_ingress, configured_ingress
from dstack_emu.gateway.connections import Connections
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.gateway import Gateway, GatewayContext
from dstack_emu.gateway.identity import alt_names, static_certificates, stored_authority, tls_context, write_identity
from dstack_emu.gateway.ingress.server import Ingress
from dstack_emu.gateway.routing import Endpoint, Instance, Reach
from dstack_emu.gateway.service import GatewayService
from dstack_emu.gateway.webhook import Webhook
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.file_limit import raise_file_limit
from dstack_emu.transport.http import Application
from dstack_emu.transport.listen import Server, bind_tcp, serve
from dstack_emu.transport.pccs_client import AttestationVerifier, PccsClient
from dstack_emu.transport.trust_root import trust_anchor

RPC, ADMIN, DEBUG, INGRESS = "rpc", "admin", "debug", "ingress"
"""The listeners, by the names of their sockets."""

Instrument = Callable[[str, Application], Application]
"""Adds to the application of a listener, before it is served."""


class NoReach:
    """No instance can be reached: nobody has said where one listens."""

    def endpoint(self, instance: Instance, port: int) -> Endpoint | None:
        """Return None."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayDependencies:
    """What a gateway is given beside its configuration.

    `agent_address` is its guest agent's. `reach` says where instances listen, and `connections` counts what the ingress
    holds open. `clock` is in Unix seconds. Without a `verifier`, one is made of the configured PCCS and root; without
    an `authority`, a CA is made, and kept with the state. `socks` are sockets that were bound already, by the names of
    the listeners. `environment` may have the token of the admin listener. `headers` are added to its requests, and
    `instrument` to its applications. With `has_ingress` it serves the configured ingress, too; otherwise that is left
    to whoever runs it.
    """

    clock: Callable[[], int]
    entropy: Callable[[int], bytes]
    agent_address: str = DEFAULT_ADDRESS
    reach: Reach = field(default_factory=NoReach)
    connections: Connections = field(default_factory=Connections)
    verifier: AttestationVerifier | None = None
    authority: CertificateAuthority | None = None
    socks: Mapping[str, socket.socket] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: MoreHeaders | None = None
    instrument: Instrument = lambda _listener, app: app
    has_ingress: bool = False


class GatewayServer:
    """One gateway. `start` returns when it answers; `wait` until an operator ended it; `stop` ends it."""

    def __init__(self, config: GatewayConfig, given: GatewayDependencies, *, release: Release = DEFAULT) -> None:
        self.config, self.release, self._given = config, release, given
        self._gateway: Gateway | None = None
        self._socks: dict[str, socket.socket] = dict(given.socks)
        self._servers: dict[str, Server] = {}
        self._ingress_socks: Sequence[socket.socket] = ()
        self._ingress: Ingress | None = None
        self._agent = GuestAgent(given.agent_address, headers=given.headers)
        self._webhook = Webhook(config.core.auth, given.headers)
        self._own_verifier: AttestationVerifier | None = None
        self._recycling: asyncio.Task[None] | None = None
        self._exit = asyncio.Event()

    @property
    def gateway(self) -> Gateway:
        """Return the gateway, once it was started."""
        if self._gateway is None:
            raise RuntimeError("the gateway is not started")
        return self._gateway

    @property
    def urls(self) -> dict[str, str]:
        """Return where its listeners answer, by their names; of the ingress host and first port."""
        urls = {name: server.url for name, server in self._servers.items()}
        return urls if self._ingress is None else {**urls, INGRESS: self._ingress.address}

    async def start(self) -> None:
        """Check the configuration, bind, get the certificate, and serve.

        Raises `GatewayConfigError` or `ListenError` before anything is written, or `GatewayError`.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        config, given = self.config, self._given
        config.require_usable()
        auth = admin_auth(config.core.admin, given.environment, self.release)
        verifier = given.verifier or self._configured_verifier()
        static = static_certificates(config, self.release, given.clock())
        self._bind()
        app_id = await self._identify()
        tls = tls_context(config.tls_files)
        gateway = self._gateway = Gateway(
            GatewayContext(
                config=config,
                release=self.release,
                agent=self._agent,
                reach=given.reach,
                clock=given.clock,
                entropy=given.entropy,
                authority=given.authority or stored_authority(config, given.entropy, given.clock()),
                static=static,
                app_id=app_id,
                connections=given.connections,
            )
        )
        service = GatewayService(gateway, self._webhook)
        await self._serve(ADMIN, lambda: admin_app(gateway, auth, self._exit.set))
        await self._serve(DEBUG, lambda: debug_app(service, gateway))
        gateway.start()
        if config.core.recycle.enabled:
            self._recycling = begin_in_background(self._recycle(), "recycling of a gateway")
        self._servers[RPC] = await serve(
            given.instrument(RPC, rpc_app(service, gateway, verifier)), self._socks[RPC], tls
        )
        if given.has_ingress:
            self._ingress = configured_ingress(gateway, self._agent)
            await self._ingress.start(self._ingress_socks)
        gateway.log.info("gateway", url=self._servers[RPC].url)

    def _configured_verifier(self) -> AttestationVerifier:
        core = self.config.core
        anchor = trust_anchor(core.attestation, "core.")
        self._own_verifier = AttestationVerifier(PccsClient(core.pccs), anchor, self._given.clock)
        return self._own_verifier

    def _bind(self) -> None:
        core = self.config.core
        wanted = {RPC: (self.config, "address"), ADMIN: (core.admin, "core.admin.address")}
        if not core.admin.enabled:
            del wanted[ADMIN]
        if core.debug.insecure_enable_debug_rpc:
            wanted[DEBUG] = (core.debug, "core.debug.address")
        for name, (listener, key) in wanted.items():
            if name not in self._socks:
                self._socks[name] = bind_tcp(*listener.endpoint(key), setting=key)
        if self._given.has_ingress:
            self._ingress_socks = bind_ingress(self.config)

    async def _identify(self) -> bytes | None:
        """Get certificate and app id from the guest agent, and write the former; return the latter."""
        core = self.config.core
        identity = None
        try:
            if core.rpc_domain:
                identity = await self._agent.tls_identity(alt_names(core.rpc_domain, core.sync.my_url))
        except GatewayError as error:
            raise GatewayError(f"Failed to generate certs: {error}") from error
        try:
            app_id = None if core.debug.insecure_skip_attestation else await self._agent.app_id()
        except GatewayError as error:
            raise GatewayError(f"Failed to get app info: {error}") from error
        if identity is not None:
            write_identity(self.config.tls_files, identity)
        if core.set_ulimit:
            raise_file_limit()
        return app_id

    async def _serve(self, name: str, make: Callable[[], Application]) -> None:
        if name in self._socks:
            self._servers[name] = await serve(self._given.instrument(name, make()), self._socks[name])

    async def _recycle(self) -> None:
        while True:
            await asyncio.sleep(self.config.core.recycle.interval)
            self.gateway.recycle()

    async def wait(self) -> None:
        """Wait until an operator ends it."""
        await self._exit.wait()

    async def stop(self) -> None:
        """End it: answers in progress get a short while, then everything is closed."""
        if self._recycling is not None:
            self._recycling.cancel()
            await asyncio.gather(self._recycling, return_exceptions=True)
        if self._ingress is not None:
            await self._ingress.close()
        for server in self._servers.values():
            await server.close()
        for sock in (*self._socks.values(), *self._ingress_socks):
            sock.close()
        if self._gateway is not None:
            await self._gateway.close()
        if self._own_verifier is not None:
            await self._own_verifier.pccs.close()
        await self._webhook.close()
        await self._agent.close()
