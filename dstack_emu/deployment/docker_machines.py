"""The containers of a VMM's machines: what a VMM of a stack, and one alone, share of this host's container engine."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from dstack_emu.deployment.docker_workload import DockerWorkloads
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.guest_network import HOST_IN_GUEST, LOOPBACK
from dstack_emu.simulator.errors import GuestError
from dstack_emu.vmm.store import Store

_THIS_HOST: Final = frozenset((LOOPBACK, HOST_IN_GUEST, "localhost"))


async def open_docker(
    machines: Path, *, pccs_url: str, script_image: str, host_ports: Iterable[int], strict_pre_launch: bool
) -> DockerWorkloads:
    """Return the workloads of the machines in a folder (absolute), without what an earlier run left on the engine.

    Machines reach `host_ports` of 127.0.0.1 at 10.0.2.2. Raises `StackError` if the engine cannot be used, and
    `OSError` if the folder cannot be.
    """
    store = Store(machines)
    store.open()
    workloads = DockerWorkloads(
        store.path,
        pccs_url=pccs_url,
        script_image=script_image,
        host_ports=frozenset(host_ports),
        strict_pre_launch=strict_pre_launch,
    )
    try:
        await workloads.open(set(store.ids()))
    except GuestError as error:
        raise StackError(f"vmm: {error}") from error
    return workloads


def ports_here(urls: Iterable[str]) -> Iterator[int]:
    """Yield the ports of those URLs that are on this host."""
    for url in urls:
        if (port := _port_here(url)) is not None:
            yield port


def _port_here(text: str) -> int | None:
    """Return the port of a URL on this host, None for any other."""
    try:
        url = urlsplit(text)
        port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    except ValueError:
        return None
    return port if url.hostname in _THIS_HOST else None
