"""Lets what listens on the loopback interface of this host answer at the address that containers have for it."""

import functools
from collections.abc import Iterable
from typing import Final

from dstack_emu.deployment.guest_network import HOST_IN_GUEST, LOOPBACK
from dstack_emu.deployment.workloads import Endpoint
from dstack_emu.transport.errors import ListenError
from dstack_emu.transport.listen import bind_tcp
from dstack_emu.transport.port_relay import PortRelay, forward_tcp

HOST_SUBNET: Final = "10.0.2.0/30"
"""The smallest network with 10.0.2.2 and another address, so that it is in the way of as little as possible."""


class HostRelays:
    """Listens at 10.0.2.2, which the engine has made an address of this host, and connects to 127.0.0.1."""

    def __init__(self) -> None:
        self._relays: dict[int, PortRelay] = {}

    async def open(self, ports: Iterable[int]) -> None:
        """Add ports; leave out those on which something listens already, and all if the engine is on another host."""
        for port in ports:
            if port in self._relays:
                continue
            try:
                sock = bind_tcp(HOST_IN_GUEST, port)
            except ListenError:
                continue
            self._relays[port] = await forward_tcp(sock, functools.partial(_on_loopback, port))

    async def close(self) -> None:
        """Close all of them."""
        while self._relays:
            _, relay = self._relays.popitem()
            await relay.close()


def _on_loopback(port: int) -> Endpoint:
    return LOOPBACK, port
