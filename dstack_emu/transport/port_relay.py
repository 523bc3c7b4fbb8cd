"""Forwards a port of this machine to wherever something listens when a client comes: TCP streams, and UDP datagrams."""

import asyncio
import contextlib
import socket
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, cast

from dstack_emu.transport.forward import ClientSide, Side
from dstack_emu.transport.listen import accept_on
from dstack_emu.transport.localhost_socket import parts_of

FindTarget = Callable[[], tuple[str, int] | None]
"""Returns the address and port of what listens now, None if nothing does."""
Address = Any
"""The address of a socket, as the standard library has it."""

MAX_PEERS: Final = 256
"""The maximum number of UDP clients of a port; the one that was silent for the longest time makes room."""


class PortRelay:
    """A relay of TCP connections; `forward_tcp` makes it. A client that comes when nothing listens is reset."""

    def __init__(self, find: FindTarget) -> None:
        self.find = find
        self.clients: set[_TcpClient] = set()
        self._listening: list[asyncio.Server] = []

    async def start(self, sock: socket.socket) -> None:
        """Listen on a bound socket, and take ownership of it."""
        for part in parts_of(sock):
            self._listening.append(await accept_on(part, lambda: _TcpClient(self)))

    async def close(self) -> None:
        """Stop listening, and abort every connection."""
        for listening in self._listening:
            listening.close()
        for client in set(self.clients):
            client.abort()
        await asyncio.sleep(0)  # their transports close in the loop's next turn


async def forward_tcp(sock: socket.socket, find: FindTarget) -> PortRelay:
    """Forward the connections of a bound socket, and take ownership of it."""
    relay = PortRelay(find)
    try:
        await relay.start(sock)
    except BaseException:
        sock.close()
        raise
    return relay


class _TcpClient(ClientSide):
    half_closes = True

    def __init__(self, relay: PortRelay) -> None:
        self._relay = relay

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._relay.clients.add(self)
        super().connection_made(transport)

    async def connect(self, server: Side) -> None:
        target = self._relay.find()
        if target is None:
            raise ConnectionRefusedError
        await asyncio.get_running_loop().create_connection(lambda: server, *target)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._relay.clients.discard(self)


class DatagramRelay(asyncio.DatagramProtocol):
    """A relay of UDP datagrams; `forward_udp` makes it. Each client has a socket of its own to the server."""

    def __init__(self, find: FindTarget) -> None:
        self._find = find
        self._peers: OrderedDict[Address, asyncio.DatagramTransport] = OrderedDict()
        self._opening: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the socket of the clients."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        """Pass a client's datagram on."""
        peer = self._peers.get(addr)
        if peer is not None:
            self._peers.move_to_end(addr)
            peer.sendto(data)
        elif len(self._opening) < MAX_PEERS:
            task = asyncio.create_task(self._open(addr, data))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, client: Address, data: bytes) -> None:
        target = self._find()
        if target is None or self._transport is None:
            return
        loop, listening = asyncio.get_running_loop(), self._transport
        with contextlib.suppress(OSError):
            opened: tuple[asyncio.DatagramTransport, Any] = await loop.create_datagram_endpoint(
                lambda: _Answers(listening, client), remote_addr=target
            )
            self._keep(client, opened[0])
            opened[0].sendto(data)

    def _keep(self, client: Address, peer: asyncio.DatagramTransport) -> None:
        if (before := self._peers.pop(client, None)) is not None:
            before.close()
        self._peers[client] = peer
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)[1].close()

    async def close(self) -> None:
        """Close all sockets."""
        for task in tuple(self._opening):
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for transport in (*self._peers.values(), self._transport):
            if transport is not None:
                transport.abort()
        self._peers.clear()
        await asyncio.sleep(0)  # they close in the loop's next turn


class _Answers(asyncio.DatagramProtocol):
    def __init__(self, listening: asyncio.DatagramTransport, client: Address) -> None:
        self._listening, self._client = listening, client

    def datagram_received(self, data: bytes, addr: Address) -> None:
        if not self._listening.is_closing():
            self._listening.sendto(data, self._client)


async def forward_udp(sock: socket.socket, find: FindTarget) -> DatagramRelay:
    """Forward the datagrams of a bound socket, and take ownership of it."""
    try:
        _, relay = await asyncio.get_running_loop().create_datagram_endpoint(lambda: DatagramRelay(find), sock=sock)
    except BaseException:
        sock.close()
        raise
    return relay
