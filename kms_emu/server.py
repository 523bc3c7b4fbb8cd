"""The KMS as a process: two phases on one port, plain HTTP while it is fresh, then TLS.

`/finish` ends the onboard phase; the same listening socket then serves the runtime phase, so a client that connects in
between waits for the handshake and is not refused. Source: dstack `kms/src/main.rs` at 312dc605.
"""

import asyncio
import functools
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from aiohttp import web
from aiohttp.typedefs import Middleware
from cryptography import x509

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.certificate import CertificateAuthority
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.attest.version import REVISION, UPSTREAM
from dstack_emu.kms_emu.admin import admin_app
from dstack_emu.kms_emu.agent_client import TIMEOUT as AGENT_TIMEOUT
from dstack_emu.kms_emu.agent_client import GuestAgentClient
from dstack_emu.kms_emu.auth_api import AuthApi, DevAuth, WebhookAuth
from dstack_emu.kms_emu.call_log import log_refusal
from dstack_emu.kms_emu.caller import caller_of
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT, RPC_CERT, TMP_CA_CERT, CertDir
from dstack_emu.kms_emu.config import AttestationConfig, Core, KmsConfig
from dstack_emu.kms_emu.errors import KmsConfigError, KmsError, context
from dstack_emu.kms_emu.image_cache import ImageCache
from dstack_emu.kms_emu.keys import Entropy, KmsKeys, RootKeys
from dstack_emu.kms_emu.metrics import AttestationMetrics
from dstack_emu.kms_emu.onboarding import Receiver
from dstack_emu.kms_emu.service import Caller, Environment, KmsService, OnboardService, kms_table, onboard_table
from dstack_emu.kms_emu.setup_page import content_security_policy, setup_page
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.listen import Server, ServerTlsContext, bind_tcp, serve
from dstack_emu.transport.pccs_client import AttestationVerifier, Clock, PccsClient
from dstack_emu.transport.plain import add_headers
from dstack_emu.transport.prpc_server import Asked, add_prpc
from dstack_emu.transport.ratls import TIMEOUT as SOURCE_TIMEOUT

if TYPE_CHECKING:
    from dstack_emu.kms_emu.grpc_server import KmsGrpcServer

Phase = Literal["starting", "onboard", "runtime", "stopped"]

CA_RENEWAL_WINDOW: Final = 365 * 86400
"""Seconds before its end at which a stored CA certificate is issued anew."""

REISSUE_FAILED: Final = (
    "Failed to reissue the attested KMS RPC certificate; refusing to start with a potentially unattested certificate"
)
STATE_FAILED: Final = "Failed to initialize KMS state"


def trust_anchor(attestation: AttestationConfig, section: str = "core.") -> TrustAnchor:
    """Read the root that callers are judged under: Intel's own, or the configured one with the insecure opt-in.

    `section` is what stands before `attestation` in the names of its keys.
    """
    roots = attestation.root_ca
    given = [name for name in type(roots).model_fields if getattr(roots, name) is not None]
    if given and not attestation.insecure_allow_external_trust_anchors:
        raise KmsConfigError(
            f"failed to load attestation verifier: {section}attestation.root_ca.{given[0]} is set, which needs "
            f"{section}attestation.insecure_allow_external_trust_anchors = true"
        )
    path = roots.tdx
    if path is None:
        return TrustAnchor.intel()
    try:
        data = path.read_bytes()
        certificate = (
            x509.load_pem_x509_certificate(data) if b"-----BEGIN" in data else x509.load_der_x509_certificate(data)
        )
    except OSError as error:
        raise KmsConfigError(f"{section}attestation.root_ca.tdx: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise KmsConfigError(
            f"{section}attestation.root_ca.tdx: {path} is no certificate in PEM or DER: {error}"
        ) from error
    return TrustAnchor.of(certificate)


@dataclass(frozen=True, slots=True)
class KmsInstruments:
    """What a KMS that is watched, or disturbed, is given from outside; on its own it needs none of it.

    `middlewares` go around its listeners' applications; `verifier` judges in place of the configured PCCS and root;
    `headers` are added to what it asks its agent and a source KMS. `timeout` is how long it waits for each of those
    (None: each client's own).
    """

    middlewares: Sequence[Middleware] = ()
    verifier: AttestationVerifier | None = None
    headers: MoreHeaders | None = None
    timeout: float | None = None


def auth_api(core: Core) -> AuthApi:
    """Make the configured decider."""
    if core.auth_api.type == "dev":
        return DevAuth(core.auth_api.dev.gateway_app_id)
    return WebhookAuth(core.auth_api.webhook.url)


def image_store(core: Core) -> ImageStore:
    """Make what judges OS images, with the configured cache."""
    image = core.image
    return ImageStore(image.cache_dir, image.download_url, image.download_timeout)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a running KMS knows beside its files: what it measures, once it asked, and its metrics' counters."""

    own_boot_info: BootInfo | None = None
    requests: int = 0
    failures: int = 0


class KmsServer:
    """One KMS. `start` returns when it answers; `wait` until it ended, raising what it ended with; `stop` ends it.

    `agent_address` is where its guest agent listens; `clock` is what evidence is judged by, `issue_clock` what
    certificates are dated by (the same unless given); `sock` a bound socket to serve on; `admin_token` what the admin
    listener asks for; `auth` who decides, in place of the configured one. It closes both `auth` and a verifier that it
    was given. For gRPC, if it is switched on: `grpc_socks` are sockets that were bound already, by their keys in
    `emulator.grpc`; `grpc_interceptors` grpc.aio's.
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
        admin_token: str | None = None,
        auth: AuthApi | None = None,
        grpc_socks: Mapping[str, socket.socket] | None = None,
        grpc_interceptors: Sequence[Any] = (),
        surroundings: KmsInstruments | None = None,
    ) -> None:
        self.config = config
        self.phase: Phase = "starting"
        core = config.core
        self.log = EventLog("dstack_emu.kms_emu", **({"site": core.site_name} if core.site_name else {}))
        with context("Failed to initialize KMS state"):
            anchor = trust_anchor(core.attestation)
        self._admin_token = admin_token
        self._admin_sock: socket.socket | None = None
        self._admin_server: Server | None = None
        self._grpc_socks, self._grpc_interceptors = grpc_socks or {}, grpc_interceptors
        self._grpc: KmsGrpcServer | None = None
        self._folder = CertDir(core.cert_dir)
        around = surroundings or KmsInstruments()
        self._middlewares = around.middlewares
        agent = GuestAgentClient(agent_address, timeout=around.timeout or AGENT_TIMEOUT, headers=around.headers)
        auth = auth or auth_api(core)
        pccs = PccsClient(core.pccs, ttl=core.attestation.collateral_ttl)
        verifier = around.verifier or AttestationVerifier(pccs, anchor, clock)
        self._env = Environment(
            core=core,
            folder=self._folder,
            agent=agent,
            auth=auth,
            verifier=verifier,
            clock=clock,
            issue_clock=issue_clock or clock,
            entropy=entropy,
            receiver=Receiver(agent, auth, verifier, entropy, around.timeout or SOURCE_TIMEOUT, around.headers),
            log=self.log,
            evidence_form=config.emulator.rpc_cert_evidence,
            images=image_store(core) if core.image.verify else None,
        )
        self._service: KmsService | None = None
        self._metrics = AttestationMetrics()
        self._sock = sock
        self._server: Server | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._runtime = asyncio.Event()

    @property
    def url(self) -> str:
        """Where it answers now; the scheme follows the phase."""
        if self._server is None:
            raise RuntimeError("the KMS is not started")
        return self._server.url

    @property
    def grpc_targets(self) -> dict[str, str]:
        """Where its gRPC listeners are, by their keys in `emulator.grpc`; nothing where that is switched off."""
        return {} if self._grpc is None else self._grpc.targets

    @property
    def admin_url(self) -> str | None:
        """Where its admin listener answers in the runtime phase; None without one."""
        if self._admin_sock is None:
            return None
        host, port = self._admin_sock.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self) -> None:
        """Bind, finish or discard what a crash left, and enter the phase that the stored keys call for."""
        self._ended = asyncio.get_running_loop().create_future()
        self._folder.prepare()
        rpc, core = self.config.rpc, self.config.core
        self._warn(core)
        if self._sock is None:
            self._sock = bind_tcp(rpc.address, rpc.port, setting="rpc.address and rpc.port")
        await self._enter()

    async def restart(self, change: Callable[[], None], *, onboard: bool | None = None) -> None:
        """End what is served, `change` what its folder holds, and begin again at the same address, as a new process.

        It enters the phase that its keys call for, or the one that `onboard` says.
        """
        assert self._sock is not None  # noqa: S101 - start() bound it
        address, port = self._sock.getsockname()[:2]
        grpc = {key: sock.getsockname()[:2] for key, sock in self._grpc_socks.items()}
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)
            self._leaving = None
        self._runtime.clear()
        await self._close()
        change()
        self._folder.prepare()
        self._service, self._metrics = None, AttestationMetrics()
        self._sock = bind_tcp(address, port, setting="rpc.address and rpc.port")
        self._grpc_socks = {key: bind_tcp(*where, setting=f"emulator.grpc.{key}") for key, where in grpc.items()}
        await self._enter(onboard)

    async def _enter(self, onboard: bool | None = None) -> None:
        """Enter the phase that the stored keys call for, or the one that is named."""
        core = self.config.core
        fresh = core.onboard.enabled and not self._folder.has_keys() if onboard is None else onboard
        try:
            if core.admin.enabled:  # bound now, so that a port that is taken is known; answering once there are keys
                where = "core.admin.address and core.admin.port"
                self._admin_sock = bind_tcp(core.admin.address, core.admin.port, setting=where, listen=False)
            if self.config.emulator.grpc.enabled:
                from dstack_emu.kms_emu.grpc_server import (
                    KmsGrpcServer,  # costs time and memory that nobody else should pay
                )

                self._grpc = KmsGrpcServer(
                    self.config,
                    self.log,
                    admin_token=self._admin_token,
                    bound=self._grpc_socks,
                    interceptors=self._grpc_interceptors,
                )
            if fresh and core.onboard.auto_bootstrap_domain:
                await OnboardService(self._env, self._finish).auto_bootstrap(core.onboard.auto_bootstrap_domain)
            elif fresh:
                await self._enter_onboard()
                return
            await self._enter_runtime()
        except BaseException:
            await self.stop()
            raise

    @property
    def memory(self) -> Memory:
        """What it knows beside its files; may be set back."""
        own = None if self._service is None else self._service.gate.own_boot_info
        return Memory(own, self._metrics.requests, self._metrics.failures)

    @memory.setter
    def memory(self, memory: Memory) -> None:
        if self._service is not None:
            self._service.gate.own_boot_info = memory.own_boot_info
        self._metrics.requests, self._metrics.failures = memory.requests, memory.failures

    def _warn(self, core: Core) -> None:
        """Log the settings that make this KMS weaker than it looks."""
        warn = functools.partial(self.log.warning, "weakened")
        if not core.image.verify:
            reason = "OS images are not measured; os_image_hash is believed as claimed"
            warn(setting="core.image.verify = false", reason=reason)
        if not core.enforce_self_authorization:
            reason = "trusted RPCs are not gated by this KMS's own attestation"
            warn(setting="core.enforce_self_authorization = false", reason=reason)
        if not core.attest_rpc_cert:
            warn(setting="core.attest_rpc_cert = false", reason="the RPC certificate carries no attestation")
        if core.admin.enabled and self._admin_token is None:
            warn(setting="core.admin.insecure_no_auth = true", reason="the admin listener asks for no credential")

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
        if self._leaving is not None and self._leaving is not asyncio.current_task():
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)
        await self._close()
        self._end(None)

    async def _close(self) -> None:
        self.phase = "stopped"
        servers, self._server, self._admin_server = (self._server, self._admin_server), None, None
        for server in servers:
            if server is not None:
                await server.close()
        if self._grpc is not None:
            await self._grpc.close()
        for sock in (self._sock, self._admin_sock):
            if sock is not None:
                sock.close()
        await self._env.agent.close()
        await self._env.auth.close()
        await self._env.verifier.pccs.close()
        if self._env.images is not None:
            await self._env.images.close()

    def _end(self, error: BaseException | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
            self._ended.exception()  # asked for here: nobody has to be waiting

    # ---- onboard phase

    async def _enter_onboard(self) -> None:
        assert self._sock is not None  # noqa: S101 - bound by start()
        core = self.config.core
        service = OnboardService(self._env, self._finish)
        app = web.Application(middlewares=self._middlewares)

        async def index(request: web.Request) -> web.Response:
            headers = {"Content-Security-Policy": content_security_policy()}
            return web.Response(text=setup_page(core.site_name), content_type="text/html", headers=headers)

        async def finish(request: web.Request) -> web.Response:
            self._finish()
            return web.Response(text="OK")

        async def anyone(_asked: Asked) -> None:
            return None

        app.router.add_get("/", index)
        app.router.add_get("/finish", finish)
        app.router.add_get("/health", _health)
        add_prpc(app, "/prpc", onboard_table(service), anyone, errors=(KmsError,))
        here = (core.onboard.address, core.onboard.port) == (self.config.rpc.address, self.config.rpc.port)
        sock = self._sock.dup() if here else bind_tcp(core.onboard.address, core.onboard.port, setting="core.onboard")
        self._server = await serve(app, sock)
        if self._grpc is not None:
            await self._grpc.enter_onboard(service)
        self.phase = "onboard"
        self.log.info("onboard phase", url=self.url)

    def _finish(self) -> None:
        if self._leaving is None:
            self.log.info("finish", has_keys=self._folder.has_keys())
            if self._server is not None:  # before the answer is out: who has it, and connects, waits for TLS
                self._server.stop_listening()
            self._leaving = asyncio.create_task(self._leave_onboard(), name="kms leaves the onboard phase")

    async def _leave_onboard(self) -> None:
        assert self._server is not None  # noqa: S101 - there is an onboard phase to leave
        try:
            await self._server.close()  # after the answers in progress, /finish's own among them
            self._server = None
            if self._grpc is not None:
                await self._grpc.leave()
            if not self._folder.has_keys():
                raise KmsError("Failed to onboard")
            await self._enter_runtime()
        except Exception as error:  # the task's edge: whoever waits for the KMS gets it
            self.log.error("ended", reason=error)
            await self._close()
            self._end(error)

    # ---- runtime phase

    async def _enter_runtime(self) -> None:
        assert self._sock is not None  # noqa: S101 - bound by start()
        kms_keys = await self._reissue_certificates()
        env, metrics = self._env, self._metrics
        app = web.Application(middlewares=self._middlewares)
        add_headers(app, {"X-App-Version": f"v{UPSTREAM} ({REVISION})"})
        app.router.add_get("/health", _health)
        if env.core.metrics.enabled:
            app.router.add_get("/metrics", metrics.render)
        self._service = service = KmsService(env, kms_keys)
        who = caller(env.verifier, self.log)
        add_prpc(app, "/prpc", kms_table(service), who, errors=(KmsError,), answered=metrics.record)
        tls_context = self._tls_context()
        await self._serve_admin()
        if self._grpc is not None:
            await self._grpc.enter_runtime(service, env.verifier, self._tls_context, metrics.record)
        self._server = await serve(app, self._sock, tls_context)
        self.phase = "runtime"
        self._runtime.set()
        self.log.info("runtime phase", url=self.url, domain=kms_keys.domain)

    async def _serve_admin(self) -> None:
        if self._admin_sock is None:
            return
        cache = ImageCache(self.config.core.image.cache_dir)
        self._admin_server = await serve(admin_app(cache, self._admin_token, self.log), self._admin_sock)
        self.log.info("admin listener", url=self.admin_url)

    async def _reissue_certificates(self) -> KmsKeys:
        """Issue the RPC certificate over fresh evidence, and anew each CA certificate that is about to expire."""
        env, folder = self._env, self._folder
        with context(REISSUE_FAILED, KmsConfigError):
            stored = KmsKeys.load(folder, env.core.onboard.auto_bootstrap_domain)
        with context(STATE_FAILED, KmsConfigError):
            stored.require_own_certificates()
        old = stored.roots
        new = RootKeys.of(old.temp_ca.key, old.root_ca.key, old.k256, env.issue_clock())
        limit = env.clock() + CA_RENEWAL_WINDOW
        root_ca = new.root_ca if _expires_by(old.root_ca, limit) else old.root_ca
        temp_ca = new.temp_ca if _expires_by(old.temp_ca, limit) else old.temp_ca
        kms_keys = KmsKeys(RootKeys(root_ca, temp_ca, old.k256), stored.rpc_key, stored.domain)
        with context(f"{REISSUE_FAILED}: Failed to regenerate certificates"):
            certificate = await env.rpc_certificate(kms_keys)
        for name, authority, before in ((ROOT_CA_CERT, root_ca, old.root_ca), (TMP_CA_CERT, temp_ca, old.temp_ca)):
            if authority is not before:
                folder.replace(name, authority.pem.encode())
                self.log.info("renewed", file=name)
        folder.replace(RPC_CERT, certificate.encode())
        return kms_keys

    def _tls_context(self, mandatory: bool = False) -> ssl.SSLContext:
        """TLS settings as configured; `mandatory` demands a client certificate even where they do not."""
        tls = self.config.rpc.tls
        tls_context = ServerTlsContext(ssl.PROTOCOL_TLS_SERVER)
        tls_context.minimum_version = ssl.TLSVersion.TLSv1_2
        tls_context.num_tickets = 0  # each holds the client's whole certificate, its evidence included
        tls_context.set_alpn_protocols(["http/1.1"])
        try:
            tls_context.load_cert_chain(tls.certs, tls.key)
            tls_context.load_verify_locations(tls.mutual.ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise KmsConfigError(
                f"rpc.tls: cannot load {tls.certs}, {tls.key} and {tls.mutual.ca_certs}: {error} "
                "(they are the files in core.cert_dir)"
            ) from error
        tls_context.verify_mode = ssl.CERT_REQUIRED if mandatory or tls.mutual.mandatory else ssl.CERT_OPTIONAL
        return tls_context


def caller(verifier: AttestationVerifier, log: EventLog) -> Callable[[Asked], Awaitable[Caller]]:
    """Make the function that says who calls, from the client certificate of the connection."""

    async def identify(asked: Asked) -> Caller:
        channel = None if asked.transport is None else asked.transport.get_extra_info("ssl_object")
        certificate = None if channel is None else channel.getpeercert(binary_form=True)
        try:
            return await caller_of(certificate, verifier)
        except (KmsError, AttestError) as error:
            log_refusal(log, error, path=asked.path)
            raise

    return identify


def _expires_by(authority: CertificateAuthority, limit: int) -> bool:
    return authority.certificate.not_valid_after_utc.timestamp() <= limit


async def _health(request: web.Request) -> web.Response:
    return web.Response(text="OK")
