"""One connection of a client, from its first byte until it is forwarded.

The steps, each with a time limit: a PROXY header if the settings want one; the server name; what that means, by its
label or by a TXT record; which instances may be reached; the TLS handshake if TLS ends here; a connection to one of the
instances. An error in any of them closes the client's connection, without a TLS alert. A failed TLS handshake is the
exception, as it is upstream: its alert is sent.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from dstack_emu.gateway.connections import Connections
from dstack_emu.gateway.ingress.app_address import AppAddresses
from dstack_emu.gateway.ingress.backends import Candidate, connect_first
from dstack_emu.gateway.ingress.client_hello import ServerNameReader
from dstack_emu.gateway.ingress.errors import RefusedConnectionError
from dstack_emu.gateway.ingress.greeting import Greeting
from dstack_emu.gateway.ingress.label import DEFAULT_PORT, Destination, parse_label
from dstack_emu.gateway.ingress.proxy_header import ProxyHeader, header_of, read_header
from dstack_emu.gateway.ingress.record import ConnectionRecord
from dstack_emu.gateway.ingress.relay import Relay
from dstack_emu.gateway.ingress.settings import IngressSettings
from dstack_emu.gateway.ingress.tls import DomainTls, FindTls, TlsChannel
from dstack_emu.gateway.routing import Instance, Reach, Routes
from dstack_emu.gateway.state import PolicyEntry
from dstack_emu.transport.http.protocol import HttpServer

LOCALHOST: Final = Instance("localhost", "localhost", "127.0.0.1")
"""This machine's loopback, where the settings open it."""

TOO_LONG: Final = "the connection was kept too long"
CLOSED: Final = "the ingress is closed"

_log = logging.getLogger(__name__)


Interrupt = Callable[[], Awaitable[None] | None]
"""Returns what a connection waits for before it goes on, which may raise `RefusedConnectionError`; None for nothing."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all connections share: routes and reach, TLS by domain, custom domains, the special ids' pages, counts.

    `interrupt` is asked once for each connection whose destination is known.
    """

    settings: IngressSettings
    routes: Routes
    reach: Reach
    find_tls: FindTls
    app_addresses: AppAddresses
    pages: Mapping[str, HttpServer]
    connections: Connections
    interrupt: Interrupt


class Connection:
    """Finds out where a client's bytes go, and forwards them; `on_end` is told once when it has ended."""

    def __init__(self, shared: Surroundings, greeting: Greeting, on_end: Callable[["Connection"], None]) -> None:
        self._shared, self._greeting, self._on_end = shared, greeting, on_end
        self._limits = shared.settings.timeouts
        self._began = asyncio.get_running_loop().time()
        self._taken = b""
        """The bytes of the client that nobody has been given yet."""
        self._instance: Instance | None = None
        self._policies: dict[str, PolicyEntry] = {}
        self._relay: Relay | None = None
        self.record = ConnectionRecord()

    async def run(self) -> None:
        """Forward the connection, or refuse it. Returns when it is forwarded; the rest happens in callbacks."""
        try:
            async with within(self._limits.total, TOO_LONG):
                await self._establish()
        except (RefusedConnectionError, OSError) as error:
            self._refuse(str(error))
        except asyncio.CancelledError:
            self._refuse(CLOSED)
            raise
        except Exception as error:  # the server's edge: one connection must not end the others
            _log.exception("a connection to %r ended with an error of the gateway", self.record.server_name)
            self._refuse(f"error of the gateway: {error}")

    def abort(self) -> None:
        """End a connection that is forwarded."""
        if self._relay is not None:
            self._relay.abort(CLOSED)

    async def _establish(self) -> None:
        header = await self._proxy_header()
        self.record.client = header.client
        async with within(self._limits.handshake, "take sni timeout"):
            self.record.server_name = await self._server_name()
        destination, tls = await self._destination(self.record.server_name)
        self._note(destination)
        await self._interrupted()
        candidates = await self._candidates(destination)
        channel = None
        if not destination.is_passthrough and tls is not None:
            channel = await self._accept_tls(tls.h2 if destination.is_h2 else tls.plain)
        sock = await self._connect(destination, candidates)
        await self._forward(sock, channel, header)

    # ---- what the client says

    async def _proxy_header(self) -> ProxyHeader:
        transport = self._greeting.transport
        if not self._shared.settings.reads_proxy_header:
            sock = transport.get_extra_info("socket")
            return header_of(transport.get_extra_info("peername"), transport.get_extra_info("sockname"), sock.family)
        async with within(self._limits.proxy_header, "proxy protocol header timeout"):
            while (read := read_header(self._taken)) is None:
                self._taken += await self._greeting.more("failed to read proxy protocol header: the client ended")
        header, size = read
        self._taken = self._taken[size:]
        return header

    async def _server_name(self) -> str:
        reader = ServerNameReader()
        name = reader.receive(self._taken)
        while name is None:
            data = await self._greeting.more("no sni found")
            self._taken += data
            name = reader.receive(data)
        self._greeting.pause()
        return name

    async def _destination(self, server_name: str) -> tuple[Destination, DomainTls | None]:
        label, dot, domain = server_name.partition(".")
        if not dot:
            raise RefusedConnectionError("invalid sni")
        tls = self._shared.find_tls(domain)
        if tls is not None:
            return parse_label(label), tls
        async with within(self._limits.dns, f"DNS TXT resolve timeout for {server_name}"):
            return await self._shared.app_addresses.find(server_name), None

    def _note(self, destination: Destination) -> None:
        self.record.id, self.record.port = destination.id, destination.port
        terminated = "h2" if destination.is_h2 else "terminated"
        self.record.treatment = "passthrough" if destination.is_passthrough else terminated

    async def _interrupted(self) -> None:
        interruption = self._shared.interrupt()
        if interruption is None:
            return
        waiting = asyncio.ensure_future(interruption)
        gone = asyncio.ensure_future(self._greeting.ended())
        try:
            await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise RefusedConnectionError("the client ended")
            waiting.result()
        finally:
            for each in (waiting, gone):
                each.cancel()
        self._greeting.pause()

    async def _accept_tls(self, context: ssl.SSLContext) -> TlsChannel:
        channel = TlsChannel(context)
        async with within(self._limits.handshake, "handshake timeout"):
            while not self._shake_hands(channel):
                self._taken = await self._greeting.more("failed to accept tls connection: the client ended")
        self._greeting.pause()
        return channel

    def _shake_hands(self, channel: TlsChannel) -> bool:
        data, self._taken = self._taken, b""
        try:
            return channel.shake_hands(data)
        finally:
            self._greeting.transport.write(channel.take())  # an alert, too

    # ---- who may be reached

    async def _candidates(self, destination: Destination) -> Sequence[Instance]:
        if self._is_special(destination):
            if destination.port != DEFAULT_PORT:
                raise RefusedConnectionError(f"Only port {DEFAULT_PORT} is supported for the id {destination.id}")
            return ()
        if destination.id == LOCALHOST.id and self._shared.settings.insecure_localhost_backend:
            return (LOCALHOST,)
        found = self._shared.routes.candidates(destination.id)
        if not found:
            raise RefusedConnectionError(f"app <{destination.id}> not found")
        await asyncio.gather(*(self._ask_policy(instance) for instance in found))
        allowed = [instance for instance in found if self._is_open(instance, destination.port)]
        if not allowed:
            raise RefusedConnectionError(
                f"port {destination.port} denied by app port policy for {destination.id} ({len(found)} candidate(s))"
            )
        return allowed

    def _is_open(self, instance: Instance, port: int) -> bool:
        policy = self._policies.get(instance.id)
        return policy is not None and policy.is_open(port)

    def _is_special(self, destination: Destination) -> bool:
        return destination.id in self._shared.pages and not destination.is_passthrough

    async def _ask_policy(self, instance: Instance) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.connect):
                policy = await self._shared.routes.port_policy(instance)
                if policy is not None:
                    self._policies[instance.id] = policy

    # ---- the app's side

    async def _connect(self, destination: Destination, instances: Sequence[Instance]) -> socket.socket:
        if self._is_special(destination):
            ours, theirs = socket.socketpair()
            page = self._shared.pages[destination.id]
            await asyncio.get_running_loop().connect_accepted_socket(page, sock=theirs)
            return ours
        self._require_place(instances)
        for instance in instances:
            self._shared.connections.opened(instance.id)
        held = set(instances)
        try:
            async with within(self._limits.connect, f"connecting timeout to app {destination.id}"):
                instance, sock = await connect_first(self._endpoints(destination, instances), destination.id)
            held.remove(instance)
        finally:
            for other in held:
                self._shared.connections.closed(other.id)
        self._instance = instance
        self.record.instance_id, self.record.app_id = instance.id, instance.app_id
        return sock

    def _require_place(self, instances: Sequence[Instance]) -> None:
        """Refuse one connection too many to all candidates together."""
        maximum = self._shared.settings.max_connections_per_app
        total = sum(self._shared.connections.of(instance.id) for instance in instances)
        if 0 < maximum <= total:
            raise RefusedConnectionError(f"app connection limit exceeded: {total}/{maximum}")

    def _endpoints(self, destination: Destination, instances: Sequence[Instance]) -> Sequence[Candidate]:
        if instances == (LOCALHOST,):
            return ((LOCALHOST, (LOCALHOST.ip, destination.port)),)
        found = ((one, self._shared.reach.endpoint(one, destination.port)) for one in instances)
        return [(one, endpoint) for one, endpoint in found if endpoint is not None]

    async def _forward(self, sock: socket.socket, channel: TlsChannel | None, header: ProxyHeader) -> None:
        loop, greeting = asyncio.get_running_loop(), self._greeting
        relay = Relay(self._shared.settings, channel, self._ended)
        relay.client.connection_made(greeting.transport)
        try:
            await loop.create_connection(lambda: relay.app, sock=sock)
        except BaseException:
            sock.close()
            raise
        self._relay = relay
        self.record.is_forwarded = True
        if self._sends_header():
            relay.app.send(header.encoded)
        early = self._taken + greeting.take()
        greeting.transport.set_protocol(relay.client)
        relay.begin(early, greeting, self._began + self._limits.total - loop.time())

    def _sends_header(self) -> bool:
        policy = None if self._instance is None else self._policies.get(self._instance.id)
        return policy is not None and policy.sends_proxy_header(self.record.port)

    # ---- the end

    def _refuse(self, reason: str) -> None:
        transport = self._greeting.transport
        if transport.get_write_buffer_size():  # an alert, which need not be read
            asyncio.get_running_loop().call_later(self._limits.handshake, transport.abort)
            transport.close()
        else:
            transport.abort()
        self._ended(reason)

    def _ended(self, reason: str) -> None:
        if self._instance is not None:
            self._shared.connections.closed(self._instance.id)
        if self._relay is not None:
            self.record.received, self.record.sent = self._relay.client.received, self._relay.app.received
        self.record.ended = reason
        self.record.seconds = asyncio.get_running_loop().time() - self._began
        self._on_end(self)


@asynccontextmanager
async def within(seconds: float, why: str) -> AsyncIterator[None]:
    """Refuse the connection with `why` if the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise RefusedConnectionError(why) from error
