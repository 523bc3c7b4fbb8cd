"""The listeners of one guest agent: two socket files, a TCP port with every service, and gRPC if it is wanted."""

import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.agent_server import dstack_app, tappd_app, tcp_app
from dstack_emu.transport.http import Application
from dstack_emu.transport.listen import bind_unix, reachable, reserve_unix, serve


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The path of a Unix socket, and the command's option that sets it, which an error names."""

    path: Path
    option: str


@dataclass(frozen=True, slots=True)
class AgentAddresses:
    """Where an agent listens. TCP sockets are bound already; socket files are bound when the agent starts to listen."""

    tcp: socket.socket
    dstack_sock: SocketFile
    tappd_sock: SocketFile
    grpc: socket.socket | None = None
    grpc_sock: SocketFile | None = None


@dataclass(frozen=True, slots=True)
class Instruments:
    """What is put around an agent's listeners: around each HTTP application, and grpc.aio's interceptors."""

    instrument: Callable[[Application], Application] = lambda app: app
    interceptors: Sequence[Any] = ()


class AgentListeners:
    """A guest agent that listens, until `close`.

    `url` is the TCP port's; `grpc_target` (`host:port`) and `grpc_sock` (a path) are empty if gRPC is not served there.
    """

    def __init__(self) -> None:
        self.url = self.grpc_target = self.grpc_sock = ""
        self._exit = AsyncExitStack()

    @classmethod
    async def open(
        cls, agent: GuestAgent, addresses: AgentAddresses, instruments: Instruments | None = None
    ) -> "AgentListeners":
        """Let an agent listen; raise `ListenError`, with the TCP sockets closed, if a socket file cannot be bound."""
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
            await self._serve(instruments.instrument(make_app(agent)), bound)
        self.url = await self._serve(instruments.instrument(tcp_app(agent)), addresses.tcp)
        if addresses.grpc is not None or addresses.grpc_sock is not None:
            await self._serve_grpc(agent, addresses, instruments.interceptors)

    async def _serve(self, app: Application, sock: socket.socket) -> str:
        server = await serve(app, sock)
        self._exit.push_async_callback(server.close)
        return server.url

    async def _serve_grpc(self, agent: GuestAgent, addresses: AgentAddresses, interceptors: Sequence[Any]) -> None:
        from dstack_emu.simulator.agent_grpc import serve_agent  # grpcio costs time and memory: only if it is wanted

        if (file := addresses.grpc_sock) is not None:
            self.grpc_sock = reserve_unix(file.path, setting=file.option)
        if addresses.grpc is not None:
            self.grpc_target = reachable(addresses.grpc)
        server = await serve_agent(agent, addresses.grpc, self.grpc_sock or None, interceptors=interceptors)
        self._exit.push_async_callback(server.close)

    async def close(self) -> None:
        """Stop listening."""
        await self._exit.aclose()
