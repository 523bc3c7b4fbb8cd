"""What runs in a machine beside its guest's agent: the interface of a workload, and the workload that runs nothing.

A machine makes its workload from the `Workloads` of its site once its trust domain has booted and has its keys, starts
it, and stops it when it ends. Ports that are mapped to the machine are connected to what `endpoint` returns, for each
connection anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from dstack_emu.simulator.trust_domain import TrustDomain
from dstack_emu.vmm.config import Protocol as PortProtocol
from dstack_emu.vmm.machine import HostApi, Launch

Endpoint = tuple[str, int]
"""Where something listens on this host: an address and a port."""


@dataclass(frozen=True, slots=True)
class BootedGuest:
    """A trust domain that has booted and has its keys, as its workload sees it.

    `launch.folder` is the machine's own folder, which lasts over restarts; `run` is the folder of the sockets
    `dstack.sock` and `tappd.sock`, which exists while the machine runs. `environment` is the decrypted environment,
    of the names in `allowed_envs` alone.
    """

    launch: Launch
    host: HostApi
    domain: TrustDomain
    run: Path
    environment: Mapping[str, str]

    def progress(self, text: str) -> None:
        """Report a step of the boot, and log it."""
        self.host.log(f"[dstack] {text}\n")
        self.host.notify("boot.progress", text)


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One container, or what takes its place, as ListContainers shows it; `created` is in Unix seconds."""

    name: str
    image: str
    state: Literal["created", "running", "exited"]
    status: str
    id: str = ""
    command: str = ""
    created: int = 0


class Workload(Protocol):
    """What runs in one machine."""

    async def start(self) -> None:
        """Start it, and report the steps of the boot from `setting up docker` to the one before `done`.

        If it raises `GuestError`, the machine runs on with its agent, and the text is its boot error. `stop` is called
        in any case.
        """
        ...

    def endpoint(self, protocol: PortProtocol, port: int) -> Endpoint | None:
        """Return what listens at a port of the machine; None if nothing of the workload does."""
        ...

    async def services(self) -> Sequence[ServiceStatus]:
        """Return what it consists of, whether that runs or not."""
        ...

    async def logs(self, service: str, lines: int) -> bytes:
        """Return the last lines of one of its services; raise `GuestError` if there is no such service."""
        ...

    async def shutdown(self) -> None:
        """Let what runs end in order, because the guest powers off; `stop` is called after it."""
        ...

    async def stop(self) -> None:
        """End all that runs at once, and release it; files that a restart of the machine needs stay."""
        ...


class Workloads(Protocol):
    """Makes the workloads of machines."""

    def of(self, guest: BootedGuest) -> Workload:
        """Return the workload of a machine, which does not run yet."""
        ...

    async def discard(self, vm_id: str) -> None:
        """Delete what a machine that does not run, and never will again, has left outside its folder."""
        ...
