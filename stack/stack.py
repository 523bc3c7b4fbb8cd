"""The whole deployment in one process: PCCS, two webhooks, two KMS in their trust domains, and an app in its own.

Everything talks over real sockets, by the public interfaces that a real deployment has: the stack measures a KMS by
asking it, allows it by writing a policy file, and boots the app through GetAppKey.

    async with Stack(StackConfig(seed="mine")) as stack:
        print(stack.description()["services"]["kms-src"])
"""

import json
import logging
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from attest.proto import kms_pb2 as pb
from attest.prpc import encode_json
from attest.verify import TrustAnchor
from auth.server import simple_app
from kms_emu.cert_dir import ROOT_CA_CERT
from kms_emu.config import KmsConfig
from kms_emu.errors import KmsError
from kms_emu.server import KmsServer
from simulator.agent import GuestAgent
from simulator.agent_server import dstack_app, tappd_app, tcp_app
from simulator.app_keys import OwnKeys
from simulator.errors import GuestError
from simulator.guest_boot import fetch_keys
from simulator.image import OsImage
from simulator.image_files import ImageFileError, load_image
from simulator.intel import Intel
from simulator.pccs import pccs_app
from simulator.seed import Seed
from simulator.trust_domain import AppCompose, TrustDomain
from stack import policy_files
from stack.clock import ISSUED_AT, wall_clock
from stack.config import GRPC_PORTS, IMAGE_URL, PORTS, StackConfig, StackError
from stack.guest import instance_seed, local_key_provider
from stack.kept_logs import Logs
from stack.verifier import Verifier
from stack.verifier_server import verifier_app
from stack.watch import Watch
from transport.client import PrpcClient, RpcError, TransportError
from transport.image_store import ImageStore
from transport.listen import bind_tcp, bind_unix, reachable, reserve_unix, serve
from transport.pccs_client import AttestationVerifier, PccsClient

KMS_DOMAIN: Final = "127.0.0.1"
"""The name in the KMS's certificates, an IP address there: the printed URLs verify under the KMS's root."""

TIMEOUT: Final = 30.0
DESCRIPTION_FILE: Final = "stack.json"
SIDES: Final = ("src", "dst")

Progress = Callable[[str], None]
M = TypeVar("M", bound=Message)

log = logging.getLogger("stack")


class Stack:
    """One deployment. Enter it to bring it up; leaving it stops every part.

    When a part fails meanwhile, the block is cancelled and ends with a `PartEndedError`. `services` has URLs, `intel`
    and `root_ca` the trust root, `kms_info` what both KMS measure, `app.domain` the app, `logs` what the parts log.
    """

    def __init__(self, config: StackConfig | None = None, progress: Progress = log.info) -> None:
        self.config = config or StackConfig()
        self._progress = progress
        self._exit = AsyncExitStack()
        self._watch: Watch | None = None
        self._sockets: dict[str, socket.socket] = {}
        self.logs = Logs()
        self.services: dict[str, str] = {}
        self.grpc: dict[str, str] = {}
        self.kms: dict[str, KmsServer] = {}
        self.kms_info: dict[str, dict[str, Any]] = {}

    async def __aenter__(self) -> Self:
        self.logs.attach()
        self._exit.callback(self.logs.detach)
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        self._watch = Watch({f"kms-{side}": kms.wait for side, kms in self.kms.items()})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is None:
            raise RuntimeError("the stack was not entered")
        self._watch.stop()
        await self._exit.aclose()
        self._watch.raise_failure(kind)

    # ---- bringing it up

    async def _start(self) -> None:
        config = self.config
        self.state = self._state_folder()
        before = self._remembered()
        if before and before.get("seed") != config.seed:
            raise StackError(
                f"{self.state} was made with the seed {before.get('seed')!r}, not {config.seed!r}: "
                "give that seed, or another --state folder"
            )
        # Only a fresh KMS can be asked what it measures; what this state's measured before is remembered.
        self.kms_info = dict(before.get("kms") or {})
        self._bind()
        seed = Seed.of(config.seed)
        self.intel = Intel(seed)
        self._seed = seed
        self.root_ca = self.state / "root-ca.pem"
        self.root_ca.write_text(self.intel.root_pem)
        self.kms_ca = self.state / "kms-src" / "certs" / ROOT_CA_CERT
        image = self._image()
        await self._serve("pccs", pccs_app(self.intel))
        self.verifier = self._verifier()
        await self._serve_verifier()
        self.policies = self._prepare_policies()
        for side in SIDES:
            await self._serve(f"auth-{side}", simple_app(str(self.policies[side])))
        for side in SIDES:
            await self._start_kms(side, image)
        self.app = await self._start_app(image)
        if not config.fresh:
            await self._make_ready()
        else:
            self.kms_info |= {side: await self._measure(side) for side in SIDES if self.kms[side].phase == "onboard"}
        (self.state / DESCRIPTION_FILE).write_text(json.dumps(self.description()) + "\n")

    def _state_folder(self) -> Path:
        if self.config.state is None:
            folder = Path(tempfile.mkdtemp(prefix="dstack-emu-"))
            self._exit.callback(shutil.rmtree, folder, ignore_errors=True)
            return folder
        folder = self.config.state.absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StackError(f"the state folder {folder} cannot be made: {error.strerror}") from error
        return folder

    def _bind(self) -> None:
        """Take every port first, so that one that is taken is known before anything runs."""
        defaults = {**PORTS, **GRPC_PORTS} if self.config.grpc else PORTS
        for name, default in defaults.items():
            moved = f"--port {name}=PORT or --free-ports"
            if self.config.host != "127.0.0.1":
                moved = f"--listen {self.config.host}, {moved}"
            sock = bind_tcp(self.config.host, self.config.ports.get(name, default), setting=moved)
            self._exit.callback(sock.close)
            self._sockets[name] = sock

    async def _serve(self, name: str, app: web.Application) -> None:
        with self.logs.of(name):
            server = await serve(app, self._sockets[name])
        self._exit.push_async_callback(server.close)
        self.services[name] = server.url

    async def _serve_unix(self, name: str, app: web.Application, path: Path) -> None:
        with self.logs.of(name):
            server = await serve(app, bind_unix(path, setting="--state DIR"))
        self._exit.push_async_callback(server.close)

    def _image(self) -> OsImage:
        """The image that every trust domain boots."""
        folder = self.config.image_dir
        if folder is None:
            return OsImage.from_seed(self._seed.derive)
        try:
            return load_image(folder)
        except ImageFileError as error:
            raise StackError(str(error)) from error

    def _verifier(self) -> AttestationVerifier:
        pccs = PccsClient(self.services["pccs"])
        self._exit.push_async_callback(pccs.close)
        return AttestationVerifier(pccs, TrustAnchor(self.intel.root_der), wall_clock)

    async def _serve_verifier(self) -> None:
        """Judge for anybody who asks, with the KMS's own cache of images."""
        images = ImageStore(self.state / "images", IMAGE_URL, TIMEOUT)
        self._exit.push_async_callback(images.close)
        await self._serve("verifier", verifier_app(Verifier(self.verifier, images)))

    def _prepare_policies(self) -> dict[str, Path]:
        folder = (self.config.policies or self.state / "policies").absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = {side: folder / f"auth-{side}.json" for side in SIDES}
            for path in paths.values():
                if not path.exists():
                    policy_files.write(path, policy_files.DENY_ALL)
        except OSError as error:
            raise StackError(f"the policies folder {folder} cannot be written: {error.strerror}") from error
        return paths

    def _domain(self, name: str, image: OsImage) -> TrustDomain:
        """Power a trust domain on, on a machine of its own."""
        domain = TrustDomain(
            self.intel.platform(f"host of {name}"),
            image,
            AppCompose.named(name),
            instance_seed=instance_seed(self._seed, name),
        )
        domain.boot()
        return domain

    async def _serve_agent(self, name: str, service: str, agent: GuestAgent) -> Path:
        """Let a trust domain's agent listen: two sockets in the state folder, and a TCP port."""
        folder = self.state / name
        folder.mkdir(exist_ok=True, mode=0o700)
        await self._serve_unix(service, dstack_app(agent), folder / "dstack.sock")
        await self._serve_unix(service, tappd_app(agent), folder / "tappd.sock")
        await self._serve(service, tcp_app(agent))
        if self.config.grpc:
            from simulator.agent_grpc import serve_agent  # costs time and memory that nobody else should pay

            sock, path = self._sockets[f"{service}-grpc"], reserve_unix(folder / "grpc.sock", setting="--state DIR")
            self.grpc[f"{service}-grpc"] = reachable(sock)
            with self.logs.of(service):
                server = await serve_agent(agent, sock, path)
            self._exit.push_async_callback(server.close)
        return folder

    async def _start_kms(self, side: str, image: OsImage) -> None:
        """Start a KMS in a trust domain with keys of a local key provider, as production KMS have them."""
        name = f"kms-{side}"
        self._progress(f"starting {name}")
        domain = self._domain(name, image)
        seed = self._seed.child(f"kms {side}")
        provider = local_key_provider(self._seed, name)
        domain.complete(provider)
        agent = GuestAgent(domain, seed.stream("agent"))
        own = OwnKeys.from_seed(domain, seed.derive("sealing key", 32), provider, ISSUED_AT)
        await agent.provide(own.keys, own.issuer)
        folder = await self._serve_agent(name, f"agent-{side}", agent)
        kms = KmsServer(
            self._kms_config(side, folder / "certs"),
            f"unix:{folder / 'dstack.sock'}",
            entropy=seed.stream("kms"),
            clock=wall_clock,
            issue_clock=lambda: ISSUED_AT,
            sock=self._sockets[name],
            grpc_socks=self._kms_grpc_socks(name),
        )
        self._exit.push_async_callback(kms.stop)
        try:
            with self.logs.of(name):
                await kms.start()
        except KmsError as error:
            raise StackError(f"{name}: {error}") from error
        self.kms[side] = kms
        self._note_url(side)

    def _kms_grpc_socks(self, name: str) -> dict[str, socket.socket]:
        if not self.config.grpc:
            return {}
        socks = {"port": self._sockets[f"{name}-grpc"], "mtls_port": self._sockets[f"{name}-grpc-mtls"]}
        self.grpc |= {f"{name}-grpc": reachable(socks["port"]), f"{name}-grpc-mtls": reachable(socks["mtls_port"])}
        return socks

    def _kms_config(self, side: str, certs: Path) -> KmsConfig:
        host, port = self._sockets[f"kms-{side}"].getsockname()[:2]
        document = {
            "rpc": {
                "address": host,
                "port": port,
                "tls": {
                    "key": str(certs / "rpc.key"),
                    "certs": str(certs / "rpc.crt"),
                    "mutual": {"ca_certs": str(certs / "tmp-ca.crt")},
                },
            },
            "core": {
                "cert_dir": str(certs),
                "site_name": f"dstack-emu {side}",
                "attestation": {
                    "insecure_allow_external_trust_anchors": True,
                    "urls": {"pccs": self.services["pccs"]},
                    "root_ca": {"tdx": str(self.root_ca)},
                },
                "image": {"cache_dir": str(self.state / "images"), "download_url": IMAGE_URL},
                "auth_api": {"type": "webhook", "webhook": {"url": self.services[f"auth-{side}"]}},
                "onboard": {"address": host, "port": port},
            },
            "emulator": {"grpc": {"enabled": self.config.grpc}},
        }
        return KmsConfig.from_document(document, f"kms-{side}")

    def _note_url(self, side: str) -> None:
        self.services[f"kms-{side}"] = self.kms[side].url

    async def _start_app(self, image: OsImage) -> GuestAgent:
        self._progress("starting the app's trust domain")
        agent = GuestAgent(self._domain("app", image), self._seed.stream("app agent"))
        await self._serve_agent("app", "app", agent)
        return agent

    # ---- the authorization flow

    async def _make_ready(self) -> None:
        """Walk the runbook to its end: measure, allow, bootstrap, onboard, finish, boot the app."""
        fresh = [side for side in SIDES if self.kms[side].phase == "onboard"]
        if fresh:
            self._progress("measuring and allowing")
            for side in fresh:
                self.kms_info[side] = await self._measure(side)
            self._allow_everyone()
        if "src" in fresh:
            self._progress("bootstrapping kms-src")
            await self._ask("src", "Bootstrap", pb.BootstrapRequest(domain=KMS_DOMAIN), pb.BootstrapResponse)
            await self._finish("src")
        if "dst" in fresh:
            self._progress("onboarding kms-dst from kms-src")
            request = pb.OnboardRequest(source_url=f"{self.services['kms-src']}/prpc", domain=KMS_DOMAIN)
            await self._ask("dst", "Onboard", request, pb.OnboardResponse)
            await self._finish("dst")
        self._progress("booting the app through kms-src")
        try:
            await self._boot_app()
        except StackError as error:
            if fresh:
                raise
            # A resumed stack has the policy that it was left with: it comes up to have it changed.
            self._progress(f"{error}")
            self._progress("the app has no keys; the policy says so. All else is up")

    def _allow_everyone(self) -> None:
        domain = self.app.domain
        images = [info["os_image_hash"] for info in self.kms_info.values()] + [domain.image.os_image_hash.hex()]
        measured = [info["mr_aggregated"] for info in self.kms_info.values()]
        app = policy_files.AppRule(domain.app_id.hex(), domain.compose_hash.hex())
        for path in self.policies.values():
            if policy_files.is_placeholder(path):
                policy_files.write(path, policy_files.allow(images, measured, [app]))
            else:
                self._progress(f"keeping {path} as it is")

    async def _measure(self, side: str) -> dict[str, Any]:
        """Ask a KMS what it measures, as it says it to a person."""
        info = await self._ask(side, "GetAttestationInfo", Empty(), pb.AttestationInfoResponse)
        measured: dict[str, Any] = json.loads(encode_json(info))
        return measured

    def _remembered(self) -> dict[str, Any]:
        """The description that an earlier run left in this state folder, if any."""
        path = self.state / DESCRIPTION_FILE
        try:
            remembered = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StackError(f"{path} cannot be read ({error}): give another --state folder") from error
        return remembered if isinstance(remembered, dict) else {}

    async def _ask(self, side: str, method: str, request: Message, answer: type[M]) -> M:
        """Call one RPC of a KMS in its onboard phase."""
        async with PrpcClient(self.services[f"kms-{side}"], timeout=TIMEOUT) as client:
            try:
                return await client.call(f"prpc/Onboard.{method}", request, answer)
            except RpcError as error:
                raise StackError(f"kms-{side}: {method}: {error.text}") from error
            except TransportError as error:
                raise StackError(f"kms-{side}: {method}: {error}") from error

    async def _finish(self, side: str) -> None:
        await self._ask(side, "Finish", Empty(), Empty)
        try:
            await self.kms[side].reached_runtime()
        except KmsError as error:
            raise StackError(f"kms-{side}: {error}") from error
        self._note_url(side)

    async def _boot_app(self) -> None:
        url, entropy = self.services["kms-src"], self._seed.stream("app boot")
        try:
            keys, issuer = await fetch_keys(self.app.domain, url, self.verifier, entropy, ISSUED_AT)
            self._exit.push_async_callback(issuer.close)
            await self.app.provide(keys, issuer)
        except GuestError as error:
            raise StackError(f"app: {error}") from error

    # ---- what there is

    def description(self) -> dict[str, Any]:
        """Everything a client needs to know, as `--json` prints it."""
        app, folder = self.app.domain, self.state / "app"
        return {
            "services": dict(self.services),
            "grpc": dict(self.grpc),
            "policies": {side: str(path) for side, path in self.policies.items()},
            "root_ca": str(self.root_ca),
            "kms_ca": str(self.kms_ca),
            "kms": self.kms_info,
            "app": {
                "app_id": app.app_id.hex(),
                "instance_id": app.instance_id.hex(),
                "compose_hash": app.compose_hash.hex(),
                "dstack_sock": str(folder / "dstack.sock"),
                "tappd_sock": str(folder / "tappd.sock"),
                **({"grpc_sock": str(folder / "grpc.sock")} if self.config.grpc else {}),
            },
            "env": {
                "DSTACK_SIMULATOR_ENDPOINT": str(folder / "dstack.sock"),
                "TAPPD_SIMULATOR_ENDPOINT": str(folder / "tappd.sock"),
            },
            "state": str(self.state),
            "seed": self.config.seed,
            "fresh": self.config.fresh,
        }
