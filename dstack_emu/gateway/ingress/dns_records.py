"""TXT records from name servers that are given: over UDP, and over TCP if an answer does not fit.

A record is kept as long as it is valid; that there is none is not kept, because it may be added at any time.
Not here: the system's name servers, which nobody has named.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from dstack_emu.gateway.ingress.dns_message import DnsError, TxtAnswer, encode_query, parse_answer
from dstack_emu.transport.events import EventLog

MAX_KEPT: Final = 256
"""How many records are kept, as upstream does."""

_ATTEMPT: Final = 1.5
"""Seconds that a server may take before the next one is asked."""
_log = EventLog(__name__)


class DnsRecords:
    """TXT records of name servers, IP addresses with ports, which are asked in turn."""

    def __init__(self, servers: Sequence[tuple[str, int]]) -> None:
        self._servers = servers
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    async def lookup(self, name: str) -> bytes | None:
        """Return the first string of the first TXT record of a name; None if there is none, or no server answers."""
        loop, name = asyncio.get_running_loop(), name.lower()
        until, text = self._kept.get(name, (0.0, b""))
        if loop.time() < until:
            return text
        answer = await self._ask(name)
        if answer.text is not None:
            self._keep(name, loop.time() + answer.ttl, answer.text)
        return answer.text

    def _keep(self, name: str, until: float, text: bytes) -> None:
        self._kept[name] = until, text
        self._kept.move_to_end(name)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    async def _ask(self, name: str) -> TxtAnswer:
        for server in self._servers:
            try:
                query = encode_query(name, secrets.randbelow(1 << 16))
                async with asyncio.timeout(_ATTEMPT):
                    answer = await _over_udp(server, query)
                    return await _over_tcp(server, query) if answer.is_truncated else answer
            except (DnsError, OSError, EOFError) as error:  # a TimeoutError is an OSError
                _log.info("dns", domain=name, server=server[0], error=str(error) or "no answer in time")
        return TxtAnswer()


async def _over_udp(server: tuple[str, int], query: bytes) -> TxtAnswer:
    loop = asyncio.get_running_loop()
    transport, asked = await loop.create_datagram_endpoint(lambda: _Asked(query), remote_addr=server)
    try:
        transport.sendto(query)
        return await asked.answer
    finally:
        transport.abort()


async def _over_tcp(server: tuple[str, int], query: bytes) -> TxtAnswer:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(len(query).to_bytes(2, "big") + query)
        size = int.from_bytes(await reader.readexactly(2), "big")
        return parse_answer(await reader.readexactly(size), query)
    finally:
        writer.transport.abort()


class _Asked(asyncio.DatagramProtocol):
    """Waits for the answer to a query; datagrams that are none do not end the wait."""

    def __init__(self, query: bytes) -> None:
        self._query = query
        self.answer: asyncio.Future[TxtAnswer] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if self.answer.done():
            return
        try:
            self.answer.set_result(parse_answer(data, self._query))
        except DnsError as error:
            if data[:2] == self._query[:2]:
                self.answer.set_exception(error)

    def error_received(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
