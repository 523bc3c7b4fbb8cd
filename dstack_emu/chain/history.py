"""The transactions of a chain in words: which function of dstack's contracts each calls, and what events came of it."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import AuthEthRevision
from dstack_emu.chain import abi
from dstack_emu.chain.artefacts import app_contract, kms_contract
from dstack_emu.chain.block import Block, Receipt
from dstack_emu.chain.engine import Log
from dstack_emu.chain.quantities import checksummed, data

MAX_SHOWN: Final = 200
"""Characters of an argument; evidence of a KMS is longer."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A function or an event: the name and type of each argument, and which ones are topics."""

    name: str
    arguments: tuple[tuple[str, str, bool], ...]

    @property
    def signature(self) -> str:
        return f"{self.name}({','.join(kind for _, kind, _ in self.arguments)})"

    def kinds(self, *, indexed: bool) -> str:
        return f"({','.join(kind for _, kind, is_topic in self.arguments if is_topic is indexed)})"


def transactions(blocks: Iterable[Block], revision: AuthEthRevision | None) -> list[dict[str, Any]]:
    """Return the transactions in blocks, in their order, as JSON.

    `function` is None for calls that no contract of dstack has; a contract that was created is in `created`.
    """
    return [_transaction(block, each, revision) for block in blocks for each in block.receipts]


def _transaction(block: Block, receipt: Receipt, revision: AuthEthRevision | None) -> dict[str, Any]:
    sent = receipt.transaction
    called = _called(sent.data, revision) if sent.to is not None else None
    return {
        "hash": data(sent.hash),
        "block": block.number,
        "time": block.timestamp,
        "from": checksummed(sent.sender),
        "to": None if sent.to is None else checksummed(sent.to),
        "created": None if receipt.created is None else checksummed(receipt.created),
        "function": None if called is None else called[0],
        "args": {} if called is None else called[1],
        "succeeded": receipt.succeeded,
        "gas_used": receipt.gas_used,
        "events": [_event(log, revision) for log in receipt.logs],
    }


def function_name(call: bytes) -> str | None:
    """Return the name of the function that a call is to, None if no contract of dstack has it."""
    entry = _functions("next").get(call[:4])  # which has all of 0.5.11, too
    return None if entry is None else entry.name


def _called(call: bytes, revision: AuthEthRevision | None) -> tuple[str, dict[str, Any]] | None:
    entry = _functions(revision).get(call[:4])
    if entry is None:
        return None
    try:
        values = abi.decode(entry.kinds(indexed=False), call[4:])
    except FormatError:
        return entry.name, {}
    return entry.name, {name: shown(value) for (name, _, _), value in zip(entry.arguments, values, strict=True)}


def _event(log: Log, revision: AuthEthRevision | None) -> dict[str, Any]:
    """Return an event with its arguments; one of an unknown contract with its topics and data."""
    said: dict[str, Any] = {"address": checksummed(log.address)}
    entry = _events(revision).get(log.topics[0]) if log.topics else None
    try:
        if entry is None:
            raise FormatError("an event of another contract")
        plain = iter(abi.decode(entry.kinds(indexed=False), log.data))
        topics = iter(abi.decode(entry.kinds(indexed=True), b"".join(log.topics[1:])))
    except FormatError:
        return said | {"name": None, "topics": [data(each) for each in log.topics], "data": _cut(data(log.data))}
    args = {name: shown(next(topics if is_topic else plain)) for name, _, is_topic in entry.arguments}
    return said | {"name": entry.name, "args": args}


def shown(value: Any) -> Any:
    """Return a value of a call as JSON: an address with its checksum, other bytes in hex."""
    if isinstance(value, bytes):
        return checksummed(value) if len(value) == 20 else _cut(data(value))
    if isinstance(value, list):
        return [shown(each) for each in value]
    return value if isinstance(value, bool) else _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


@functools.cache
def _functions(revision: AuthEthRevision | None) -> Mapping[bytes, _Entry]:
    return {abi.selector(entry.signature): entry for entry in _entries("function", revision)}


@functools.cache
def _events(revision: AuthEthRevision | None) -> Mapping[bytes, _Entry]:
    return {abi.topic(entry.signature): entry for entry in _entries("event", revision)}


def _entries(kind: str, revision: AuthEthRevision | None) -> list[_Entry]:
    if revision is None:
        return []
    found = [*kms_contract(revision).abi, *app_contract(revision).abi]
    return [_entry(each) for each in found if each["type"] == kind]


def _entry(described: Mapping[str, Any]) -> _Entry:
    inputs = described["inputs"]
    return _Entry(
        described["name"], tuple((each["name"], _type(each), bool(each.get("indexed", False))) for each in inputs)
    )


def _type(described: Mapping[str, Any]) -> str:
    """Return a type as signatures have it: a tuple by its members."""
    kind: str = described["type"]
    if not kind.startswith("tuple"):
        return kind
    return f"({','.join(map(_type, described['components']))}){kind.removeprefix('tuple')}"
