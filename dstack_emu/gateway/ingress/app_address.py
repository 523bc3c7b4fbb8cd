"""Custom domains: the TXT record of a server name that is under none of the gateway's domains.

`_dstack-app-address.<name>` has `<app or instance id>:<port>`; `_dstack-app-address-wildcard.<parent>` is for every
name directly below the parent. Source: `gateway/src/proxy/tls_passthough.rs` of dstack 312dc605.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from dstack_emu.gateway.ingress.errors import RefusedConnectionError
from dstack_emu.gateway.ingress.label import Destination, parse_port

PREFIX: Final = "_dstack-app-address"
OLD_PREFIX: Final = "_tapp-address"
"""The prefix before the project was renamed, which is also asked."""


class TxtRecords(Protocol):
    """Where TXT records come from."""

    async def lookup(self, name: str) -> bytes | None:
        """Return the first string of the first TXT record of a domain name; None if there is none, or no answer."""
        ...


@dataclass(frozen=True, slots=True)
class TxtTable:
    """TXT records from a table, by lowercase domain name."""

    records: Mapping[str, str] = field(default_factory=dict)

    async def lookup(self, name: str) -> bytes | None:
        """Return the record of a name."""
        found = self.records.get(name.lower())
        return None if found is None else found.encode()


@dataclass(frozen=True, slots=True)
class AppAddresses:
    """How custom domains are found: the records, their prefix, and whether the old prefix is asked, too."""

    records: TxtRecords
    prefix: str = PREFIX
    asks_old_prefix: bool = True

    async def find(self, name: str) -> Destination:
        """Return what a custom domain means; raise `RefusedConnectionError`.

        Both prefixes are asked at once, and the current one wins. A record that cannot be read ends the search.
        """
        domains = [f"{prefix}.{name}" for prefix in self._prefixes()]
        found = await asyncio.gather(*(self.records.lookup(domain) for domain in domains))
        for domain, record in zip(domains, found, strict=True):
            if record is not None:
                return _parse(record, name, domain)
        return await self._find_wildcard(name)

    def _prefixes(self) -> Sequence[str]:
        old = self.asks_old_prefix and self.prefix != OLD_PREFIX
        return (self.prefix, OLD_PREFIX) if old else (self.prefix,)

    async def _find_wildcard(self, name: str) -> Destination:
        _, _, parent = name.partition(".")
        domain = f"{self.prefix}-wildcard.{parent}"
        record = await self.records.lookup(domain)
        if record is None:
            raise RefusedConnectionError(f"failed to resolve app address for {name}: no txt record found via {domain}")
        return _parse(record, name, domain)


def _parse(record: bytes, name: str, domain: str) -> Destination:
    try:
        id_, colon, port = record.decode().partition(":")
    except UnicodeDecodeError:
        id_ = colon = port = ""
    number = parse_port(port) if colon else None
    if number is None:
        raise RefusedConnectionError(
            f"failed to parse app address for {name} via {domain}: expected `<id>:<port>`, got {record!r}"
        )
    return Destination(id_, number, is_passthrough=True)
