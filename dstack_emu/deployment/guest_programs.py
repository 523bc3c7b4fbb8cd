"""The programs of dstack's own deployments, which run in a machine without containers: the KMS and two webhooks.

They are found by the name of their image. A KMS is configured by its kms.toml as it is written: paths are those of its
container, addresses those of its network. Two things cannot be as they are written: Intel's root and PCCS are those of
the emulated Intel, and the ports are free ones of this host.
"""

import asyncio
import contextlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

from dstack_emu.attest.release import Release
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.auth.mock import MockSettings
from dstack_emu.auth.server import mock_app, simple_app
from dstack_emu.auth.simple import SimpleSettings
from dstack_emu.deployment.compose_file import ComposeService
from dstack_emu.deployment.guest_network import HOST_IN_GUEST, LOOPBACK, ContainerFiles
from dstack_emu.deployment.workloads import Endpoint
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.dependencies import KmsInstruments
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.server import KmsServer
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.errors import ConfigError, ListenError
from dstack_emu.transport.http_client import Route
from dstack_emu.transport.listen import AnyApplication, Server, bind_tcp, serve
from dstack_emu.transport.pccs_client import AttestationVerifier, Clock, PccsClient
from dstack_emu.transport.production import reality_of
from dstack_emu.transport.settings import Section, read_toml
from dstack_emu.transport.trust_root import trust_anchor

KMS_FOLDER: Final = "/kms"
WEBHOOK_FOLDER: Final = "/app"
"""The folders in which the programs run, in their images."""
_WEBHOOK_PORT: Final = "3000"
_KMS_PROGRAM: Final = "dstack-kms"
_AGENT: Final = "/var/run/dstack.sock"
_PATH_KEYS: Final = frozenset({"htpasswd_file"})
"""Keys of kms.toml that have paths as text."""

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class ProgramSite:
    """What the programs of all machines share; `pccs` is the URL of the PCCS for this process."""

    release: Release
    seed: Seed
    pccs: str
    anchor: TrustAnchor
    clock: Clock
    issue_clock: Clock


@dataclass(frozen=True, slots=True)
class Container:
    """The surroundings of one program: its service, files and network, its randomness, and how it logs."""

    service: ComposeService
    files: ContainerFiles
    route: Route
    site: ProgramSite
    seed: Seed
    log: Callable[[str], None]

    @property
    def environment(self) -> Mapping[str, str]:
        """Its environment."""
        return self.service.environment or {}


class GuestProgram(Protocol):
    """A program in a machine."""

    async def start(self) -> None:
        """Start it; raise `GuestError` if it does not start."""
        ...

    def endpoint(self, port: int) -> Endpoint | None:
        """Return where a port of its container is."""
        ...

    async def wait(self) -> str:
        """Wait until it ends by itself; return why."""
        ...

    async def stop(self) -> None:
        """End it; do nothing if it does not run."""
        ...


def program_for(image: str, command: Sequence[str]) -> "Callable[[Container], GuestProgram] | None":
    """Return what runs a service with that image and command; None if it is none of ours.

    Any registry, tag and digest will do. The image of the KMS has other programs, too, which a command may name.
    """
    owner, _, name = re.sub(r"(@.*|:[^/]*)$", "", re.sub(r"@.*$", "", image)).rpartition("/")
    name = name.removeprefix("dstack-")
    if name == "kms" and (image.rpartition("/")[2].startswith("dstack-") or "dstack" in owner):
        return KmsProgram if _runs_kms(command) else None
    webhooks = {"auth-simple": SimpleProgram, "auth-mock": MockProgram}
    return webhooks.get(name.removeprefix("kms-"))


def _words(command: Sequence[str]) -> list[str]:
    return [word for each in command for word in re.split(r"[\s;&|'\"]+", each) if word]


def _runs_kms(command: Sequence[str]) -> bool:
    words = _words(command)
    return not words or words[0].startswith("-") or any(word.rpartition("/")[2] == _KMS_PROGRAM for word in words)


class KmsProgram:
    """The KMS."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._written: KmsConfig | None = None
        self._server: KmsServer | None = None
        self._onboard: Endpoint | None = None

    async def start(self) -> None:
        """Start it by its kms.toml."""
        container, site = self._container, self._container.site
        try:
            written = self._written = self._read()
            sock = bind_tcp(LOOPBACK, 0)
            try:
                config = _placed(written, container.files, sock.getsockname()[1])
                self._require_emulated(config)
                config.core.cert_dir.mkdir(parents=True, exist_ok=True)
                self._server = KmsServer(
                    config,
                    self._agent(),
                    entropy=container.seed.stream("kms"),
                    clock=site.clock,
                    issue_clock=site.issue_clock,
                    sock=sock,
                    environment=container.environment,
                    instruments=KmsInstruments(verifier=self._verifier(written), route=container.route),
                    release=site.release,
                )
                await self._server.start()
                self._onboard = _address(self._server.url)
            except BaseException:
                sock.close()
                raise
        except (KmsError, ConfigError, ListenError) as error:
            raise GuestError(f"{container.service.name}: {error}") from error
        except OSError as error:
            raise GuestError(f"{container.service.name}: {error.filename}: {error.strerror}") from error

    def _read(self) -> KmsConfig:
        """Read the file that the command names, the one that is mounted as kms.toml, or none."""
        service, files = self._container.service, self._container.files
        words = _words(service.command)
        named = [after for word, after in itertools.pairwise(words) if word in ("-c", "--config")]
        path = named[-1] if named else f"{KMS_FOLDER}/kms.toml"
        file = files.locate(path, KMS_FOLDER)
        if not named and not file.exists():
            path = "/etc/kms/kms.toml"
            file = files.locate(path)
        if not named and not file.exists():
            return KmsConfig()
        try:
            return KmsConfig.from_document(read_toml(file), path)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(file), path)) from error

    def _require_emulated(self, config: KmsConfig) -> None:
        """Refuse a file that names Intel's root, or with a root of its own a PCCS for real hardware."""
        attestation = config.core.attestation
        if attestation.root_ca.tdx is None:
            return  # see _verifier
        with contextlib.suppress(ConfigError):  # the KMS reports it in upstream's words
            if real := reality_of(trust_anchor(attestation), config.core.pccs):
                raise GuestError(f"{self._container.service.name}: {real}, and this KMS is an emulator")

    def _agent(self) -> str:
        address = self._container.environment.get("DSTACK_AGENT_ADDRESS") or f"unix:{_AGENT}"
        if not address.startswith("unix:"):
            raise GuestError(f"DSTACK_AGENT_ADDRESS: unix:/path expected, got {address!r:.100}")
        return f"unix:{self._container.files.locate(address.removeprefix('unix:'))}"

    def _verifier(self, written: KmsConfig) -> AttestationVerifier | None:
        """Return the verifier under the emulated Intel's root, unless the file names a root of its own."""
        core, site = written.core, self._container.site
        if core.attestation.root_ca.tdx is not None:
            return None
        if urlsplit(core.pccs).hostname == HOST_IN_GUEST:
            pccs = PccsClient(core.pccs, route=self._container.route)
        else:
            pccs = PccsClient(site.pccs, revalidates_at_once=True)
            instead = f" instead of {core.pccs}" if core.pccs else ""
            self._container.log(f"quotes are verified with the collateral of {site.pccs}{instead}")
        self._container.log("quotes are verified under the emulated Intel's root, in place of Intel's")
        return AttestationVerifier(pccs, site.anchor, site.clock)

    def endpoint(self, port: int) -> Endpoint | None:
        """Return where its RPC, onboard or admin port is."""
        written, server = self._written, self._server
        if written is None or server is None or server.phase == "stopped":
            return None
        rpc, onboard, admin = written.rpc, written.core.onboard, written.core.admin
        if port == rpc.port:  # also in the onboard phase, if that has no other port
            return _address(f"//{server.runtime_address}")
        if port == onboard.port and server.phase == "onboard":
            return self._onboard
        if admin.enabled and port == admin.port and server.admin_url is not None:
            return _address(server.admin_url)
        return None

    async def wait(self) -> str:
        """Wait until it ends."""
        assert self._server is not None  # noqa: S101 - it was started
        try:
            await self._server.wait()
        except KmsError as error:
            return str(error)
        return "ended"

    async def stop(self) -> None:
        """End it."""
        if self._server is not None:
            await self._server.stop()


def _address(url: str) -> Endpoint:
    parts = urlsplit(url)
    return parts.hostname or LOOPBACK, parts.port or 0


def _placed(config: KmsConfig, files: ContainerFiles, port: int) -> KmsConfig:
    """Return a configuration with the paths and ports of this host: its own port, and free ones for the others."""
    placed = _relocated(config, lambda path: files.locate(path, KMS_FOLDER))
    rpc, onboard = config.rpc, config.core.onboard
    shared = (rpc.address, rpc.port) == (onboard.address, onboard.port)
    core = placed.core.model_copy(
        update={
            "onboard": placed.core.onboard.model_copy(update={"address": LOOPBACK, "port": port if shared else 0}),
            "admin": placed.core.admin.model_copy(update={"address": LOOPBACK, "port": 0}),
        }
    )
    return placed.model_copy(
        update={
            "rpc": placed.rpc.model_copy(update={"address": LOOPBACK, "port": port}),
            "core": core,
            "emulator": placed.emulator.model_copy(update={"grpc": type(placed.emulator.grpc)()}),
        }
    )


def _relocated(section: S, locate: Callable[[PurePath | str], Path]) -> S:
    """Return a section whose paths are replaced."""
    changed: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            changed[name] = _relocated(value, locate)
        elif isinstance(value, Path):
            changed[name] = locate(value)
        elif name in _PATH_KEYS and value:
            changed[name] = str(locate(value))
    return section.model_copy(update=changed)


class WebhookProgram:
    """A webhook, of either kind."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._server: Server | None = None
        self._port = 0

    def _app(self) -> AnyApplication:
        raise NotImplementedError

    async def start(self) -> None:
        """Start it by its environment."""
        container = self._container
        port = container.environment.get("PORT") or _WEBHOOK_PORT
        if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise GuestError(f"{container.service.name}: PORT: a port expected, got {port!r:.40}")
        try:
            self._server = await serve(self._app(), bind_tcp(LOOPBACK, 0))
        except ConfigError as error:
            raise GuestError(f"{container.service.name}: {error}") from error
        self._port = int(port)

    def endpoint(self, port: int) -> Endpoint | None:
        """Return where its port is."""
        return _address(self._server.url) if self._server is not None and port == self._port else None

    async def wait(self) -> str:
        """Wait for ever: it does not end by itself."""
        await asyncio.Event().wait()
        return ""

    async def stop(self) -> None:
        """End it."""
        if self._server is not None:
            await self._server.close()
            self._server = None


class SimpleProgram(WebhookProgram):
    """auth-simple, which reads its policy at every request from the file in the machine's folder."""

    def _app(self) -> AnyApplication:
        container = self._container
        contract = container.site.release.auth_contract
        settings = SimpleSettings.from_env(container.environment, default_contract=contract)
        path = container.files.locate(settings.config_path, WEBHOOK_FOLDER)
        path.parent.mkdir(parents=True, exist_ok=True)
        return simple_app(path, contract=settings.contract)


class MockProgram(WebhookProgram):
    """auth-mock."""

    def _app(self) -> AnyApplication:
        return mock_app(MockSettings.from_env(self._container.environment))
