"""The KMS's gRPC listeners, beside pRPC and over the same service objects.

The first port is plain in the onboard phase and serves Onboard; in the runtime phase it serves KMS by the TLS rules of
`rpc.tls`, so a client certificate may be shown (or must, where that says so). The second one has TLS in the runtime
phase alone, and demands a client certificate. Admin has a port of its own, plain unless `core.admin.tls` is set. A port
is bound from the start: a client that connects between the phases is served once the next phase has begun.

Imported only where gRPC is switched on: grpcio costs time and memory. Upstream has no gRPC: this is ours.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import grpc
from multidict import CIMultiDict

from dstack_emu.attest.errors import AttestError
from dstack_emu.kms_emu.admin import admin_table
from dstack_emu.kms_emu.api_auth import KmsAuth
from dstack_emu.kms_emu.call_log import log_refusal
from dstack_emu.kms_emu.caller import caller_of
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.dependencies import KmsDependencies
from dstack_emu.kms_emu.errors import (
    BootDeniedError,
    DisabledError,
    InvalidRequestError,
    KmsError,
    NotAttestedError,
    UnavailableError,
    WrongPhaseError,
)
from dstack_emu.kms_emu.onboard_service import OnboardService, onboard_table
from dstack_emu.kms_emu.runtime_phase import admin_tls_context
from dstack_emu.kms_emu.service import Caller, KmsService, kms_table
from dstack_emu.transport.api_auth import ListenerAuth
from dstack_emu.transport.grpc_server import (
    GrpcPeer,
    GrpcServer,
    GrpcService,
    Listener,
    Statuses,
    absent,
    serve_grpc,
)
from dstack_emu.transport.listen import bind_tcp, reachable


class NoCredentialError(KmsError):
    """A call without the credential of its listener, which HTTP answers with a bare 401."""


STATUSES: Final[Statuses] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NoCredentialError: grpc.StatusCode.UNAUTHENTICATED,
    NotAttestedError: grpc.StatusCode.UNAUTHENTICATED,
    BootDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DisabledError: grpc.StatusCode.FAILED_PRECONDITION,
    WrongPhaseError: grpc.StatusCode.FAILED_PRECONDITION,
    KmsError: grpc.StatusCode.INTERNAL,
}
"""What kind of refusal is which status; docs/grpc.md has the same table for readers."""


class KmsGrpcServer:
    """The listeners of one KMS, from phase to phase. Its ports are its own from the start; close it.

    `bound` are sockets that were bound already, by their keys in `emulator.grpc`; `interceptors` grpc.aio's, for every
    listener. Raises `ListenError` for a port that is taken.
    """

    def __init__(
        self,
        config: KmsConfig,
        deps: KmsDependencies,
        auth: KmsAuth,
        *,
        bound: Mapping[str, socket.socket] = MappingProxyType({}),
        interceptors: Sequence[Any] = (),
    ) -> None:
        self._config, self._deps, self._auth, self._interceptors = config, deps, auth, interceptors
        self._log = deps.log
        self._servers: list[GrpcServer] = []
        self._ports = dict(bound)
        grpc_config = config.emulator.grpc
        wanted = {"port": grpc_config.port, "mtls_port": grpc_config.mtls_port}
        if config.core.admin.enabled:
            wanted["admin_port"] = grpc_config.admin_port
        try:
            for key, port in wanted.items():
                if key in bound:
                    continue
                setting = f"emulator.grpc.address and emulator.grpc.{key}"
                self._ports[key] = bind_tcp(grpc_config.address, port, setting=setting)
        except BaseException:
            self._release()
            raise

    @property
    def targets(self) -> dict[str, str]:
        """Return where a client on this machine reaches each listener, by the key of its port."""
        return {key: reachable(sock) for key, sock in self._ports.items()}

    async def enter_onboard(self, service: OnboardService) -> None:
        """Serve Onboard in plain."""

        async def admitted(peer: GrpcPeer) -> None:
            await self._require_credential(self._auth.onboard, peer)

        onboard = GrpcService("kms.Onboard", onboard_table(service), admitted)
        await self._serve(onboard, absent("kms.KMS", admitted, _not_found), listeners={"port": None})

    async def enter_runtime(
        self,
        service: KmsService,
        tls: Callable[[bool], ssl.SSLContext],
        answered: Callable[[str, bool], None],
    ) -> None:
        """Serve KMS over TLS, and Admin if it is switched on.

        `tls` makes the settings, by whether a client certificate is demanded even if `rpc.tls` does not. `answered` is
        called with each call that has ended.
        """

        async def caller(peer: GrpcPeer) -> Caller:
            try:
                return await caller_of(peer.certificate, self._deps.verifier)
            except (KmsError, AttestError) as error:
                log_refusal(self._log, error, self._deps.clock, listener="grpc")
                raise

        kms = GrpcService("kms.KMS", kms_table(service), caller)
        listeners = {"port": _with_http2(tls(False)), "mtls_port": _with_http2(tls(True))}
        await self._serve(kms, absent("kms.Onboard", caller, _not_found), listeners=listeners, answered=answered)

        async def admin_caller(peer: GrpcPeer) -> Caller:
            await self._require_credential(self._auth.admin, peer)
            return await caller(peer)

        if "admin_port" in self._ports:
            admin_tls = admin_tls_context(self._config.core.admin.tls, self._deps)
            admin = GrpcService("kms.Admin", admin_table(service), admin_caller)
            await self._serve(admin, listeners={"admin_port": admin_tls and _with_http2(admin_tls)})

    async def leave(self) -> None:
        """End a phase: calls in progress get a short while; the ports stay."""
        servers, self._servers = self._servers, []
        await asyncio.gather(*(server.close() for server in servers))

    async def close(self) -> None:
        """End it all."""
        await self.leave()
        self._release()

    async def _serve(
        self, *services: GrpcService[Any], listeners: Mapping[str, ssl.SSLContext | None], **options: Any
    ) -> None:
        sockets = (Listener(self._ports[key].dup(), tls) for key, tls in listeners.items())
        server = await serve_grpc(services, *sockets, statuses=STATUSES, interceptors=self._interceptors, **options)
        self._servers.append(server)

    async def _require_credential(self, auth: ListenerAuth, peer: GrpcPeer) -> None:
        if not await auth.admits(CIMultiDict(peer.metadata)):
            self._log.info("refused", listener=f"grpc {auth.listener}", reason="no valid credential")
            raise NoCredentialError(f"{auth.realm}: a token is required")

    def _release(self) -> None:
        for sock in self._ports.values():
            sock.close()


def _not_found(name: str) -> WrongPhaseError:
    """Return the refusal of an RPC that another phase serves, as pRPC words it."""
    return WrongPhaseError(f"Service not found: {name}")


def _with_http2(tls: ssl.SSLContext) -> ssl.SSLContext:
    tls.set_alpn_protocols(["h2"])
    return tls
