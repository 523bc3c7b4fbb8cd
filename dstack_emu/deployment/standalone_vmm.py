"""A VMM without a stack, for `dstack-emu vmm`: its machines get their keys from KMS that run elsewhere.

Its machines run on a platform of the emulated Intel of a seed, so a KMS must trust that Intel, and have its PCCS.
"""

import os
import socket
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from dstack_emu.attest.release import Release
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.deployment.clock import ISSUED_AT, StackClock, wall_clock
from dstack_emu.deployment.config import VMM_WORKLOADS
from dstack_emu.deployment.docker_machines import open_docker, ports_here
from dstack_emu.deployment.docker_workload import DockerWorkloads
from dstack_emu.deployment.guest_programs import ProgramSite
from dstack_emu.deployment.machine_site import MachineSite
from dstack_emu.deployment.machines import DomainMachines
from dstack_emu.deployment.process_workload import ProcessWorkloads
from dstack_emu.deployment.reach import InstanceReach
from dstack_emu.deployment.standalone import Standalone
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.listen import bind_tcp, bind_unix, discard, serve
from dstack_emu.transport.pccs_client import AttestationVerifier, PccsClient
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.discovery import DiscoveryFile
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.one_shot import OneShot, Prepared
from dstack_emu.vmm.server import vmm_app

UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class VmmSettings:
    """What is not in vmm.toml: the seed of the emulated Intel, and the root that KMS have, None for the seed's.

    `discovery` is the folder of discovery files, `config_file` the file that the configuration is from. `workload` is
    what runs in machines, `process` or `docker`, and `script_image` the image in whose containers scripts run with
    `docker` (empty: that of an app's first service).
    """

    config: VmmConfig
    release: Release
    seed: str
    pccs_url: str
    discovery: Path
    anchor: TrustAnchor | None = None
    config_file: Path | None = None
    workload: str = VMM_WORKLOADS[0]
    script_image: str = ""


class StandaloneVmm(Standalone):
    """A VMM at `url`. Enter it to start it; leaving it ends every machine, and keeps their folders."""

    def __init__(self, settings: VmmSettings) -> None:
        super().__init__()
        self.settings = settings
        self.url = ""
        self.discovery_file: Path | None = None

    async def _start(self) -> None:
        settings, config = self.settings, self.settings.config
        sock, address = _bound(config)
        self._exit.callback(discard, sock)
        try:
            site = _site(settings, self._exit, await self._docker())
        except OSError as error:
            raise _unusable(config, error) from error
        fleet = Fleet(
            config,
            DomainMachines(site),
            release=settings.release,
            clock=wall_clock,
            new_id=lambda: str(uuid.uuid4()),
            entropy=os.urandom,
        )
        app = vmm_app(fleet)
        try:
            self._exit.push_async_callback(fleet.close)
            await fleet.open()
        except OSError as error:
            raise _unusable(config, error) from error
        server = await serve(app, sock)
        self._exit.push_async_callback(server.close)
        self._exit.callback(fleet.end_followers)
        self.url = server.url
        discovered = DiscoveryFile.write(
            settings.discovery,
            address,
            config,
            config_file=settings.config_file,
            version=f"v{settings.release.version}",
            now=wall_clock(),
        )
        self._exit.callback(discovered.remove)
        self.discovery_file = discovered.path

    async def _docker(self) -> DockerWorkloads | None:
        """Open the engine if machines have containers."""
        settings, cvm = self.settings, self.settings.config.cvm
        if settings.workload != "docker":
            return None
        docker = await open_docker(
            settings.config.run_path.absolute(),
            pccs_url=settings.pccs_url,
            script_image=settings.script_image,
            host_ports=ports_here((settings.config.kms_url, *cvm.kms_urls, *cvm.gateway_urls, settings.pccs_url)),
            strict_pre_launch=settings.release.strict_pre_launch_script,
        )
        self._exit.push_async_callback(docker.close)
        return docker


def _unusable(config: VmmConfig, error: OSError) -> ConfigError:
    return ConfigError(f"run_path: {error.filename or config.run_path}: {error.strerror}")


async def prepare_machine(settings: VmmSettings, file: Path, folder: Path | None) -> Prepared:
    """Prepare the machine that a file describes, and start nothing; raise `VmmError`."""
    async with AsyncExitStack() as held:
        site = _site(settings, held)
        once = OneShot(
            file, settings.config, DomainMachines(site), settings.release, str(uuid.uuid4()), int(wall_clock() * 1000)
        )
        return once.prepare(folder)


def _site(settings: VmmSettings, held: AsyncExitStack, docker: DockerWorkloads | None = None) -> MachineSite:
    """Return what machines share; `held` closes it."""
    seed = Seed.of(settings.seed)
    intel = Intel(seed)
    pccs = PccsClient(settings.pccs_url)
    held.push_async_callback(pccs.close)
    anchor = settings.anchor or TrustAnchor.of(intel.root)
    programs = ProgramSite(
        settings.release, seed.child("vmm"), settings.pccs_url, anchor, wall_clock, lambda: ISSUED_AT
    )
    return MachineSite(
        intel=intel,
        seed=seed.child("vmm"),
        release=settings.release,
        images=settings.config.image.path,
        own_image=OsImage.from_seed(seed.derive, version=settings.release.version),
        verifier=AttestationVerifier(pccs, anchor, wall_clock),
        issued_at=lambda: ISSUED_AT,
        workloads=docker or ProcessWorkloads(programs),
        writes_environment=docker is None,
        clock=StackClock(),
        reach=InstanceReach(),
    )


def _bound(config: VmmConfig) -> tuple[socket.socket, str]:
    """Bind the configured address; return the socket, and the address as the discovery file has it."""
    address = config.address
    if address.startswith(UNIX):
        return bind_unix(address.removeprefix(UNIX), setting="address"), address
    host, colon, port = address.rpartition(":") if config.port is None else (address, ":", str(config.port))
    if not colon or not host or not port.isdecimal():
        raise ConfigError(f"address: unix:PATH, host:port, or host with the key port expected, got {address!r:.200}")
    sock = bind_tcp(host.strip("[]"), int(port), setting="address")
    number = sock.getsockname()[1]
    return sock, f"{host}:{number}"
