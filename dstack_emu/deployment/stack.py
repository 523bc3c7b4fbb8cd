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
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.prpc import encode_json
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.auth.server import simple_app
from dstack_emu.control.api import Control
from dstack_emu.control.server import control_app
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.config import DESCRIPTION_FILE, GRPC_PORTS, IMAGE_URL, PORTS, StackConfig, StackError
from dstack_emu.deployment.guests import GuestSpec, RunningGuest, start_guest
from dstack_emu.deployment.instrumentation import Instrumentation
from dstack_emu.deployment.kms import KmsSpec, RunningKms, start_kms
from dstack_emu.deployment.service_logs import ServiceLogs
from dstack_emu.deployment.supervision import Supervisor
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.server import KmsServer
from dstack_emu.observability.journal import JournalError
from dstack_emu.observability.middleware import decision_recorder
from dstack_emu.observability.recorders import RecordingVerifier, verdict_recorder
from dstack_emu.observability.spans import headers_of
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import ImageFileError, load_image
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.verifier.server import verifier_app
from dstack_emu.verifier.service import Verifier

KMS_DOMAIN: Final = "127.0.0.1"
"""The name in the KMS's certificates, an IP address there: the printed URLs verify under the KMS's root."""

LOOPBACK: Final = "127.0.0.1"
TIMEOUT: Final = 30.0
SIDES: Final = ("src", "dst")

Progress = Callable[[str], None]
M = TypeVar("M", bound=Message)

log = logging.getLogger("dstack_emu.stack")


class Stack:
    """One deployment. Enter it to bring it up; leaving it stops every part.

    When a part fails meanwhile, the block is cancelled and ends with a `PartEndedError`. `services` has URLs, `intel`
    and `root_ca` the trust root, `kms_info` what both KMS measure, `app.domain` the app, `logs` what the parts log;
    `control` is what can be done to it.
    """

    def __init__(self, config: StackConfig | None = None, progress: Progress = log.info) -> None:
        self.config = config or StackConfig()
        self._progress = progress
        self._exit = AsyncExitStack()
        self._watch: Supervisor | None = None
        self.logs = ServiceLogs()
        self._sockets: dict[str, socket.socket] = {}
        self.services: dict[str, str] = {}
        self.grpc: dict[str, str] = {}
        self.guests: dict[str, RunningGuest] = {}
        self.kms: dict[str, KmsServer] = {}
        self.kms_parts: dict[str, RunningKms] = {}
        self.kms_info: dict[str, dict[str, Any]] = {}
        self.control = Control(self)

    async def __aenter__(self) -> Self:
        self.logs.attach()
        self._exit.callback(self.logs.detach)
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        self._watch = Supervisor({f"kms-{side}": kms.wait for side, kms in self.kms.items()})
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
        self.seed = Seed.of(config.seed)
        try:
            self.world = Instrumentation(
                self.seed, patience=config.patience, kept=config.journal_size, journal_file=config.journal
            )
        except JournalError as error:
            raise StackError(f"--journal: {error}") from error
        self.world.journal.scrub = self._scrub
        self._exit.callback(self.world.journal.close)
        self.intel = Intel(self.seed)
        self.root_ca = self.state / "root-ca.pem"
        self.root_ca.write_text(self.intel.root_pem)
        self.kms_ca = self.state / "kms-src" / "certs" / ROOT_CA_CERT
        self.image = self._image()
        await self._serve("pccs", self.world.around("pccs", pccs_app(self.intel), stale=self._stale))
        self.verifier = self.verifier_of("app")
        self._exit.push_async_callback(self.verifier.pccs.close)
        await self._serve_verifier()
        self.policies = self._prepare_policies()
        for side in SIDES:
            await self._serve(f"auth-{side}", self.auth_app(side))
        for side in SIDES:
            self._progress(f"starting kms-{side}")
            await start_kms(self, KmsSpec(name=side))
        self._progress("starting the app's trust domain")
        self.app = await start_guest(self, GuestSpec(name="app"), "app")
        self._exit.push_async_callback(self._close_parts)
        await self._serve("control", control_app(self.control))
        # Before anything closes: a server waits for its calls, and they would wait for the fault to be lifted.
        self._exit.callback(self.world.faults.clear)
        if not config.fresh:
            await self._make_ready()
        else:
            self.kms_info |= {side: await self.measure(side) for side in SIDES if self.kms[side].phase == "onboard"}
        (self.state / DESCRIPTION_FILE).write_text(json.dumps(self.description()) + "\n")
        self.control.became_ready()

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
            # Whoever reaches the control API has the whole stack in hand: this machine's programs, and nobody else.
            host = LOOPBACK if name == "control" else self.config.host
            if host != LOOPBACK:
                moved = f"--listen {self.config.host}, {moved}"
            sock = bind_tcp(host, self.config.ports.get(name, default), setting=moved)
            self._exit.callback(sock.close)
            self._sockets[name] = sock

    async def _serve(self, name: str, app: web.Application) -> None:
        with self.logs.of(name):
            server = await serve(app, self._sockets[name])
        self._exit.push_async_callback(server.close)
        self.services[name] = server.url

    def _image(self) -> OsImage:
        """The image that every trust domain boots, unless it names another."""
        folder = self.config.image_dir
        if folder is None:
            return OsImage.from_seed(self.seed.derive)
        try:
            return load_image(folder)
        except ImageFileError as error:
            raise StackError(str(error)) from error

    async def _serve_verifier(self) -> None:
        """Judge for anybody who asks, with the KMS's own cache of images."""
        images = ImageStore(self.state / "images", IMAGE_URL, TIMEOUT)
        self._exit.push_async_callback(images.close)
        judge = self.verifier_of("verifier")
        self._exit.push_async_callback(judge.pccs.close)
        app = verifier_app(Verifier(judge, images), observer=verdict_recorder(self.world.journal))
        await self._serve("verifier", self.world.around("verifier", app))

    async def _close_parts(self) -> None:
        for kms in reversed(self.kms_parts.values()):
            await kms.close()
        for guest in reversed(self.guests.values()):
            await guest.close()

    def verifier_of(self, caller: str) -> RecordingVerifier:
        """Make who judges for one part."""
        return self.world.verifier(caller, self.services["pccs"], TrustAnchor(self.intel.root_der))

    def auth_app(self, side: str) -> web.Application:
        """Make the webhook over one policy file."""
        path = str(self.policies[side])
        return self.world.around(f"auth-{side}", simple_app(path, observer=decision_recorder(path)))

    def take_socket(self, service: str) -> socket.socket | None:
        """The bound socket of a service that the stack begins with; None where it has no port of its own."""
        return self._sockets.get(service)

    async def _stale(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer for the PCCS with documents that have expired: its handlers read the state, and never wait."""
        before = self.intel.state
        self.intel.state = replace(
            before,
            tcb_info_dating="expired",
            qe_identity_dating="expired",
            pck_crl_dating="expired",
            root_ca_crl_dating="expired",
        )
        try:
            return await handler(request)
        finally:
            self.intel.state = before

    def _scrub(self, text: str) -> str:
        """Put names in place of what differs from run to run: ports, and the state folder."""
        for name, url in self.services.items():
            text = text.replace(url.partition("://")[2], name)
        return text.replace(str(self.state), "STATE")

    def _prepare_policies(self) -> dict[str, Path]:
        folder = (self.config.policies or self.state / "policies").absolute()
        try:
            paths = {side: folder / f"auth-{side}.json" for side in SIDES}
            policy_files.place(paths.values())
        except OSError as error:
            raise StackError(f"the policies folder {folder} cannot be written: {error.strerror}") from error
        return paths

    # ---- the authorization flow

    async def _make_ready(self) -> None:
        """Walk the runbook to its end: measure, allow, bootstrap, onboard, finish, boot the app."""
        fresh = [side for side in SIDES if self.kms[side].phase == "onboard"]
        if fresh:
            self._progress("measuring and allowing")
            for side in fresh:
                self.kms_info[side] = await self.measure(side)
            self._allow_everyone()
        if "src" in fresh:
            self._progress("bootstrapping kms-src")
            await self.give_keys("src", None)
        if "dst" in fresh:
            self._progress("onboarding kms-dst from kms-src")
            await self.give_keys("dst", "src")
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
        app = policy_files.AppRule(domain.app_id.hex(), domain.compose_hash.hex())
        apps = {app: domain.image.os_image_hash.hex()}
        policy_files.admit(self.policies.values(), self.kms_info.values(), apps, self._progress)

    async def measure(self, side: str) -> dict[str, Any]:
        """Ask a KMS what it measures, as it says it to a person."""
        info = await self.ask(side, "GetAttestationInfo", Empty(), pb.AttestationInfoResponse)
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

    async def ask(self, side: str, method: str, request: Message, answer: type[M]) -> M:
        """Call one RPC of a KMS in its onboard phase."""
        url, headers = self.services[f"kms-{side}"], headers_of("stack")
        async with PrpcClient(url, timeout=TIMEOUT, headers=headers) as client:
            try:
                return await client.call(f"prpc/Onboard.{method}", request, answer)
            except RpcError as error:
                raise StackError(f"kms-{side}: {method}: {error.text}") from error
            except TransportError as error:
                raise StackError(f"kms-{side}: {method}: {error}") from error

    async def give_keys(self, side: str, source: str | None) -> None:
        """Let a fresh KMS make keys, or take over those of another one, and end its onboard phase."""
        if source is None:
            await self.ask(side, "Bootstrap", pb.BootstrapRequest(domain=KMS_DOMAIN), pb.BootstrapResponse)
        else:
            request = pb.OnboardRequest(source_url=f"{self.services[f'kms-{source}']}/prpc", domain=KMS_DOMAIN)
            await self.ask(side, "Onboard", request, pb.OnboardResponse)
        await self.finish(side)

    def note_url(self, side: str) -> None:
        """Note where a KMS answers: the scheme follows its phase."""
        self.services[f"kms-{side}"] = self.kms[side].url

    async def finish(self, side: str) -> None:
        """End a KMS's onboard phase, and wait until it answers over TLS."""
        await self.ask(side, "Finish", Empty(), Empty)
        try:
            await self.kms[side].reached_runtime()
        except KmsError as error:
            raise StackError(f"kms-{side}: {error}") from error
        self.note_url(side)

    async def _boot_app(self) -> None:
        try:
            await self.app.boot(self, "src")
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
