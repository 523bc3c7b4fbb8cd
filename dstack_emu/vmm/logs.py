"""The logs of a machine: `serial`, `stdout` and `stderr`, as files, with their tail and what follows.

Source: dstack `vmm/src/main_routes.rs` at 312dc605.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

CHANNELS: Final = {"serial": "serial.log", "stdout": "stdout.log", "stderr": "stderr.log"}
DEFAULT_LINES: Final = 10_000
HEARTBEAT: Final = 60.0
"""Seconds without output after which a follower is sent a line, so that proxies keep the connection."""
_BLOCK: Final = 64 * 1024
_ESCAPES: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")


class MachineLogs:
    """The logs of one machine, to which this process alone appends. Close them when the machine is removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._appended = asyncio.Event()
        self._closed = False

    def append(self, channel: str, text: str) -> None:
        """Append a text to a log; raise `OSError`."""
        with (self._folder / CHANNELS[channel]).open("ab") as file:
            file.write(text.encode(errors="replace"))
        self._wake()

    def tail(self, channel: str, lines: int, *, ansi: bool) -> bytes:
        """Return the last lines of a log."""
        text, _ = _tail(self._folder / CHANNELS[channel], lines)
        return text if ansi else without_escapes(text)

    async def follow(self, channel: str, lines: int, *, ansi: bool) -> AsyncIterator[bytes]:
        """Yield the last lines of a log, and then what is appended, until the logs are closed."""
        path = self._folder / CHANNELS[channel]
        text, position = _tail(path, lines)
        while True:
            if text:
                yield text if ansi else without_escapes(text)
            if self._closed:
                return
            appended = self._appended
            text, position = _read_from(path, position)
            if text:
                continue
            try:
                await asyncio.wait_for(appended.wait(), HEARTBEAT)
            except TimeoutError:
                text = b"[vmm heartbeat]\n"

    def close(self) -> None:
        """End all followers."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._appended.set()
        self._appended = asyncio.Event()


def without_escapes(text: bytes) -> bytes:
    """Remove terminal escape sequences."""
    return _ESCAPES.sub(b"", text)


def _tail(path: Path, lines: int) -> tuple[bytes, int]:
    """Return the last lines of a file, and its size in bytes then; an absent file is empty."""
    blocks: list[bytes] = []
    try:
        with path.open("rb") as file:
            size = position = file.seek(0, 2)
            while position > 0 and sum(block.count(b"\n") for block in blocks) <= lines:
                start = max(0, position - _BLOCK)
                file.seek(start)
                blocks.insert(0, file.read(position - start))
                position = start
    except FileNotFoundError:
        return b"", 0
    kept = b"".join(blocks).splitlines(keepends=True)
    return b"".join(kept[-lines:] if lines else []), size


def _read_from(path: Path, position: int) -> tuple[bytes, int]:
    """Return what a file has after a position, and the position after that; a file that became shorter is new."""
    try:
        with path.open("rb") as file:
            start = position if file.seek(0, 2) >= position else 0
            file.seek(start)
            text = file.read()
    except FileNotFoundError:
        return b"", 0
    return text, start + len(text)
