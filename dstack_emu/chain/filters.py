"""Which logs a client asks for, and filters that it polls."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from dstack_emu.chain.block import Block
from dstack_emu.chain.engine import Log
from dstack_emu.chain.errors import InvalidParamsError, UnknownStateError
from dstack_emu.chain.ledger import Ledger
from dstack_emu.chain.quantities import data, parse_address, parse_hash
from dstack_emu.chain.views import log_view

MAX_CHOICES: Final = 1_000
"""How many addresses, or how many values of a topic, one filter may name."""
MAX_TOPICS: Final = 4
MAX_FILTERS: Final = 1_000
"""How many filters are kept; the oldest is forgotten for a new one."""

Choices: TypeAlias = "frozenset[bytes] | None"
"""The values one of which is wanted; None for any."""


@dataclass(frozen=True, slots=True)
class LogFilter:
    """The contracts and topics of the logs that are wanted."""

    addresses: Choices = None
    topics: tuple[Choices, ...] = ()

    @classmethod
    def of(cls, members: Mapping[str, Any]) -> "LogFilter":
        """Read `address` and `topics`; raise `InvalidParamsError`."""
        topics = members.get("topics") or []
        if not isinstance(topics, list) or len(topics) > MAX_TOPICS:
            raise InvalidParamsError(f"topics: a list of at most {MAX_TOPICS} expected")
        address = members.get("address")
        addresses = None if address in (None, []) else _choices(address, parse_address, "address")
        return cls(addresses, tuple(_choices(each, parse_hash, "topics") for each in topics))

    def admits(self, log: Log) -> bool:
        """Return whether a log is wanted."""
        if self.addresses is not None and log.address not in self.addresses:
            return False
        if len(self.topics) > len(log.topics):
            return False
        return all(wanted is None or topic in wanted for wanted, topic in zip(self.topics, log.topics, strict=False))

    def of_block(self, block: Block) -> list[dict[str, Any]]:
        """Return the wanted logs of a block, in JSON."""
        return [
            log_view(block, receipt, place, log)
            for receipt in block.receipts
            for place, log in enumerate(receipt.logs)
            if self.admits(log)
        ]


def _choices(value: object, parse: Any, name: str) -> Choices:
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_CHOICES:
        raise InvalidParamsError(f"{name}: at most {MAX_CHOICES} values expected, got {len(values)}")
    if None in values or not values:
        return None
    return frozenset(parse(each, name) for each in values)


@dataclass(slots=True)
class _Polled:
    """A filter that a client polls: for logs, or with none for the hashes of blocks."""

    logs: LogFilter | None
    first: int
    seen: int
    last: int | None = None


@dataclass(slots=True)
class Filters:
    """The filters that clients have installed, by their numbers."""

    ledger: Ledger
    _filters: dict[int, _Polled] = field(default_factory=dict)
    _last: int = 0

    def add(self, logs: LogFilter | None, first: int | None = None, last: int | None = None) -> int:
        """Install a filter for logs from one block to another, or for new blocks; return its number."""
        if len(self._filters) >= MAX_FILTERS:
            del self._filters[next(iter(self._filters))]
        self._last += 1
        head = self.ledger.head.number
        self._filters[self._last] = _Polled(logs, head + 1 if first is None else first, head, last)
        return self._last

    def remove(self, number: int) -> bool:
        """Forget a filter; return whether it existed."""
        return self._filters.pop(number, None) is not None

    def changes(self, number: int) -> list[Any]:
        """Return what is new since the last question."""
        polled = self._found(number)
        first = min(polled.seen, self.ledger.head.number) + 1  # after a revert, blocks of the same numbers are new
        polled.seen = self.ledger.head.number
        blocks = self.ledger.blocks[first:]
        return [data(block.hash) for block in blocks] if polled.logs is None else list(self._logs(polled, blocks))

    def logs(self, number: int) -> list[Any]:
        """Return all logs that a filter wants."""
        polled = self._found(number)
        return [] if polled.logs is None else list(self._logs(polled, self.ledger.blocks))

    def _logs(self, polled: _Polled, blocks: list[Block]) -> Iterator[dict[str, Any]]:
        for block in blocks:
            if polled.logs and polled.first <= block.number <= (block.number if polled.last is None else polled.last):
                yield from polled.logs.of_block(block)

    def _found(self, number: int) -> _Polled:
        found = self._filters.get(number)
        if found is None:
            raise UnknownStateError(f"filter not found: {number:#x}")
        return found
