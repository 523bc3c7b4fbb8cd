"""Parts that several commands share: the warning, signals, and types of arguments."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.attest.release import DEFAULT, RELEASES, Release, release

T = TypeVar("T")

WARNING: Final = "An emulator: it protects nothing. Never give it a secret, never believe its evidence in production."


class UsageError(Exception):
    """Arguments, files or addresses that cannot be used; the command ends with status 2."""


def stop_on_signals() -> asyncio.Event:
    """Make an event that Ctrl-C and SIGTERM set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


def run_server(work: Coroutine[Any, Any, T], *, has_grpc: bool) -> T:
    """Run a server on the event loop for its listeners.

    uvloop answers a tenth more requests than asyncio's own loop, but the relay in front of grpcio does not support it.
    """
    if has_grpc:
        return asyncio.run(work)
    import uvloop  # costs 3 ms and 1 MiB, which other commands need not spend

    return uvloop.run(work)


class Interrupted(Exception):
    """A signal ended the work; it has cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell reports for a command ended by that signal."""
        return 128 + self.number


async def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Run work; at Ctrl-C, SIGTERM or SIGHUP cancel it, wait until it has cleaned up, and raise `Interrupted`.

    Further signals do not interrupt the clean-up.
    """
    task, numbers = asyncio.ensure_future(work), list[int]()

    def interrupt(number: int) -> None:
        if not numbers:
            task.cancel()
        numbers.append(number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it on purpose
            loop.add_signal_handler(number, interrupt, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not numbers:
            raise
        raise Interrupted(numbers[0]) from None


def say(text: str) -> None:
    """Print a message on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def listen_address(text: str) -> tuple[str, int]:
    """Read HOST:PORT (an IPv6 address in brackets) for argparse."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        example = f", such as 127.0.0.1:{text}" if text.isdigit() and int(text) <= 65535 else ""
        raise argparse.ArgumentTypeError(
            f"HOST:PORT expected{example}, with a port of 0 (a free one) to 65535, got {text!r}"
        )
    return host.strip("[]"), int(port)


def seconds_to_wait(text: str) -> float:
    """Parse a number of seconds, at most a day; raise what argparse reports."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"seconds, 0 to 86400, expected, got {text!r:.80}")
    return seconds


def hex_bytes(text: str) -> bytes:
    """Read hex, with 0x or without, for argparse."""
    try:
        return decode_hex("".join(text.split()))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"hex expected, got {text!r:.80}") from error


def named_release(text: str) -> Release:
    """Read the name of a dstack release for argparse."""
    try:
        return release(text)
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_release(parser: argparse.ArgumentParser, difference: str) -> None:
    """Add --release; `difference` says what it selects in this command."""
    names = "|".join(RELEASES)
    parser.add_argument(
        "--release", type=named_release, default=DEFAULT, metavar=names, help=f"{difference} ({DEFAULT.name})"
    )
