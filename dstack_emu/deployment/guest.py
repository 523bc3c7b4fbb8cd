"""One trust domain with its agent and, unless another is named, a PCCS of its own: what `agent` and `boot` run.

`dstack-emu agent` has keys of its own or of a file, as upstream's simulator; `dstack-emu boot` gets them from a KMS
that runs elsewhere. For the whole authorization flow in one process there is `deployment.stack`.
"""

import asyncio
import logging
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from dstack_emu.attest.app_info import os_image_hash
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.deployment.clock import ISSUED_AT
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.agent_server import dstack_app, tappd_app, tcp_app
from dstack_emu.simulator.app_keys import AppKeys, CertificateIssuer, LocalIssuer, OwnKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.guest_files import KeyFile, KmsAccess
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import load_image
from dstack_emu.simulator.intel import Intel, VendorState
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.simulator.trust_domain import AppCompose, DomainSettings, KeyProvider, TrustDomain
from dstack_emu.transport.listen import bind_tcp, bind_unix, reachable, reserve_unix, serve

DEFAULT_NAME = "app"
RETRY_PAUSE: Final = 0.5
"""Seconds between two questions to a KMS that is not there yet."""

log = logging.getLogger("dstack_emu.stack")


@dataclass(frozen=True, slots=True)
class Machine:
    """The VM: CPUs, memory in bytes, the image it boots.

    `directory`, an image of its own, goes before the image's name and version; `config`, a whole vm_config text that
    carries a measurement document, before all.
    """

    image: str = "dstack-emu"
    version: str = "0.5.11"
    cpu_count: int = 2
    memory_size: int = 2 * 1024**3
    config: str | None = None
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class KmsBoot:
    """Where a guest gets its keys: the KMS's URL (`https://host:port`), and for how many seconds it may be missing yet.

    With `measures_kms` the guest measures the KMS, as 0.5.x does. With `keeps_asking` it listens at once, without keys,
    and asks until it gets them, whatever the refusal.
    """

    url: str
    measures_kms: bool = False
    patience: float = 0.0
    keeps_asking: bool = False


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """Settings of one emulated guest. It has keys of `kms`, else of `key_file`, else its own.

    A guest with keys of its own says that `key_provider` gave them.
    """

    seed: str = DEFAULT_SEED
    platform: str = f"host of {DEFAULT_NAME}"
    compose: AppCompose = field(default_factory=lambda: AppCompose.named(DEFAULT_NAME))
    app_id: bytes | None = None
    instance: str = ""
    machine: Machine = field(default_factory=Machine)
    settings: DomainSettings = field(default_factory=DomainSettings)
    platform_state: PlatformState = field(default_factory=PlatformState)
    vendor_state: VendorState = field(default_factory=VendorState)
    key_file: KeyFile | None = None
    kms: KmsBoot | None = None
    key_provider: Literal["none", "local-sgx"] = "none"
    allow_emit_event: bool = True

    @property
    def name(self) -> str:
        """The app's name, with the instance's where it has one."""
        return f"{self.compose.name}: {self.instance}" if self.instance else self.compose.name


def instance_seed(seed: Seed, name: str) -> bytes:
    """What the instance id of a guest of that name grows from, 32 bytes."""
    return seed.derive(f"instance {name}", 32)


def local_key_provider(seed: Seed, name: str) -> KeyProvider:
    """The local key provider, an SGX enclave, of a guest of that name."""
    return KeyProvider("local-sgx", seed.derive(f"key provider of {name}", 32).hex())


def power_on(intel: Intel, config: GuestConfig) -> TrustDomain:
    """Boot a trust domain of that configuration, up to where it needs keys."""
    seed, machine = Seed.of(config.seed), config.machine
    platform = intel.platform(config.platform)
    platform.state, intel.state = config.platform_state, config.vendor_state
    image = (
        OsImage.from_seed(seed.derive, machine.image, machine.version)
        if machine.directory is None
        else load_image(machine.directory)
    )
    vm_config = image.vm_config(machine.cpu_count, machine.memory_size)
    if machine.config is not None:
        given = VmConfig.parse(machine.config)
        if given.tdx_measurement is not None and machine.directory is None:
            image, vm_config = OsImage.of_config(given), given
    domain = TrustDomain(
        platform,
        image,
        config.compose,
        instance_seed=instance_seed(seed, config.name),
        vm_config=vm_config,
        claimed_config=machine.config,
        app_id=config.app_id,
        settings=config.settings,
    )
    domain.boot()
    return domain


class Guest:
    """A running guest. Enter it to start; leaving it stops every listener."""

    def __init__(
        self,
        config: GuestConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        pccs_url: str | None = None,
        dstack_sock: Path | None = None,
        tappd_sock: Path | None = None,
        grpc: tuple[str, int] | None = None,
        grpc_sock: Path | None = None,
        progress: Callable[[str], None] = log.info,
    ) -> None:
        self.config, self._progress = config, progress
        self._host, self._port, self._pccs_url = host, port, pccs_url
        self._dstack_sock, self._tappd_sock = dstack_sock, tappd_sock
        self._grpc, self._grpc_sock = grpc, grpc_sock
        self.grpc: dict[str, str] = {}
        self._kms_url = "" if config.kms is None else config.kms.url.rstrip("/")
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    async def _start(self) -> None:
        sock = bind_tcp(self._host, self._port, setting="--listen HOST:PORT")
        self._exit.callback(sock.close)
        folder = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="dstack-emu-")))
        self.intel = Intel(Seed.of(self.config.seed))
        self.root_ca = folder / "root-ca.pem"
        self.root_ca.write_text(self.intel.root_pem)
        self.pccs_url = self._pccs_url or await self._serve_pccs()
        self.domain = power_on(self.intel, self.config)
        self._kms_ca = folder / "kms-ca.pem"
        seed = Seed.of(self.config.seed).child(f"guest {self.config.name}")
        self.agent = GuestAgent(self.domain, seed.stream("agent"), allow_emit_event=self.config.allow_emit_event)
        kms = self.config.kms
        if kms is None or not kms.keeps_asking:
            await self._provide(*await self._keys(seed))
        self.dstack_sock = self._dstack_sock or folder / "dstack.sock"
        self.tappd_sock = self._tappd_sock or folder / "tappd.sock"
        for app, path, option in (
            (dstack_app(self.agent), self.dstack_sock, "--dstack-sock"),
            (tappd_app(self.agent), self.tappd_sock, "--tappd-sock"),
        ):
            unix = await serve(app, bind_unix(path, setting=option))
            self._exit.push_async_callback(unix.close)
        server = await serve(tcp_app(self.agent), sock)
        self._exit.push_async_callback(server.close)
        self.url = server.url
        if self._grpc is not None or self._grpc_sock is not None:
            await self._serve_grpc()
        if kms is not None and kms.keeps_asking:
            asking = asyncio.create_task(self._keep_asking(seed, kms), name="guest asks for its keys")
            self._exit.push_async_callback(_cancelled, asking)

    async def _serve_grpc(self) -> None:
        from dstack_emu.simulator.agent_grpc import serve_agent  # costs time and memory that nobody else should pay

        sock = path = None
        if self._grpc_sock is not None:
            path = self.grpc["grpc_sock"] = reserve_unix(self._grpc_sock, setting="--grpc-sock")
        if self._grpc is not None:
            sock = bind_tcp(*self._grpc, setting="--grpc HOST:PORT")
            self._exit.callback(sock.close)
            self.grpc["grpc_target"] = reachable(sock)
        server = await serve_agent(self.agent, sock, path)
        self._exit.push_async_callback(server.close)

    async def _serve_pccs(self) -> str:
        server = await serve(pccs_app(self.intel), bind_tcp(self._host, 0))
        self._exit.push_async_callback(server.close)
        return server.url

    async def _provide(self, keys: AppKeys, issuer: CertificateIssuer) -> None:
        if self._kms_url:
            self._kms_ca.write_text(keys.ca_cert)
        await self.agent.provide(keys, issuer)

    async def _keep_asking(self, seed: Seed, kms: KmsBoot) -> None:
        given: tuple[AppKeys, CertificateIssuer] | None = None
        said = ""
        while True:
            try:
                given = given or await self._keys(seed)
                await self._provide(*given)
            except GuestError as error:
                if str(error) != said:
                    said = str(error)
                    self._progress(f"no keys yet: {error}")
                await asyncio.sleep(RETRY_PAUSE)
            else:
                self._progress(f"keys from {kms.url}")
                return

    async def _keys(self, seed: Seed) -> tuple[AppKeys, CertificateIssuer]:
        """Get the keys, and measure where they came from; an issuer's connections are closed with the guest."""
        file = self.config.key_file
        if self.config.kms is not None:
            from dstack_emu.deployment.kms_boot import (
                boot_through_kms,  # with what judges a KMS, which costs an agent of its own a start
            )

            return await boot_through_kms(self, self.config.kms, seed.stream("boot"), self._exit, self._progress)
        if file is None:
            own_seed, name = Seed.of(self.config.seed), self.config.compose.name
            local = self.config.key_provider == "local-sgx"
            provider = local_key_provider(own_seed, name) if local else KeyProvider("none")
            self.domain.complete(provider)
            own = OwnKeys.from_seed(self.domain, seed.derive("sealing key", 32), provider, lambda: ISSUED_AT)
            return own.keys, own.issuer
        if isinstance(file.issuer, KmsAccess):
            self._kms_url = file.issuer.url.removesuffix("/prpc")
            # What a KMS answers with the keys is the hash that the guest claims.
            claimed = os_image_hash(self.domain.vm_config_json)
            self.domain.complete(file.keys.provider, os_image_hash=claimed)
            from dstack_emu.simulator.guest_boot import kms_issuer  # likewise

            entropy = seed.stream("boot")
            issuer = await kms_issuer(self.domain, file.issuer, file.keys.ca_cert, entropy, ISSUED_AT)
            self._exit.push_async_callback(issuer.close)
            return file.keys, issuer
        self.domain.complete(file.keys.provider)
        return file.keys, LocalIssuer(file.issuer, lambda: ISSUED_AT)

    def description(self) -> dict[str, Any]:
        """Everything a client needs to know, as `--json` prints it."""
        domain, info = self.domain, self.agent.app_info()
        return {
            "dstack_url": self.url,
            "tappd_url": self.url,
            "dstack_sock": str(self.dstack_sock),
            "tappd_sock": str(self.tappd_sock),
            **self.grpc,
            "pccs_url": self.pccs_url,
            "root_ca": str(self.root_ca),
            "app_id": domain.app_id.hex(),
            "instance_id": domain.instance_id.hex(),
            "device_id": domain.platform.device_id.hex(),
            "mr_aggregated": info.mr_aggregated.hex(),
            "os_image_hash": info.os_image_hash.hex(),
            "compose_hash": domain.compose_hash.hex(),
            **self._kms_description(),
            "env": {
                "DSTACK_SIMULATOR_ENDPOINT": str(self.dstack_sock),
                "TAPPD_SIMULATOR_ENDPOINT": str(self.tappd_sock),
            },
        }

    def _kms_description(self) -> dict[str, str]:
        if not self._kms_url:
            return {}
        description = {"kms_url": self._kms_url, "kms_ca": str(self._kms_ca)}
        if self.agent.has_keys:
            description["gateway_app_id"] = self.agent.keys.gateway_app_id
        return description


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
