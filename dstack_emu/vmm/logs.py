"""The logs of a machine: `serial`, `stdout` and `stderr`, as files, with their tail and what follows.

A log begins anew at each boot, and if it exceeds a size. Then what it has goes to `.1`, that to `.2`, and so on; the
file itself is emptied in place, and stays the same file. In 0.5 serial.log alone begins anew, at each boot, and what it
had is appended to serial.history.log. Source: dstack `vmm/src/{main_routes,logrotate}.rs` at 312dc605, and
`vmm/src/app.rs` at 40eaf35e.
"""

import asyncio
import contextlib
import datetime
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHANNELS: Final = {"serial": "serial.log", "stdout": "stdout.log", "stderr": "stderr.log"}
DEFAULT_LINES: Final = 10_000
HISTORY: Final = "serial.history.log"
HEARTBEAT: Final = 60.0
"""Seconds without output after which a follower is sent a line, so that proxies keep the connection."""
_BLOCK: Final = 64 * 1024
_ESCAPES: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")


@dataclass(slots=True)
class _Log:
    """One log file; `turn` counts how often it began anew."""

    path: Path
    turn: int = 0
    segments: int = 0

    def segment(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def append(self, text: bytes) -> int:
        """Append, and return the size in bytes then."""
        with self.path.open("ab") as file:
            file.write(text)
            return file.tell()

    def begin_anew(self) -> None:
        """Keep what there is as the newest segment; a log without content takes none."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        if not content:
            return
        if self.segments:
            for number in range(self.segments - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    self.segment(number).replace(self.segment(number + 1))
            self.segment(1).write_bytes(content)
        self.path.write_bytes(b"")
        self.turn += 1

    def unread(self, turn: int, position: int) -> bytes:
        """Return what was appended after a position of a turn, in segments that still exist, and in the file."""
        found = b""
        for number in range(self.turn - turn, 0, -1):
            found += _read_from(self.segment(number), position)
            position = 0
        return found + _read_from(self.path, position)

    def size(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_size
        return 0


class MachineLogs:
    """The logs of one machine, to which this process alone appends. Close them when the machine is removed.

    A log above `max_bytes` (0: never) begins anew; `max_backups` segments are kept. If they do not rotate, there are no
    segments, and the history, of which `history_bytes` are kept.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int = 0,
        max_backups: int = 0,
        *,
        rotates: bool = True,
        history_bytes: int = 4 << 20,
    ) -> None:
        segments = max_backups if rotates else 0
        self._history_bytes = history_bytes
        self._logs = {name: _Log(folder / file, segments=segments) for name, file in CHANNELS.items()}
        self._history = folder / HISTORY
        self._rotates = rotates
        self._max_bytes = max_bytes if rotates else 0
        self._appended = asyncio.Event()
        self._closed = False

    def begin_boot(self, now: float) -> None:
        """Begin every log anew, or serial.log alone; `now` is the time in Unix seconds. Raises `OSError`."""
        moment = datetime.datetime.fromtimestamp(int(now), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        marker = f"===== boot @ {moment} =====\n"
        if not self._rotates:
            self._begin_boot_with_history(f"\n{marker}\n")
            return
        for log in self._logs.values():
            log.begin_anew()
        self.append("serial", marker)

    def _begin_boot_with_history(self, marker: str) -> None:
        serial = self._logs["serial"]
        if content := _read_from(serial.path, 0):
            whole = _read_from(self._history, 0) + marker.encode() + content
            self._history.write_bytes(_end_of(whole, self._history_bytes))
        serial.begin_anew()
        for name, log in self._logs.items():
            if name != "serial" and log.path.exists():
                self.append(name, marker)

    def append(self, channel: str, text: str) -> None:
        """Append a text to a log; raise `OSError`."""
        log = self._logs[channel]
        if log.append(text.encode(errors="replace")) > self._max_bytes > 0:
            log.begin_anew()
        self._wake()

    def tail(self, channel: str, lines: int, *, ansi: bool) -> bytes:
        """Return the last lines of a log."""
        text = _tail(self._logs[channel].path, lines)
        return text if ansi else without_escapes(text)

    async def follow(self, channel: str, lines: int, *, ansi: bool) -> AsyncIterator[bytes]:
        """Yield the last lines of a log, and then what is appended, until the logs are closed."""
        log = self._logs[channel]
        text, turn, position = _tail(log.path, lines), log.turn, log.size()
        while True:
            if text:
                yield text if ansi else without_escapes(text)
            appended = self._appended
            text = log.unread(turn, position)
            turn, position = log.turn, log.size()
            if text:
                continue
            if self._closed:
                return
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


def _tail(path: Path, lines: int) -> bytes:
    """Return the last lines of a file; an absent file is empty."""
    blocks: list[bytes] = []
    try:
        with path.open("rb") as file:
            position = file.seek(0, 2)
            while position > 0 and sum(block.count(b"\n") for block in blocks) <= lines:
                start = max(0, position - _BLOCK)
                file.seek(start)
                blocks.insert(0, file.read(position - start))
                position = start
    except FileNotFoundError:
        return b""
    kept = b"".join(blocks).splitlines(keepends=True)
    return b"".join(kept[-lines:] if lines else [])


def _end_of(text: bytes, size: int) -> bytes:
    """Return the end of a text, of at most that size, that begins with a line."""
    if len(text) <= size:
        return text
    return text[text.find(b"\n", len(text) - size) + 1 :]


def _read_from(path: Path, position: int) -> bytes:
    """Return what a file has after a position; an absent file is empty."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read()
    except FileNotFoundError:
        return b""
