"""The VMM of a stack: machines that are deployed by its RPCs, on the stack's Intel, PCCS and KMS."""

import asyncio
import socket
import uuid
from typing import Final
from urllib.parse import urlsplit

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.deployment.authorization import tls_url
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.docker_machines import open_docker
from dstack_emu.deployment.docker_workload import DockerWorkloads
from dstack_emu.deployment.gateway_names import INGRESS
from dstack_emu.deployment.guest_programs import ProgramSite
from dstack_emu.deployment.machine_site import MachineSite
from dstack_emu.deployment.machines import DomainMachines
from dstack_emu.deployment.process_workload import ProcessWorkloads
from dstack_emu.deployment.reach import AGENT_PORT, endpoint_of
from dstack_emu.deployment.workloads import Workloads
from dstack_emu.transport.listen import Server, serve
from dstack_emu.vmm.config import CvmSection, GatewaySection, ImageSection, PortMappingSection, PortRange, VmmConfig
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.server import vmm_app
from dstack_emu.vmm.state import FleetState

RUN_FOLDER: Final = "vms"
"""The folder of the machines, in the state folder."""
IMAGES_FOLDER: Final = "vm-images"
"""The folder of OS images beside the stack's own, in the state folder."""


class VmmExtension:
    """The VMM as a service of a deployment."""

    names = ("vmm",)

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._fleet: Fleet | None = None
        self._docker: DockerWorkloads | None = None

    async def start(self, sock: socket.socket) -> Server:
        """Serve it on a bound socket, and start the machines of the state folder."""
        context = self._deployment.context
        entropy = self._entropy = context.seed.stream("vmm")
        if context.config.vmm_workload == "docker":
            self._docker = await _docker(context)
        self._fleet = Fleet(
            _config(context),
            DomainMachines(_site(context, self._docker or ProcessWorkloads(_programs(context)))),
            release=context.release_of(None),
            clock=context.instrumentation.clock.now,
            new_id=lambda: str(uuid.UUID(bytes=entropy(16), version=4)),
            entropy=entropy,
        )
        await self._fleet.open()
        self._deployment.machines = self
        server = await serve(context.instrumentation.instrument("vmm", vmm_app(self._fleet)), sock)
        context.urls["vmm"] = server.url
        return server

    def capture(self) -> FleetState:
        """Return its machines as data."""
        machines = self._fleet.capture() if self._fleet is not None else FleetState()
        return machines.model_copy(update={"drawn": self._entropy.capture()})

    async def restore(self, state: FleetState) -> None:
        """Make its machines what they were; raise `VmmError` if one cannot be stored."""
        if self._fleet is not None:
            await self._fleet.restore(state)
        self._entropy.restore(state.drawn)

    async def keys_are_released(self) -> None:
        """Do nothing: it needs no keys."""

    def became_ready(self) -> None:
        """Do nothing: the VMM is ready before the KMS are."""

    async def close(self) -> None:
        """End every machine; of those in a temporary folder nothing is left."""
        if self._fleet is not None:
            await self._fleet.close()
        if self._docker is not None:
            if self._fleet is not None and self._deployment.config.state is None:
                await asyncio.gather(*map(self._docker.discard, self._fleet.vms))
            await self._docker.close()


def _config(context: StackContext) -> VmmConfig:
    """Return the configuration of a stack's VMM: its KMS, and ports of the whole range."""
    kms_url = tls_url(context.urls["kms-src"])
    everything = tuple(PortRange(protocol=protocol, first=1, last=65535) for protocol in ("tcp", "udp"))
    return VmmConfig(
        run_path=context.state / RUN_FOLDER,
        kms_url=kms_url,
        image=ImageSection(path=context.state / IMAGES_FOLDER),
        cvm=CvmSection(
            kms_urls=(kms_url,),
            gateway_urls=tuple(context.gateways),
            pccs_url=context.urls["pccs"],
            port_mapping=PortMappingSection(enabled=True, range=everything),
        ),
        gateway=_gateway(context),
    )


def _gateway(context: StackContext) -> GatewaySection:
    """Return how the apps of its machines are reached."""
    ingress = endpoint_of(f"//{context.urls[INGRESS]}") if INGRESS in context.urls else None
    if ingress is None:
        return GatewaySection()
    return GatewaySection(base_domain=context.config.base_domain, port=ingress[1], agent_port=AGENT_PORT)


async def _docker(context: StackContext) -> DockerWorkloads:
    """Return the workloads on the container engine of this host, without what an earlier run left there."""
    return await open_docker(
        context.state.absolute() / RUN_FOLDER,
        pccs_url=context.urls["pccs"],
        script_image=context.config.vmm_script_image or "",
        host_ports=(port for port in (urlsplit(url).port for url in context.urls.values()) if port),
        strict_pre_launch=context.release_of(None).strict_pre_launch_script,
    )


def _programs(context: StackContext) -> ProgramSite:
    """Return what the KMS and webhooks that run in machines share: the stack's PCCS and root."""
    return ProgramSite(
        context.release_of(None),
        context.seed.child("vmm"),
        context.urls["pccs"],
        TrustAnchor(context.intel.root_der),
        context.instrumentation.clock,
        context.instrumentation.clock.issue,
    )


def _site(context: StackContext, workloads: Workloads) -> MachineSite:
    return MachineSite(
        intel=context.intel,
        seed=context.seed.child("vmm"),
        release=context.release_of(None),
        images=context.state / IMAGES_FOLDER,
        own_image=context.image,
        verifier=context.verifier("vmm"),
        issued_at=context.instrumentation.clock.issue,
        workloads=workloads,
        clock=context.instrumentation.clock,
        reach=context.reach,
        writes_environment=isinstance(workloads, ProcessWorkloads),
        headers=lambda caller: context.headers_to_kms(caller, "src"),
    )
