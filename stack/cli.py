"""The command line `dstack-emu`."""

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from attest.errors import AttestError
from attest.version import EMULATOR, UPSTREAM
from kms_emu.errors import ConfigError, KmsError
from simulator.errors import GuestError
from stack import logs
from stack.commands.common import WARNING, UsageError, say
from stack.config import PartEndedError, StackError
from transport.errors import ListenError, TransportError

COMMANDS = (
    "up",
    "exec",
    "runbook",
    "agent",
    "boot",
    "pccs",
    "quote",
    "inspect",
    "verify",
    "verifier",
    "image",
    "kms",
    "auth",
    "check-webhook",
    "setup",
    "proto",
    "health",
    "ctl",
)
"""Each is a module of `stack.commands`, imported when it is asked for: a command starts without what others need."""

FAILED, USED_WRONGLY, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status: 0 done, 1 failed, 2 used or set up wrongly."""
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:  # before the command was ready to take it
        status = INTERRUPTED
    sys.exit(status)


def _run(words: Sequence[str]) -> int:
    named = next((word for word in words if word in COMMANDS), None)
    arguments = parser(COMMANDS if named is None else (named,)).parse_args(words)
    module = _module(arguments.command)
    level = module.log_level() if hasattr(module, "log_level") else None
    logs.set_up(arguments.verbose, arguments.log_format, getattr(module, "TALKATIVE", ()), level)
    try:
        status: int = module.run(arguments)
        return status
    except (UsageError, StackError, ConfigError, ListenError) as error:
        say(f"Error: {_one_line(error)}")
        return USED_WRONGLY
    except (PartEndedError, KmsError, GuestError, AttestError, TransportError) as error:
        say(f"Error: {_one_line(error)}")
        return FAILED


def parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Make the parser of these commands."""
    top = _Parser(
        prog="dstack-emu",
        description="A local simulated TDX stack for dstack "
        f"{UPSTREAM}: guest agent, KMS, PCCS and auth webhooks. {WARNING}",
        epilog="First steps: `dstack-emu up` brings everything up; `dstack-emu up --fresh` stops where the KMS "
        "authorization runbook begins. Each command explains itself with --help.",
    )
    top.add_argument("--version", action="version", version=f"dstack-emu {EMULATOR} (dstack {UPSTREAM})")
    choice = top.add_subparsers(dest="command", title="commands", required=True, metavar="COMMAND")
    for name in commands:
        module = _module(name)
        command = choice.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        command.add_argument("-v", "--verbose", action="count", default=0, help="log more to stderr (-vv: everything)")
        command.add_argument(
            "--log-format", choices=get_args(logs.Form), default="text", help="how a line of the log looks (text)"
        )
        module.add_arguments(command)
    return top


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as every other error is said, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        say(f"Error: {message} (see {self.prog} --help)")
        sys.exit(USED_WRONGLY)


def _one_line(error: Exception) -> str:
    """An error's text on one line: refusals of a KMS arrive as indented JSON inside one another."""
    return re.sub(r"\s*\n\s*", " ", str(error))


def _module(name: str) -> Any:
    return importlib.import_module(f"stack.commands.{name.replace('-', '_')}")
