"""The workload of a machine without a container engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from dstack_emu.deployment.workloads import BootedGuest, Endpoint, ServiceStatus
from dstack_emu.simulator.errors import GuestError
from dstack_emu.vmm.config import Protocol


@dataclass(frozen=True, slots=True)
class ProcessWorkload:
    """Runs nothing: the guest's agent alone does."""

    guest: BootedGuest

    async def start(self) -> None:
        """Report what is not started."""
        self.guest.progress("setting up docker")
        if self.guest.domain.manifest.runner != "bash":
            self.guest.progress("starting containers")
            self.guest.host.log("[dstack] this machine runs the guest's agent alone: its containers are not started\n")
        else:
            self.guest.progress("running main script")
            self.guest.host.log("[dstack] this machine runs the guest's agent alone: its script is not run\n")

    def endpoint(self, protocol: Protocol, port: int) -> Endpoint | None:
        """Return None: nothing listens."""
        return None

    async def services(self) -> Sequence[ServiceStatus]:
        """Return nothing."""
        return ()

    async def logs(self, service: str, lines: int) -> bytes:
        """Raise `GuestError`: there are no services."""
        raise GuestError(f"no service {service!r:.100} runs in this machine")

    async def stop(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class ProcessWorkloads:
    """Makes workloads that need no container engine."""

    def of(self, guest: BootedGuest) -> ProcessWorkload:
        """Return the workload of a machine."""
        return ProcessWorkload(guest)

    async def discard(self, vm_id: str) -> None:
        """Do nothing: a machine leaves nothing outside its folder."""
