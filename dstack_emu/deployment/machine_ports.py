"""The mapped ports of a machine: each is listened on while the machine runs, and leads to what listens there then."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from dstack_emu.deployment.workloads import Endpoint
from dstack_emu.transport.listen import bind_tcp, bind_udp
from dstack_emu.transport.port_relay import DatagramRelay, PortRelay, forward_tcp, forward_udp
from dstack_emu.vmm.config import Protocol
from dstack_emu.vmm.manifest import PortMap

FindEndpoint = Callable[[Protocol, int], Endpoint | None]
"""Returns what listens at a port of a machine, None if nothing does."""


async def open_ports(mappings: Sequence[PortMap], find: FindEndpoint, held: AsyncExitStack) -> None:
    """Listen on every mapped port of the host until `held` is closed; raise `ListenError` if one is taken.

    A TCP client that comes when nothing listens in the machine is reset.
    """
    for each in mappings:
        target = functools.partial(find, each.protocol, each.vm_port)
        setting = f"the port mapping to {each.protocol} port {each.vm_port} of the machine"
        relay: PortRelay | DatagramRelay
        if each.protocol == "udp":
            relay = await forward_udp(bind_udp(each.address, each.host_port, setting=setting), target)
        else:
            relay = await forward_tcp(bind_tcp(each.address, each.host_port, setting=setting), target)
        held.push_async_callback(relay.close)
