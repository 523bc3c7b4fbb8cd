"""The network and the files of a machine whose services run without containers.

A service has the guest's files where its compose file mounts them, and reaches the host at 10.0.2.2, other services by
their names, and everything else as this process does. It does not reach the host's loopback addresses: in a container
they are its own.
"""

import errno
import ipaddress
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final

from dstack_emu.deployment.compose_file import ComposeService
from dstack_emu.deployment.guest_compose import GuestFolders
from dstack_emu.deployment.workloads import Endpoint
from dstack_emu.transport.http_client import Route
from dstack_emu.vmm.store import COMPOSE, USER_CONFIG

HOST_IN_GUEST: Final = "10.0.2.2"
"""The address at which a machine reaches its host's loopback interface, in the user-mode network of QEMU."""
LOOPBACK: Final = "127.0.0.1"

FindEndpoint = Callable[[int], Endpoint | None]
"""Returns what listens at a port of a container, None if nothing does."""


def host_route(host: str, port: int) -> Endpoint:
    """Return where a machine's guest connects to: the host's loopback interface for 10.0.2.2."""
    return (LOOPBACK if host == HOST_IN_GUEST else host), port


@dataclass(slots=True)
class GuestNetwork:
    """The services of one machine by name, and what listens at the ports of those that run."""

    names: Sequence[str]
    running: dict[str, FindEndpoint] = field(default_factory=dict)

    def route_of(self, service: str) -> Route:
        """Return where the connections of a service go."""

        def route(host: str, port: int) -> Endpoint:
            name = service if is_loopback(host) else host
            if name not in self.names:
                return host_route(host, port)
            find = self.running.get(name)
            endpoint = None if find is None else find(port)
            if endpoint is None:
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            return endpoint

        return route


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine's loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_SHARED: Final = {
    "/dstack/app-compose.json": COMPOSE,
    "/dstack/user_config": USER_CONFIG,
}


@dataclass(frozen=True, slots=True)
class ContainerFiles:
    """The files of one service: `root` is the folder of what is not mounted, `mounts` are folders and files by path."""

    root: Path
    mounts: Mapping[str, Path]

    @classmethod
    def of(cls, service: ComposeService, machine: Path, run: Path) -> "ContainerFiles":
        """Make the folders of a service in the folder of its machine, and write its configs; raise `OSError`."""
        own = machine / "containers" / service.name
        mounts = {_normal(mount.target): _source(mount.source, machine, run) for mount in service.mounts}
        configs = own / "configs"
        configs.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number, (target, content) in enumerate((service.configs or {}).items()):
            file = mounts[_normal(target)] = configs / str(number)
            file.write_text(content)
        return cls(own / "root", mounts)

    def locate(self, path: PurePath | str, folder: str = "/") -> Path:
        """Return the file of this machine that a path in the container names; a relative one begins at `folder`."""
        wanted = _normal(posixpath.join(folder, str(path)))
        for target in sorted(self.mounts, key=len, reverse=True):
            if wanted == target:
                return self.mounts[target]
            if wanted.startswith(f"{target.rstrip('/')}/"):
                return self.mounts[target] / wanted[len(target.rstrip("/")) + 1 :]
        return self.root / wanted[1:]


def _source(source: str, machine: Path, run: Path) -> Path:
    """Return what a mount shows: a volume, a socket of the agent, a file that the host shares, or one of the guest."""
    if not source.startswith("/"):
        folder = machine / "volumes" / source
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder
    path = _normal(source)
    if path in _SHARED:
        return machine / _SHARED[path]
    return Path(GuestFolders(run, machine / "dstack", machine / "root").on_host(path))


def _normal(path: str) -> str:
    """Return an absolute path without `.` and `..`, which lead to nothing above the root."""
    return posixpath.normpath("/" + path.lstrip("/"))
