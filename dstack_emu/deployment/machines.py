"""What runs the machines of a VMM: each is a trust domain of this process, which boots as a CVM does.

The guest's agent runs on its sockets and behind its mapped port; what else runs is the workload's. The boot is reported
by the host API in upstream's steps. Source: dstack `dstack-util/src/system_setup.rs`, and the scripts
`dstack-prepare.sh` and `app-compose.sh`, at 312dc605.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import Message

from dstack_emu.attest.encrypted_env import MAX_FILE_SIZE as MAX_ENV_SIZE
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.os_image import METADATA_FILE
from dstack_emu.deployment.agent_listeners import AgentAddresses, AgentListeners, SocketFile
from dstack_emu.deployment.gateway_registration import GatewayMembership
from dstack_emu.deployment.guest_config import local_key_provider
from dstack_emu.deployment.guest_network import LOOPBACK, host_route
from dstack_emu.deployment.machine_guest import MachineGuest
from dstack_emu.deployment.machine_ports import open_ports
from dstack_emu.deployment.machine_site import MEGABYTE, MachineSite
from dstack_emu.deployment.reach import AGENT_PORT, endpoint_of
from dstack_emu.deployment.workloads import BootedGuest, Endpoint, ServiceStatus, Workload
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.app_keys import AppKeys, CertificateIssuer, OwnKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.gateway_client import GatewayClient
from dstack_emu.simulator.guest_boot import KmsIssuer, fetch_keys
from dstack_emu.simulator.guest_files import decrypt_environment, remove_environment, write_environment
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import KeyProvider, TrustDomain
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.errors import ListenError
from dstack_emu.transport.listen import bind_tcp
from dstack_emu.vmm.config import Protocol
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.machine import GuestConfig, HostApi, Launch


@dataclass(frozen=True, slots=True)
class DomainMachines:
    """Starts machines as trust domains of this process."""

    site: MachineSite

    def require_image(self, name: str) -> None:
        """Raise `VmmError` if the image cannot be loaded."""
        self.site.image(name)

    def built_in_images(self) -> Mapping[str, bytes]:
        """Return the metadata.json of the image that exists without a folder."""
        return {self.site.own_image_name: self.site.own_image.files[METADATA_FILE]}

    def guest_config(self, launch: Launch) -> GuestConfig:
        """Return what the guest is told about its machine; raise `VmmError` if the image cannot be loaded."""
        vm_config = self.site.vm_config(launch)
        try:
            document = self.site.power_on(launch).launch_config.document
        except (GuestError, AttestError):  # the guest reports it when it boots
            document = None
        return GuestConfig(vm_config.to_json(), document)

    async def start(self, launch: Launch, host: HostApi) -> "DomainMachine":
        """Start a machine, and return while it boots."""
        machine = DomainMachine(self.site, launch, host)
        machine.start()
        return machine

    async def discard(self, vm_id: str) -> None:
        """Delete what a machine's workload has left outside its folder."""
        await self.site.workloads.discard(vm_id)


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
    _guest: MachineGuest | None = None
    _agent_url: str = ""

    # ---- the machine

    def start(self) -> None:
        """Switch it on."""
        self._task = begin_in_background(self._run(), f"guest {self.launch.manifest.id}")

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
        """Call its guest API; raise `VmmError` if its agent does not answer."""
        if self._guest is None:
            raise VmmError(f"the guest of vm {self.launch.manifest.id} does not answer: it boots")
        return await self._guest.call(method)

    async def _run(self) -> None:
        try:
            async with AsyncExitStack() as held:
                await self._boot(held)
                await self._power_off.wait()
                self.host.notify("shutdown.progress", "powering off")
                if self.workload is not None:
                    await self.workload.shutdown()
        except (GuestError, AttestError, ListenError, VmmError, OSError) as error:
            self._report(str(error))
        finally:
            self._ended.set()

    # ---- the guest's boot

    def _progress(self, text: str) -> None:
        self.host.log(f"[dstack] {text}\n")
        self.host.notify("boot.progress", text)

    async def _boot(self, held: AsyncExitStack) -> None:
        remove_environment(self.launch.folder)  # an emulator that was killed has left it
        await open_ports(self.launch.manifest.port_map, self._endpoint, held)
        async with self.site.boots:
            agent, keys, issuer, environment = await self._until_keys(held)
        domain = agent.domain
        await self._register(domain, keys, issuer, held)
        if self.launch.encrypted_env and self.site.writes_environment:
            held.callback(remove_environment, self.launch.folder)
            write_environment(self.launch.folder, environment)
        self._log_measurements(agent)
        await self._start_workload(BootedGuest(self.launch, self.host, domain, self._run_folder, environment), held)

    async def _until_keys(
        self, held: AsyncExitStack
    ) -> tuple[GuestAgent, AppKeys, CertificateIssuer, Mapping[str, str]]:
        """Switch the trust domain on, and fetch its keys; return them, and what they decrypt of the environment."""
        domain = self._power_on()
        agent = GuestAgent(domain, self._seed.stream("agent"))
        domain.boot()
        listeners = await self._listen(agent, held)
        held.push_async_callback(listeners.close)
        self._agent_url = listeners.url
        began = time.monotonic()
        self._guest = MachineGuest(self.launch.manifest, agent, lambda: time.monotonic() - began, self._services)
        self._progress("requesting app keys")
        keys, issuer = await self._keys(domain)
        if isinstance(issuer, KmsIssuer):
            held.push_async_callback(issuer.close)
        self._progress("mounting data disk" if self.launch.has_disk else "initializing data disk")
        self._report_instance(domain)
        self._progress("data disk ready")
        environment = decrypt_environment(domain, self.launch.encrypted_env, keys)
        await agent.provide(keys, issuer)
        return agent, keys, issuer, environment

    async def _register(
        self, domain: TrustDomain, keys: AppKeys, issuer: CertificateIssuer, held: AsyncExitStack
    ) -> None:
        """Register at the gateway, if the app has one, now and as long as the machine runs.

        The step is reported in any case, as upstream does.
        """
        self._progress("setting up dstack-gateway")
        if not domain.manifest.has_gateway:
            return
        self.site.reach.add(domain.instance_id, self._tcp_endpoint)
        held.callback(self.site.reach.remove, domain.instance_id, self._tcp_endpoint)
        client = GatewayClient(
            domain,
            keys,
            issuer,
            self._seed.stream("gateway"),
            self.site.clock,
            self.launch.folder,
            headers=self._headers,
            route=host_route,
        )
        membership = GatewayMembership(lambda: self.launch.gateway_urls, self.site.clock, self._log_gateway)
        held.push_async_callback(membership.leave)
        if failed := await membership.join(client, self.site.release):
            self._report(failed)

    def _log_gateway(self, text: str) -> None:
        self.host.log(f"[dstack] dstack-gateway: {text}\n")

    async def _start_workload(self, guest: BootedGuest, held: AsyncExitStack) -> None:
        """Start what runs beside the agent; the agent runs on if that cannot be started."""
        self.workload = self.site.workloads.of(guest)
        held.push_async_callback(self.workload.stop)
        try:
            await self.workload.start()
        except GuestError as error:
            self._report(str(error))
        else:
            self._progress("done")

    async def _services(self) -> Sequence[ServiceStatus]:
        return () if self.workload is None else await self.workload.services()

    def _report(self, text: str) -> None:
        self.host.log(f"error: {text}\n")
        self.host.notify("boot.error", text)

    @property
    def _run_folder(self) -> Path:
        return self.launch.folder / "run"

    @property
    def _seed(self) -> Seed:
        return self.site.seed.child(f"machine {self.launch.manifest.id}")

    @property
    def _headers(self) -> MoreHeaders | None:
        """What is added to the calls of its guest."""
        return None if self.site.headers is None else self.site.headers(self.launch.manifest.name)

    def _power_on(self) -> TrustDomain:
        launch = self.launch
        if len(launch.encrypted_env) > MAX_ENV_SIZE:
            raise GuestError(f"encrypted environment: at most {MAX_ENV_SIZE} bytes, got {len(launch.encrypted_env)}")
        domain, asked = self.site.power_on(launch), launch.manifest.memory
        if domain.vm_config.memory_size != asked * MEGABYTE:
            self.host.log(f"[dstack] {asked} MB are measured as {domain.vm_config.memory_size // MEGABYTE} MB\n")
        return domain

    # ---- its ports

    def _endpoint(self, protocol: Protocol, port: int) -> Endpoint | None:
        """Return what listens at a port of the machine now."""
        found = None if self.workload is None else self.workload.endpoint(protocol, port)
        if found is None and self._agent_url and (protocol, port) == ("tcp", AGENT_PORT):
            return endpoint_of(self._agent_url)
        return found

    def _tcp_endpoint(self, port: int) -> Endpoint | None:
        return self._endpoint("tcp", port)

    async def _listen(self, agent: GuestAgent, held: AsyncExitStack) -> AgentListeners:
        """Open the agent's listeners: its socket files, and its port, to which mappings to port 8090 lead."""
        folder = self._run_folder
        folder.mkdir(exist_ok=True)
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        addresses = AgentAddresses(
            bind_tcp(LOOPBACK, 0),
            SocketFile(folder / "dstack.sock", "run_path"),
            SocketFile(folder / "tappd.sock", "run_path"),
        )
        return await AgentListeners.open(agent, addresses)

    async def _keys(self, domain: TrustDomain) -> tuple[AppKeys, CertificateIssuer]:
        kind = domain.manifest.key_provider_kind
        if kind == "kms":
            urls = [url.rstrip("/").removesuffix("/prpc") for url in self.launch.kms_urls]
            return await fetch_keys(
                domain,
                urls,
                self.site.verifier,
                self._seed.stream("boot"),
                self.site.issued_at(),
                headers=self._headers,
                route=host_route,
            )
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
