"""What runs the machines of a VMM: each is a trust domain of this process, which boots as a CVM does.

The guest's agent runs on its sockets and behind its mapped port; what else runs is the workload's. The boot is reported
by the host API in upstream's steps. Source: dstack `dstack-util/src/system_setup.rs`, and the scripts
`dstack-prepare.sh` and `app-compose.sh`, at 312dc605.
"""

import asyncio
import datetime
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from google.protobuf.message import Message

from dstack_emu.attest.encrypted_env import MAX_FILE_SIZE as MAX_ENV_SIZE
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.image.memory import HIGH_MEMORY, LOW_MEMORY
from dstack_emu.attest.release import Release
from dstack_emu.deployment.agent_listeners import AgentAddresses, AgentListeners, SocketFile
from dstack_emu.deployment.guest_config import local_key_provider
from dstack_emu.deployment.workloads import BootedGuest, Workload, Workloads
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.app_keys import AppKeys, CertificateIssuer, OwnKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.guest_boot import KmsIssuer, fetch_keys
from dstack_emu.simulator.guest_files import decrypt_environment, remove_environment, write_environment
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import load_image
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, KeyProvider, TrustDomain
from dstack_emu.transport.errors import ListenError
from dstack_emu.transport.listen import bind_tcp
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.machine import HostApi, Launch

HOST_IN_GUEST: Final = "10.0.2.2"
"""The address at which a machine reaches its host, in the user-mode network of QEMU."""
LOOPBACK: Final = "127.0.0.1"
AGENT_PORT: Final = 8090
MEGABYTE: Final = 1024**2


@dataclass(frozen=True, slots=True)
class MachineSite:
    """What the machines of one host share.

    `verifier` verifies the evidence of a KMS, `issued_at` is the time for certificates in Unix seconds, `images` the
    folder of OS images, `own_image` the one that exists without a folder, and `workloads` makes what runs beside the
    agents.
    """

    intel: Intel
    seed: Seed
    release: Release
    images: Path
    own_image: OsImage
    verifier: AttestationVerifier
    issued_at: Callable[[], int]
    workloads: Workloads
    headers: Callable[[str], Callable[[], Mapping[str, str]]] | None = None

    def image(self, name: str) -> OsImage:
        """Return the OS image of that name; raise `VmmError` if there is none."""
        folder = self.images / name
        if not folder.exists() and name == f"{self.own_image.name}-{self.own_image.version}":
            return self.own_image
        try:
            return load_image(folder)
        except FormatError as error:
            raise VmmError(f"Failed to load image: {error}") from error


@dataclass(frozen=True, slots=True)
class DomainMachines:
    """Starts machines as trust domains of this process."""

    site: MachineSite

    def check(self, launch: Launch) -> None:
        """Raise `VmmError` if the machine's image cannot be loaded."""
        self.site.image(launch.manifest.image)

    async def start(self, launch: Launch, host: HostApi) -> "DomainMachine":
        """Start a machine, and return while it boots."""
        machine = DomainMachine(self.site, launch, host)
        machine.start()
        return machine


@dataclass(slots=True)
class DomainMachine:
    """One machine that runs."""

    site: MachineSite
    launch: Launch
    host: HostApi
    _task: "asyncio.Task[None] | None" = None
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _power_off: asyncio.Event = field(default_factory=asyncio.Event)
    workload: Workload | None = None

    # ---- the machine

    def start(self) -> None:
        """Switch it on."""
        self._task = asyncio.create_task(self._run(), name=f"guest {self.launch.manifest.id}")

    async def wait(self) -> None:
        """Wait until it has ended."""
        await self._ended.wait()

    async def stop(self) -> None:
        """End it at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def shutdown(self) -> None:
        """Let its guest power off."""
        self._power_off.set()

    async def guest_call(self, method: str) -> Message:
        """Call its guest API, which this guest does not have yet."""
        raise VmmError(f"guest API: {method} is not answered by this guest")

    async def _run(self) -> None:
        try:
            async with AsyncExitStack() as held:
                self.host.log(f"===== boot @ {datetime.datetime.now(datetime.UTC).isoformat()} =====\n")
                await self._boot(held)
                await self._power_off.wait()
                self.host.notify("shutdown.progress", "powering off")
        except (GuestError, AttestError, ListenError) as error:
            self._report(error)
        finally:
            self._ended.set()

    # ---- the guest's boot

    def _progress(self, text: str) -> None:
        self.host.log(f"[dstack] {text}\n")
        self.host.notify("boot.progress", text)

    async def _boot(self, held: AsyncExitStack) -> None:
        domain = self._power_on()
        agent = GuestAgent(domain, self._seed.stream("agent"))
        domain.boot()
        held.push_async_callback((await self._listen(agent, held)).close)
        self._progress("requesting app keys")
        keys, issuer = await self._keys(domain)
        if isinstance(issuer, KmsIssuer):
            held.push_async_callback(issuer.close)
        self._progress("initializing data disk")
        self._report_instance(domain)
        self._progress("data disk ready")
        environment = decrypt_environment(domain, self.launch.encrypted_env, keys)
        await agent.provide(keys, issuer)
        if self.launch.encrypted_env:
            held.callback(remove_environment, self.launch.folder)
            write_environment(self.launch.folder, environment)
        self._log_measurements(agent)
        await self._start_workload(BootedGuest(self.launch, self.host, domain, self._run_folder, environment), held)

    async def _start_workload(self, guest: BootedGuest, held: AsyncExitStack) -> None:
        """Start what runs beside the agent; the agent runs on if that cannot be started."""
        self.workload = self.site.workloads.of(guest)
        held.push_async_callback(self.workload.stop)
        try:
            await self.workload.start()
        except GuestError as error:
            self._report(error)
        else:
            self._progress("done")

    def _report(self, error: Exception) -> None:
        self.host.log(f"error: {error}\n")
        self.host.notify("boot.error", str(error))

    @property
    def _run_folder(self) -> Path:
        return self.launch.folder / "run"

    @property
    def _seed(self) -> Seed:
        return self.site.seed.child(f"machine {self.launch.manifest.id}")

    def _power_on(self) -> TrustDomain:
        launch, manifest = self.launch, self.launch.manifest
        if len(launch.encrypted_env) > MAX_ENV_SIZE:
            raise GuestError(f"encrypted environment: at most {MAX_ENV_SIZE} bytes, got {len(launch.encrypted_env)}")
        image = self.site.image(manifest.image)
        return TrustDomain(
            self.site.intel.platform("host of the VMM"),
            image,
            AppCompose(launch.compose_file),
            instance_seed=launch.instance_seed,
            vm_config=image.vm_config(manifest.vcpu, self._measured_memory()),
            app_id=bytes.fromhex(manifest.app_id),
            user_config=launch.user_config or None,
            release=self.site.release,
        )

    def _measured_memory(self) -> int:
        """Return the size of the memory in bytes: 2 GiB if the lite variant does not know the size that was asked for.

        Upstream has the legacy variant then, whose images a KMS downloads.
        """
        asked = self.launch.manifest.memory * MEGABYTE
        if asked == LOW_MEMORY or asked >= HIGH_MEMORY:
            return asked
        self.host.log(f"[dstack] {self.launch.manifest.memory} MB are measured as {LOW_MEMORY // MEGABYTE} MB\n")
        return LOW_MEMORY

    async def _listen(self, agent: GuestAgent, held: AsyncExitStack) -> AgentListeners:
        """Open the agent's listeners: its socket files, and its port behind the mappings to port 8090."""
        folder = self._run_folder
        folder.mkdir(exist_ok=True)
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        mapped = next((each for each in self.launch.manifest.port_map if each.vm_port == AGENT_PORT), None)
        host, port = (LOOPBACK, 0) if mapped is None else (mapped.address, mapped.host_port)
        addresses = AgentAddresses(
            bind_tcp(host, port, setting="ports"),
            SocketFile(folder / "dstack.sock", "run_path"),
            SocketFile(folder / "tappd.sock", "run_path"),
        )
        return await AgentListeners.open(agent, addresses)

    async def _keys(self, domain: TrustDomain) -> tuple[AppKeys, CertificateIssuer]:
        kind = domain.manifest.key_provider_kind
        if kind == "kms":
            name = self.launch.manifest.name
            headers = None if self.site.headers is None else self.site.headers(name)
            urls = [url.replace(HOST_IN_GUEST, LOOPBACK).removesuffix("/prpc") for url in self.launch.kms_urls]
            now = self.site.issued_at()
            return await fetch_keys(domain, urls, self.site.verifier, self._seed.stream("boot"), now, headers=headers)
        provider = local_key_provider(self.site.seed, "the host") if kind == "local" else KeyProvider("none")
        domain.complete(provider)
        sealing = self._seed.derive("sealing key", 32)
        own = OwnKeys.from_seed(domain, sealing, provider, self.site.issued_at)
        return own.keys, own.issuer

    def _report_instance(self, domain: TrustDomain) -> None:
        info = {
            "instance_id_seed": self.launch.instance_seed.hex(),
            "instance_id": domain.instance_id.hex(),
            "app_id": domain.app_id.hex(),
        }
        self.host.notify("instance.info", json.dumps(info))

    def _log_measurements(self, agent: GuestAgent) -> None:
        info = agent.app_info()
        summary = {
            "app_id": agent.domain.app_id.hex(),
            "compose_hash": agent.domain.compose_hash.hex(),
            "instance_id": agent.domain.instance_id.hex(),
            "mr_aggregated": info.mr_aggregated.hex(),
            "os_image_hash": info.os_image_hash.hex(),
        }
        self.host.log(json.dumps(summary, indent=2) + "\n")
