"""The guest API of a machine: what its guest answers the VMM.

What only a running Linux has (memory in use, packets) is zero, the same at each call. Source: dstack
`guest-agent/src/guest_api_service.rs` at 312dc605.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from dstack_emu.attest.proto import guest_api_pb2 as pb
from dstack_emu.deployment.workloads import ServiceStatus
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.manifest import Manifest

MEGABYTE = 1024**2
GIGABYTE = 1024**3


@dataclass(frozen=True, slots=True)
class MachineGuest:
    """The guest of one machine; `uptime` returns the seconds since its start, `services` what its workload has."""

    manifest: Manifest
    agent: GuestAgent
    uptime: Callable[[], float]
    services: Callable[[], Awaitable[Sequence[ServiceStatus]]]

    async def call(self, method: str) -> Message:
        """Answer a method; raise `VmmError` for one that does not exist."""
        methods: Mapping[str, Callable[[], Awaitable[Message]]] = {
            "Info": self.info,
            "SysInfo": self.sys_info,
            "NetworkInfo": self.network_info,
            "ListContainers": self.list_containers,
        }
        if method not in methods:
            raise VmmError(f"Service not found: {method}")
        return await methods[method]()

    async def info(self) -> pb.GuestInfo:
        """State who it is."""
        found = await self.agent.public_info()
        return pb.GuestInfo(
            version=self.agent.domain.release.version,
            app_id=found.app_id,
            instance_id=found.instance_id,
            app_cert=found.app_cert,
            tcb_info=found.tcb_info,
            device_id=found.device_id,
        )

    async def sys_info(self) -> pb.SystemInfo:
        """State the size of its machine."""
        memory, disk = self.manifest.memory * MEGABYTE, self.manifest.disk_size * GIGABYTE
        return pb.SystemInfo(
            os_name="DStack",
            os_version=self.agent.domain.image.version,
            kernel_version="emulated",
            cpu_model="emulated",
            num_cpus=max(self.manifest.vcpu, 1),
            total_memory=memory,
            available_memory=memory,
            free_memory=memory,
            total_swap=self.agent.domain.manifest.swap_size,
            free_swap=self.agent.domain.manifest.swap_size,
            uptime=int(self.uptime()),
            disks=[pb.DiskInfo(name="/dev/vdb", mount_point="/dstack", total_size=disk, free_size=disk)],
        )

    async def network_info(self) -> pb.NetworkInformation:
        """State the addresses of a machine with one interface in the user-mode network of QEMU."""
        return pb.NetworkInformation(
            dns_servers=["10.0.2.3"],
            gateways=[pb.Gateway(address="10.0.2.2")],
            interfaces=[pb.Interface(name="enp0s1", addresses=[pb.IpAddress(address="10.0.2.10", prefix=24)])],
        )

    async def list_containers(self) -> pb.ListContainersResponse:
        """List what the machine's workload consists of."""
        return pb.ListContainersResponse(
            containers=[
                pb.Container(
                    id=each.id,
                    names=[f"/{each.name}"],
                    image=each.image,
                    created=each.created,
                    state=each.state,
                    status=each.status,
                )
                for each in await self.services()
            ]
        )
