"""The VMM of a stack: machines that are deployed by its RPCs, on the stack's Intel, PCCS and KMS."""

import socket
import uuid
from typing import Final

from dstack_emu.deployment.authorization import tls_url
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.machines import DomainMachines, MachineSite
from dstack_emu.deployment.process_workload import ProcessWorkloads
from dstack_emu.observability.spans import headers_of
from dstack_emu.transport.listen import Server, serve
from dstack_emu.vmm.config import CvmSection, GatewaySection, ImageSection, PortMappingSection, PortRange, VmmConfig
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.server import vmm_app

RUN_FOLDER: Final = "vms"
"""The folder of the machines, in the state folder."""
IMAGES_FOLDER: Final = "vm-images"
"""The folder of OS images beside the stack's own, in the state folder."""


class VmmExtension:
    """The VMM as a service of a deployment."""

    name = "vmm"

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._fleet: Fleet | None = None

    async def start(self, sock: socket.socket) -> Server:
        """Serve it on a bound socket, and start the machines of the state folder."""
        context = self._deployment.context
        entropy = context.seed.stream("vmm")
        self._fleet = Fleet(
            _config(context),
            DomainMachines(_site(context)),
            release=context.release_of(None),
            clock=context.instrumentation.clock.now,
            new_id=lambda: str(uuid.UUID(bytes=entropy(16), version=4)),
            entropy=entropy,
        )
        await self._fleet.open()
        return await serve(context.instrumentation.instrument(self.name, vmm_app(self._fleet)), sock)

    def became_ready(self) -> None:
        """Do nothing: the VMM is ready before the KMS are."""

    async def close(self) -> None:
        """End every machine."""
        if self._fleet is not None:
            await self._fleet.close()


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
            pccs_url=context.urls["pccs"],
            port_mapping=PortMappingSection(enabled=True, range=everything),
        ),
        gateway=GatewaySection(),
    )


def _site(context: StackContext) -> MachineSite:
    return MachineSite(
        intel=context.intel,
        seed=context.seed.child("vmm"),
        release=context.release_of(None),
        images=context.state / IMAGES_FOLDER,
        own_image=context.image,
        verifier=context.verifier("vmm"),
        issued_at=context.instrumentation.clock.issue,
        workloads=ProcessWorkloads(),
        headers=headers_of,
    )
