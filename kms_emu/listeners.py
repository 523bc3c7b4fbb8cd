"""The sockets of one KMS, and what each phase serves on them.

The RPC socket is bound once and survives the change of phases, and a restart, so a client that connects in between
waits for the handshake and is not refused. If the onboard phase has a port of its own, nobody listens on the RPC port
before that phase ends, and a restart binds it again. The admin port is bound at the start, so that a port that is taken
is known, and answers once there are keys. gRPC listeners are optional.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstack_emu.kms_emu.admin import admin_app
from dstack_emu.kms_emu.api_auth import KmsAuth
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.dependencies import KmsDependencies
from dstack_emu.kms_emu.metrics import AttestationMetrics
from dstack_emu.kms_emu.onboard_phase import onboard_app
from dstack_emu.kms_emu.onboard_service import OnboardService
from dstack_emu.kms_emu.runtime_phase import admin_tls_context, runtime_app, tls_context
from dstack_emu.kms_emu.service import KmsService
from dstack_emu.transport.http import Middleware
from dstack_emu.transport.listen import Server, bind_tcp, reachable, serve
from dstack_emu.transport.localhost_socket import bound_host
from dstack_emu.transport.prpc_server import RpcStatuses

if TYPE_CHECKING:
    from dstack_emu.kms_emu.grpc_server import KmsGrpcServer

_RPC_SETTING = "rpc.address and rpc.port"


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a KMS listens, as host and port: the RPC listener, and gRPC's by their keys in `emulator.grpc`."""

    rpc: tuple[str, int]
    grpc: Mapping[str, tuple[str, int]]


class KmsListeners:
    """Binds, serves and closes. `sock` and `grpc_socks` are sockets that were bound already, if any."""

    def __init__(
        self,
        config: KmsConfig,
        deps: KmsDependencies,
        *,
        sock: socket.socket | None,
        auth: KmsAuth,
        grpc_socks: Mapping[str, socket.socket],
        grpc_interceptors: Sequence[Any],
        middlewares: Sequence[Middleware],
    ) -> None:
        self._config, self._deps = config, deps
        self._sock, self._grpc_socks = sock, dict(grpc_socks)
        self._auth, self._grpc_interceptors = auth, grpc_interceptors
        self._middlewares = middlewares
        self._server: Server | None = None
        self._admin_sock: socket.socket | None = None
        self._admin_server: Server | None = None
        self._grpc: KmsGrpcServer | None = None
        self._addresses: Addresses | None = None

    @property
    def is_serving(self) -> bool:
        """Whether the RPC listener answers: not while the phases change, nor after the end."""
        return self._server is not None

    @property
    def url(self) -> str:
        """Return where the RPC listener answers now."""
        if self._server is None:
            raise RuntimeError("the KMS is not started")
        return self._server.url

    @property
    def admin_url(self) -> str | None:
        """Return where the admin listener answers in the runtime phase; None without one."""
        if self._admin_sock is None:
            return None
        scheme = "http" if self._config.core.admin.tls.files is None else "https"
        return f"{scheme}://{reachable(self._admin_sock)}"

    @property
    def grpc_targets(self) -> dict[str, str]:
        """Return where the gRPC listeners are, by their keys in `emulator.grpc`; empty if they are switched off."""
        return {} if self._grpc is None else self._grpc.targets

    @property
    def runtime_address(self) -> str:
        """Return where a client on this machine reaches the RPC listener in the runtime phase: `host:port`."""
        return reachable(self._rpc_sock)

    def bind(self) -> None:
        """Bind the RPC socket, unless it was given; raise `ListenError`."""
        if self._sock is None:
            rpc = self._config.rpc
            self._sock = bind_tcp(rpc.address, rpc.port, setting=_RPC_SETTING, listen=self._has_one_port)
        self._note_addresses()

    def bind_optional(self) -> None:
        """Bind the admin and gRPC ports that the configuration enables; raise `ListenError`."""
        admin = self._config.core.admin
        if admin.enabled:
            where = "core.admin.address and core.admin.port"
            self._admin_sock = bind_tcp(admin.address, admin.port, setting=where, listen=False)
        if self._config.emulator.grpc.enabled:
            # Imported only here: grpcio costs time and memory that a KMS without it must not pay.
            from dstack_emu.kms_emu.grpc_server import KmsGrpcServer

            self._grpc = KmsGrpcServer(
                self._config,
                self._deps,
                self._auth,
                bound={key: sock.dup() for key, sock in self._grpc_socks.items()},
                interceptors=self._grpc_interceptors,
            )

    def addresses(self) -> Addresses:
        """Return where the sockets were bound, which may be closed: for what begins a phase and does not end it."""
        assert self._addresses is not None  # noqa: S101 - bind() comes first
        return self._addresses

    def rebind(self, where: Addresses) -> None:
        """Bind the RPC and the given gRPC sockets again, if they are closed; raise `ListenError`."""
        if self._sock is None or _is_closed(self._sock):
            self._sock = bind_tcp(*where.rpc, setting=_RPC_SETTING, listen=self._has_one_port)
        for key, at in where.grpc.items():
            if _is_closed(self._grpc_socks[key]):
                self._grpc_socks[key] = bind_tcp(*at, setting=f"emulator.grpc.{key}")
        self._note_addresses()

    async def enter_onboard(self, service: OnboardService, finish: Callable[[], None]) -> None:
        """Serve the onboard phase; `finish` is called when its end is requested."""
        core = self._config.core
        app = onboard_app(
            service,
            site_name=core.site_name,
            finish=finish,
            middlewares=(*self._middlewares, self._auth.onboard.middleware(self._deps.log)),
            takes_source_token=self._deps.release.onboard_token,
            statuses=RpcStatuses.of(self._deps.release),
        )
        if self._has_one_port:
            sock = self._rpc_sock.dup()
        else:
            sock = bind_tcp(core.onboard.address, core.onboard.port, setting="core.onboard")
        self._server = await serve(app, sock)
        if self._grpc is not None:
            await self._grpc.enter_onboard(service)

    def stop_listening(self) -> None:
        """Accept no connection from now on: clients that connect to the RPC port wait for the next phase."""
        if self._server is not None:
            self._server.stop_listening()
            if not self._has_one_port:
                self._rpc_sock.listen()

    async def leave_onboard(self) -> None:
        """End what the onboard phase serves, after the answers in progress."""
        if self._server is not None:
            await self._server.close()
            self._server = None
        if self._grpc is not None:
            await self._grpc.leave()

    async def enter_runtime(self, service: KmsService, metrics: AttestationMetrics) -> None:
        """Serve the runtime phase over TLS, and the admin listener."""
        tls = self._config.rpc.tls
        context = tls_context(tls, self._deps)
        await self._serve_admin(service)
        if self._grpc is not None:
            await self._grpc.enter_runtime(
                service, lambda mandatory: tls_context(tls, self._deps, mandatory), metrics.record
            )
        app = runtime_app(service, self._deps, metrics, self._middlewares)
        self._server = await serve(app, self._rpc_sock.dup(), context)

    async def close(self, *, keeps_ports: bool = False) -> None:
        """End it all: answers in progress get a short while, then everything is closed.

        If `keeps_ports` is true, the given gRPC sockets stay open, and so does the RPC socket if both phases have it:
        clients that connect wait, and no other program takes the ports before `rebind`.
        """
        if self._sock is not None and not (keeps_ports and self._has_one_port):
            self._sock.close()
        if not keeps_ports:
            for sock in self._grpc_socks.values():
                sock.close()
        servers, self._server, self._admin_server = (self._server, self._admin_server), None, None
        for server in servers:
            if server is not None:
                await server.close()
        if self._grpc is not None:
            await self._grpc.close()
        if self._admin_sock is not None:
            self._admin_sock.close()

    @property
    def _has_one_port(self) -> bool:
        """Return whether both phases are at one address."""
        onboard, rpc = self._config.core.onboard, self._config.rpc
        return (onboard.address, onboard.port) == (rpc.address, rpc.port)

    @property
    def _rpc_sock(self) -> socket.socket:
        assert self._sock is not None  # noqa: S101 - bind() comes first
        return self._sock

    def _note_addresses(self) -> None:
        grpc = {key: _address(sock) for key, sock in self._grpc_socks.items()}
        self._addresses = Addresses(_address(self._rpc_sock), grpc)

    async def _serve_admin(self, service: KmsService) -> None:
        if self._admin_sock is None:
            return
        tls = admin_tls_context(self._config.core.admin.tls, self._deps)
        self._admin_server = await serve(admin_app(service, self._deps, self._auth.admin), self._admin_sock, tls)
        self._deps.log.info("admin listener", url=self.admin_url)


def _is_closed(sock: socket.socket) -> bool:
    return sock.fileno() == -1


def _address(sock: socket.socket) -> tuple[str, int]:
    return bound_host(sock), sock.getsockname()[1]
