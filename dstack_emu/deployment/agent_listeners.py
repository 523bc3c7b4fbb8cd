"""The listeners of a guest agent: two socket files, a TCP port with every service, and optionally gRPC."""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.agent_server import dstack_app, tappd_app, tcp_app
from dstack_emu.transport.http import Application
from dstack_emu.transport.listen import bind_unix, reachable, reserve_unix, serve

SOCKET_MODE: Final = 0o777
"""The mode of the socket files, as in a CVM, whatever the umask is: who may open their folder may use them."""


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The path of a Unix socket, and the option that sets it, for error messages."""

    path: Path
    option: str


@dataclass(frozen=True, slots=True)
class AgentAddresses:
    """The addresses of an agent. TCP sockets are already bound, socket files are bound when the agent starts."""

    tcp: socket.socket
    dstack_sock: SocketFile
    tappd_sock: SocketFile
    grpc: socket.socket | None = None
    grpc_sock: SocketFile | None = None


@dataclass(frozen=True, slots=True)
class Instruments:
    """The instruments of an agent's listeners: a function that wraps each HTTP application, and gRPC interceptors."""

    instrument: Callable[[Application], Application] = lambda app: app
    interceptors: Sequence[Any] = ()


class AgentListeners:
    """The open listeners of a guest agent. Close them.

    `url` is that of the TCP port; `grpc_target` (`host:port`) and `grpc_sock` (a path) are empty without gRPC there.
    """

    def __init__(self) -> None:
        self.url = self.grpc_target = self.grpc_sock = ""
        self._exit = AsyncExitStack()

    @classmethod
    async def open(
        cls, agent: GuestAgent, addresses: AgentAddresses, instruments: Instruments | None = None
    ) -> "AgentListeners":
        """Start to listen; if a socket file cannot be bound, close the TCP sockets and raise `ListenError`."""
        listeners = cls()
        try:
            await listeners._open(agent, addresses, instruments or Instruments())
        except BaseException:
            await listeners.close()
            raise
        return listeners

    async def _open(self, agent: GuestAgent, addresses: AgentAddresses, instruments: Instruments) -> None:
        for sock in (addresses.tcp, addresses.grpc):
            if sock is not None:
                self._exit.callback(sock.close)
        for make_app, file in ((dstack_app, addresses.dstack_sock), (tappd_app, addresses.tappd_sock)):
            bound = bind_unix(file.path, setting=file.option)
            os.chmod(file.path, SOCKET_MODE)
            await self._serve(instruments.instrument(make_app(agent)), bound)
        self.url = await self._serve(instruments.instrument(tcp_app(agent)), addresses.tcp)
        if addresses.grpc is not None or addresses.grpc_sock is not None:
            await self._serve_grpc(agent, addresses, instruments.interceptors)

    async def _serve(self, app: Application, sock: socket.socket) -> str:
        server = await serve(app, sock)
        self._exit.push_async_callback(server.close)
        return server.url

    async def _serve_grpc(self, agent: GuestAgent, addresses: AgentAddresses, interceptors: Sequence[Any]) -> None:
        from dstack_emu.simulator.agent_grpc import (
            serve_agent,
        )  # grpcio costs time and memory: import it only if needed

        if (file := addresses.grpc_sock) is not None:
            self.grpc_sock = reserve_unix(file.path, setting=file.option)
        if addresses.grpc is not None:
            self.grpc_target = reachable(addresses.grpc)
        server = await serve_agent(agent, addresses.grpc, self.grpc_sock or None, interceptors=interceptors)
        self._exit.push_async_callback(server.close)
        if self.grpc_sock:
            os.chmod(self.grpc_sock, SOCKET_MODE)

    async def close(self) -> None:
        """Stop listening."""
        await self._exit.aclose()
