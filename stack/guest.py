"""One trust domain with its agent and, unless another is named, a PCCS of its own: what `dstack-emu agent` runs.

An agent without a KMS, as upstream's simulator is one; for the whole authorization flow there is `stack.stack`.
"""

import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attest.errors import FormatError
from attest.vmconfig import VmConfig
from simulator.agent import GuestAgent
from simulator.agent_server import dstack_app, tappd_app, tcp_app
from simulator.app_keys import LocalIssuer, OwnKeys
from simulator.guest_files import KeyFile, KmsAccess
from simulator.image import OsImage
from simulator.intel import Intel, VendorState
from simulator.pccs import pccs_app
from simulator.platform import PlatformState
from simulator.seed import DEFAULT_SEED, Seed
from simulator.trust_domain import AppCompose, DomainSettings, KeyProvider, TrustDomain
from stack.clock import ISSUED_AT
from transport.listen import bind_tcp, bind_unix, serve

DEFAULT_NAME = "app"


@dataclass(frozen=True, slots=True)
class Machine:
    """The VM: CPUs, memory in bytes, the image it boots. `config`, a whole vm_config text, goes before them."""

    image: str = "dstack-emu"
    version: str = "0.5.11"
    cpu_count: int = 2
    memory_size: int = 2 * 1024**3
    config: str | None = None


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """Settings of one emulated guest."""

    seed: str = DEFAULT_SEED
    platform: str = f"host of {DEFAULT_NAME}"
    compose: AppCompose = field(default_factory=lambda: AppCompose.named(DEFAULT_NAME))
    app_id: bytes | None = None
    machine: Machine = field(default_factory=Machine)
    settings: DomainSettings = field(default_factory=DomainSettings)
    platform_state: PlatformState = field(default_factory=PlatformState)
    vendor_state: VendorState = field(default_factory=VendorState)
    key_file: KeyFile | None = None
    allow_emit_event: bool = True


def power_on(intel: Intel, config: GuestConfig) -> TrustDomain:
    """Boot a trust domain of that configuration, up to where it needs keys."""
    seed, machine = Seed.of(config.seed), config.machine
    platform = intel.platform(config.platform)
    platform.state, intel.state = config.platform_state, config.vendor_state
    image = OsImage.from_seed(seed.derive, machine.image, machine.version)
    vm_config = image.vm_config(machine.cpu_count, machine.memory_size)
    if machine.config is not None:
        given = VmConfig.parse(machine.config)
        if given.tdx_measurement is not None:
            image, vm_config = OsImage.of_config(given), given
    domain = TrustDomain(
        platform,
        image,
        config.compose,
        instance_seed=seed.derive(f"instance {config.compose.name}", 32),
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
    ) -> None:
        self.config = config
        self._host, self._port, self._pccs_url = host, port, pccs_url
        self._dstack_sock, self._tappd_sock = dstack_sock, tappd_sock
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
        self.agent = await self._agent()
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

    async def _serve_pccs(self) -> str:
        server = await serve(pccs_app(self.intel), bind_tcp(self._host, 0))
        self._exit.push_async_callback(server.close)
        return server.url

    async def _agent(self) -> GuestAgent:
        seed = Seed.of(self.config.seed).child(f"guest {self.config.compose.name}")
        agent = GuestAgent(self.domain, seed.stream("agent"), allow_emit_event=self.config.allow_emit_event)
        file = self.config.key_file
        if file is None:
            provider = KeyProvider("none")
            self.domain.complete(provider)
            own = OwnKeys.from_seed(self.domain, seed.derive("sealing key", 32), provider, lambda: ISSUED_AT)
            await agent.provide(own.keys, own.issuer)
        elif isinstance(file.issuer, KmsAccess):
            raise FormatError(
                "key file: keys of a KMS cannot be used without it; boot an app through a KMS with `dstack-emu up`"
            )
        else:
            self.domain.complete(file.keys.provider)
            await agent.provide(file.keys, LocalIssuer(file.issuer, lambda: ISSUED_AT))
        return agent

    def description(self) -> dict[str, Any]:
        """Everything a client needs to know, as `--json` prints it."""
        domain, info = self.domain, self.agent.app_info()
        return {
            "dstack_url": self.url,
            "tappd_url": self.url,
            "dstack_sock": str(self.dstack_sock),
            "tappd_sock": str(self.tappd_sock),
            "pccs_url": self.pccs_url,
            "root_ca": str(self.root_ca),
            "app_id": domain.app_id.hex(),
            "instance_id": domain.instance_id.hex(),
            "device_id": domain.platform.device_id.hex(),
            "mr_aggregated": info.mr_aggregated.hex(),
            "os_image_hash": info.os_image_hash.hex(),
            "compose_hash": domain.compose_hash.hex(),
            "env": {
                "DSTACK_SIMULATOR_ENDPOINT": str(self.dstack_sock),
                "TAPPD_SIMULATOR_ENDPOINT": str(self.tappd_sock),
            },
        }
