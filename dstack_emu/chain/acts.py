"""What changes a chain, as a list that gives the same chain again: in memory, or kept in a file.

A line of the file is JSON: first what the chain begins with, then an act each. It is appended when the act is done, so
a process that is killed loses at most what it had not yet answered. A last line without an end is such an act; it is
removed at the next start.
"""

import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from dstack_emu.chain.errors import ChainError, StoreError
from dstack_emu.chain.transaction import Transaction

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Mined:
    """A block at a time in Unix seconds, with a transaction or without one."""

    timestamp: int
    transaction: Transaction | None


@dataclass(frozen=True, slots=True)
class Balance:
    """The balance of an account was set, in wei."""

    address: bytes
    balance: int


@dataclass(frozen=True, slots=True)
class Ahead:
    """The time of blocks is so many seconds ahead of the clock."""

    seconds: int


Act: TypeAlias = Mined | Balance | Ahead


class Record(Protocol):
    """Where acts are kept."""

    def acts(self) -> Iterator[Act]:
        """Return the acts that were kept before."""

    def add(self, act: Act) -> None:
        """Keep an act."""

    def size(self) -> int:
        """Return the place after the last act."""

    def truncate(self, size: int) -> None:
        """Forget the acts after a place."""


class Forgetful:
    """A `Record` that keeps nothing."""

    def acts(self) -> Iterator[Act]:
        """Return none."""
        return iter(())

    def add(self, act: Act) -> None:
        """Do nothing."""

    def size(self) -> int:
        """Return 0."""
        return 0

    def truncate(self, size: int) -> None:
        """Do nothing."""


class Kept:
    """A `Record` in a file. `beginning` is what the chain begins with: a file of another chain is refused."""

    def __init__(self, path: Path, beginning: dict[str, Any]) -> None:
        self._path = path
        header = json.dumps({"version": VERSION, **beginning}, sort_keys=True).encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open until `close`
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        try:
            self._lock()
            self._begin(header)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def acts(self) -> Iterator[Act]:
        """Return the acts of the file; raise `StoreError` for a line that is none."""
        self._file.seek(0)
        for number, line in enumerate(self._file.read().splitlines()[1:], 2):
            try:
                yield parse_act(json.loads(line))
            except (ValueError, KeyError, TypeError, ChainError) as error:
                raise StoreError(f"{self._path}: line {number}: an act expected: {error}; remove the file") from error

    def add(self, act: Act) -> None:
        """Append an act; raise `StoreError`."""
        line, before = json.dumps(act_document(act)).encode() + b"\n", self.size()
        try:
            written = self._file.write(line)
        except OSError as error:
            self.truncate(before)
            raise StoreError(f"{self._path}: {error.strerror}") from error
        if written != len(line):
            self.truncate(before)
            raise StoreError(f"{self._path}: only {written} of {len(line)} bytes could be written")

    def size(self) -> int:
        """Return the length of the file in bytes."""
        return self._file.seek(0, 2)

    def truncate(self, size: int) -> None:
        """Cut the file."""
        self._file.truncate(size)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{self._path} is in use by another process: stop that one, or name another folder"
            ) from error

    def _begin(self, header: bytes) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            self._file.truncate(len(whole))
        if not whole:
            self._file.write(header)
        elif not whole.startswith(header):
            line = whole.partition(b"\n")[0].decode(errors="replace")
            raise StoreError(
                f"{self._path} is of another chain: {header.decode().strip()} expected, got {line:.300}; remove the "
                "file, or start with the same seed, chain id and release"
            )


def act_document(act: Act) -> dict[str, Any]:
    """Return an act in JSON."""
    match act:
        case Balance(address, balance):
            return {"address": address.hex(), "balance": balance}
        case Ahead(seconds):
            return {"ahead": seconds}
        case Mined(timestamp, transaction):
            return {"timestamp": timestamp, **({} if transaction is None else _written_transaction(transaction))}


def _written_transaction(transaction: Transaction) -> dict[str, Any]:
    made = {"raw": transaction.raw.hex()}
    return made if not transaction.is_impersonated else {**made, "sender": transaction.sender.hex()}


def parse_act(value: dict[str, Any]) -> Act:
    """Read what `act_document` returned; raise `ValueError`, `KeyError`, `TypeError` or `ChainError` for another."""
    if "balance" in value:
        return Balance(bytes.fromhex(value["address"]), int(value["balance"]))
    if "ahead" in value:
        return Ahead(int(value["ahead"]))
    return Mined(int(value["timestamp"]), _transaction(value) if "raw" in value else None)


def _transaction(value: dict[str, Any]) -> Transaction:
    raw = bytes.fromhex(value["raw"])
    if "sender" in value:
        return Transaction.decode_impersonated(raw, bytes.fromhex(value["sender"]))
    return Transaction.decode(raw)
