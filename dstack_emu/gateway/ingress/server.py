"""The ingress: it accepts connections on any number of ports, counts them, and tells what became of each.

The process that runs it needs two file descriptors for each connection.
"""

import asyncio
import socket
from collections.abc import Sequence

from dstack_emu.gateway.connections import Connections
from dstack_emu.gateway.ingress.app_address import AppAddresses, TxtTable
from dstack_emu.gateway.ingress.connection import Connection, Interrupt, Surroundings
from dstack_emu.gateway.ingress.greeting import Greeting
from dstack_emu.gateway.ingress.record import COMPLETE, ConnectionRecord, OnEnd
from dstack_emu.gateway.ingress.settings import IngressSettings
from dstack_emu.gateway.ingress.special_ids import ThisNode, special_pages
from dstack_emu.gateway.ingress.tls import FindTls
from dstack_emu.gateway.routing import Reach, Routes
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.listen import accept_on, reachable
from dstack_emu.transport.localhost_socket import parts_of


class Ingress:
    """The ingress of one gateway.

    `find_tls` is asked for the TLS settings of a client's domain, `connections` counts, and `on_end`
    is told of every connection when it has ended. `interrupt` may delay or refuse a connection.
    """

    def __init__(
        self,
        *,
        routes: Routes,
        reach: Reach,
        find_tls: FindTls,
        this_node: ThisNode,
        app_addresses: AppAddresses | None = None,
        settings: IngressSettings | None = None,
        connections: Connections | None = None,
        on_end: OnEnd | None = None,
        interrupt: Interrupt = lambda: None,
    ) -> None:
        self._shared = Surroundings(
            settings=settings or IngressSettings(),
            routes=routes,
            reach=reach,
            find_tls=find_tls,
            app_addresses=app_addresses or AppAddresses(TxtTable()),
            pages=special_pages(this_node),
            connections=connections or Connections(),
            interrupt=interrupt,
        )
        self._listening: list[asyncio.Server] = []
        self.address = ""
        """The address of the first port for clients on this machine, `host:port`, once it is started."""
        self._open: dict[Connection, asyncio.Task[None]] = {}
        self._none = asyncio.Event()
        self._none.set()
        self._on_end, self._events = on_end, EventLog(__name__)

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections on bound sockets, and take ownership of them."""
        self.address = reachable(sockets[0])
        for part in [part for sock in sockets for part in parts_of(sock)]:
            self._listening.append(await accept_on(part, lambda: Greeting(self._begin)))

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        for listening in self._listening:
            listening.close()
        for connection, task in tuple(self._open.items()):
            task.cancel()
            connection.abort()
        await self._none.wait()
        for page in self._shared.pages.values():
            await page.close()

    def _begin(self, greeting: Greeting) -> None:
        connection = Connection(self._shared, greeting, self._ended)
        self._open[connection] = asyncio.get_running_loop().create_task(connection.run())
        self._shared.connections.accepted()
        self._none.clear()

    def _ended(self, connection: Connection) -> None:
        del self._open[connection]
        self._shared.connections.ended()
        if not self._open:
            self._none.set()
        self._log(connection.record)
        if self._on_end is not None:
            self._on_end(connection.record)

    def _log(self, record: ConnectionRecord) -> None:
        log = self._events.debug if record.ended == COMPLETE else self._events.info
        log(
            "connection",
            server_name=record.server_name,
            app=record.app_id,
            instance=record.instance_id,
            port=record.port,
            ended=record.ended,
            received=record.received,
            sent=record.sent,
            client=record.client,
        )
