"""The command line `dstack-emu`."""

import argparse
import importlib
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from attest.errors import AttestError
from attest.version import EMULATOR, UPSTREAM
from kms_emu.errors import ConfigError, KmsError
from simulator.errors import GuestError
from stack.commands.common import WARNING, UsageError, say
from stack.config import StackError
from transport.client import TransportError
from transport.listen import ListenError

COMMANDS = ("up", "agent", "pccs", "quote", "inspect", "verify", "kms", "health", "ctl")
"""Each is a module of `stack.commands`, imported when it is asked for: a command starts without what others need."""

FAILED, USED_WRONGLY = 1, 2


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status: 0 done, 1 failed, 2 used or set up wrongly."""
    words = sys.argv[1:] if argv is None else list(argv)
    named = next((word for word in words if word in COMMANDS), None)
    arguments = parser(COMMANDS if named is None else (named,)).parse_args(words)
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)],
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    try:
        status: int = _module(arguments.command).run(arguments)
    except (UsageError, StackError, ConfigError, ListenError) as error:
        say(f"Error: {_one_line(error)}")
        status = USED_WRONGLY
    except (KmsError, GuestError, AttestError, TransportError) as error:
        say(f"Error: {_one_line(error)}")
        status = FAILED
    sys.exit(status)


def parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Make the parser of these commands."""
    top = argparse.ArgumentParser(
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
        module.add_arguments(command)
    return top


def _one_line(error: Exception) -> str:
    """An error's text on one line: refusals of a KMS arrive as indented JSON inside one another."""
    return re.sub(r"\s*\n\s*", " ", str(error))


def _module(name: str) -> Any:
    return importlib.import_module(f"stack.commands.{name}")
