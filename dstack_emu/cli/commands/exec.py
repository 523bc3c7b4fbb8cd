"""`dstack-emu exec`: start a stack, run a command that uses it, and stop the stack."""

import argparse
import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dstack_emu.attest.errors import AttestError
from dstack_emu.cli import waits
from dstack_emu.cli.commands.common import WARNING, UsageError, say
from dstack_emu.cli.commands.stack_options import add_stack_options, stack_config
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.environment import environment
from dstack_emu.deployment.errors import PartEndedError, StackError
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.errors import TransportError

DESCRIPTION = (
    "Start a stack on free ports, run a command with environment variables that name the stack's services, and stop "
    "the stack when the command ends. The exit status is that of the command, or 128 plus the number of the signal "
    "that ended it; 127 if the command does not exist, 126 if it cannot be run, 2 if the stack does not start. "
    "" + WARNING
)

EPILOG = (
    "Example: dstack-emu exec -- pytest tests/. `dstack-emu exec -- env` prints the variables; docs/configuration.md "
    "explains them."
)

NOT_FOUND, NOT_EXECUTABLE = 127, 126
PATIENCE: Final = 5.0
"""Seconds that a command has to end after the stack has failed, before it is killed."""

_FORWARDED: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
_FROM_THE_KEYBOARD: Final = (signal.SIGINT, signal.SIGQUIT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_stack_options(parser)
    parser.add_argument("--runbook-ports", action="store_true", help="use the runbook's ports instead of free ones")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- CMD ARGS", help="the command")
    parser.usage, parser.epilog = "dstack-emu exec [OPTIONS] -- CMD ARGS", EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    words: list[str] = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    if not words:
        raise UsageError("a command expected, as in: dstack-emu exec -- pytest")
    return asyncio.run(_Run(words).within(stack_config(arguments, free_ports=not arguments.runbook_ports)))


class _Run:
    """Runs a command and forwards signals to it. A signal that comes before it runs ends the stack.

    SIGUSR1 is also answered here, and ends nothing here.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._task: asyncio.Task[Any] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._signalled: int | None = None

    async def within(self, config: StackConfig) -> int:
        """Run the command with a stack; return the exit status."""
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (*_FORWARDED, *_FROM_THE_KEYBOARD):
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._signal, number)
        waits.answer_signal(self._forward_question)
        from dstack_emu.stack import Stack  # imported here, because it is slow and --help does not need it

        try:
            # The user may have to start a KMS by hand, and must see then what the stack waits for.
            progress = {"progress": lambda text: say(f"… {text}")} if config.kms else {}
            async with Stack(config, **progress) as stack:
                variables = environment(stack.description(), stack.control_token)
                return await self._command({**stack.app.environment, **variables})
        except asyncio.CancelledError:
            if self._signalled is None:
                raise
            return 128 + self._signalled
        except PartEndedError as error:
            say(f"Error: {error}; {self._words[0]} was stopped")
            return 1
        except (KmsError, GuestError, AttestError, TransportError) as error:
            raise StackError(str(error)) from error

    async def _command(self, variables: Mapping[str, str]) -> int:
        try:
            self._process = await asyncio.create_subprocess_exec(*self._words, env={**os.environ, **variables})
        except FileNotFoundError:
            say(f"Error: {self._words[0]}: command not found")
            return NOT_FOUND
        except OSError as error:
            say(f"Error: {self._words[0]}: {error.strerror}")
            return NOT_EXECUTABLE
        try:
            code = await self._process.wait()
        except asyncio.CancelledError:  # the stack failed
            await self._end(self._process)
            raise
        return code if code >= 0 else 128 - code

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Terminate the command, and kill it if it does not end."""
        for end in (process.terminate, process.kill):
            with contextlib.suppress(ProcessLookupError):
                end()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), PATIENCE)
                return

    def _forward_question(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(waits.SIGNAL)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            if self._process.returncode is None and not (number in _FROM_THE_KEYBOARD and _in_foreground()):
                self._process.send_signal(number)
        elif self._signalled is None and self._task is not None:
            self._signalled = number
            self._task.cancel()


def _in_foreground() -> bool:
    """Return whether this process is in the foreground of a terminal, which sends its signals to the command itself."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
