"""The command line `dstack-emu`."""

import argparse
import importlib
import io
import os
import re
import select
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, NoReturn, get_args

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.release import DEFAULT, RELEASES
from dstack_emu.attest.version import EMULATOR
from dstack_emu.cli import logs, waits
from dstack_emu.cli.commands.common import WARNING, Interrupted, UsageError, say
from dstack_emu.deployment.errors import PartEndedError, StackError
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.errors import ConfigError, ListenError, TransportError

COMMANDS: Final[Mapping[str, str]] = {
    "up": "start the whole stack",
    "exec": "start a stack, run a command that uses it, and stop the stack",
    "runbook": "run the KMS authorization runbook, and keep the evidence",
    "agent": "run one guest agent with real quotes, and a PCCS for them",
    "boot": "boot one app with keys from a KMS, and run its guest agent",
    "pccs": "run a PCCS for every platform of a seed",
    "quote": "sign one quote and write it to a file",
    "inspect": "identify a file, and show its contents",
    "verify": "check evidence, and report each check that fails",
    "why": "explain why a boot is allowed or denied, and what would allow it",
    "verifier": "verify evidence and OS images over HTTP, as dstack-verifier does",
    "image": "build, measure, compare and serve OS images",
    "kms": "run one KMS from a kms.toml",
    "vmm": "run one VMM, which deploys machines with keys from KMS that run elsewhere",
    "auth": "run one auth webhook of a KMS: auth-simple, dstack-auth, auth-eth-bun or auth-mock",
    "chain": "run a chain with the authorization contracts, and its JSON-RPC",
    "gateway": "run one gateway, at which instances register, from a gateway.toml",
    "check-webhook": "check an auth webhook: what would break a KMS, and what it allows that it should not",
    "check-kms": "check a KMS: what it must refuse, and what it must release after that",
    "setup": "set up two KMS that run elsewhere, and allow an app",
    "proto": "write the .proto files of all services",
    "health": "check whether a stack, or one service, is ready",
    "ctl": "observe, change and restore a running stack",
}
"""Each command is a module of `cli.commands`, imported only if it runs, so that no command loads what others need."""

FAILED, USED_WRONGLY = 1, 2
INTERRUPTED, UNREAD = 128 + signal.SIGINT, 128 + signal.SIGPIPE
"""The statuses that a shell reports for a program that these signals end."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status: 0 done, 1 failed, 2 wrong use or configuration, or one of the above."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    try:
        try:
            status = _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:  # while the command does not handle signals itself
        status = INTERRUPTED
    except BrokenPipeError:
        if not _abandon_output():
            raise
        status = UNREAD
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's end prints a traceback otherwise
    sys.exit(status)


def _abandon_output() -> bool:
    """Redirect the output streams that nobody reads any more to nowhere; return whether there was one.

    Otherwise Python prints an error when it exits and writes what is left.
    """
    unread = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _is_unread(stream.fileno())]
    for descriptor in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(unread)


def _is_unread(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _run(words: Sequence[str]) -> int:
    named = next((word for word in words if word in COMMANDS), None)
    arguments = _parse(words, named)
    module = _module(arguments.command)
    level = module.log_level() if hasattr(module, "log_level") else None
    waits.answer_signal()
    logs.set_up(arguments.verbose, arguments.log_format, getattr(module, "TALKATIVE", ()), level)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see cli.entry
    try:
        status: int = module.run(arguments)
        return status
    except Interrupted as ended:
        return ended.status
    except (UsageError, StackError, ConfigError, ListenError) as error:
        say(f"Error: {_one_line(error)}")
        return USED_WRONGLY
    except (PartEndedError, KmsError, GatewayError, GuestError, AttestError, TransportError) as error:
        say(f"Error: {_one_line(error)}")
        return FAILED


def _parse(words: Sequence[str], named: str | None) -> argparse.Namespace:
    """Parse the arguments; report unknown ones with the command's help and with options of similar names."""
    if named is None:
        if not words:
            overview().error("a command expected, such as `dstack-emu up`")
        return overview().parse_args(words)
    top, command = _parser_of(named)
    arguments, unknown = top.parse_known_args(words)
    if unknown:
        similar = get_close_matches(
            unknown[0].partition("=")[0], re.findall(r"--[a-z][a-z0-9-]+", command.format_help()), n=1, cutoff=0.8
        )
        advice = f"; did you mean {similar[0]}?" if similar else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    return arguments


def overview() -> "_Parser":
    """Make the parser for a call without a command, which lists the commands without importing them."""
    top, choice = _top()
    for name, does in COMMANDS.items():
        choice.add_parser(name, help=does)
    return top


def parser(commands: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """Make the parser of these commands."""
    top, choice = _top()
    for name in commands:
        _add_command(choice, name)
    return top


def _parser_of(name: str) -> tuple["_Parser", "_Parser"]:
    """Make the parser of one command; return the top parser and that of the command."""
    top, choice = _top()
    return top, _add_command(choice, name)


def _add_command(choice: "argparse._SubParsersAction[_Parser]", name: str) -> "_Parser":
    module = _module(name)
    command: _Parser = choice.add_parser(name, help=COMMANDS[name], description=module.DESCRIPTION)
    command.add_argument("-v", "--verbose", action="count", default=0, help="log more to stderr (-vv: everything)")
    command.add_argument("--log-format", choices=get_args(logs.Form), default="text", help="format of the log (text)")
    module.add_arguments(command)
    return command


def _top() -> tuple["_Parser", "argparse._SubParsersAction[_Parser]"]:
    others = ", ".join(f"or {each.version} with --release {each.name}" for each in RELEASES.values() if each != DEFAULT)
    top = _Parser(
        prog="dstack-emu",
        description="A local simulated TDX stack for dstack "
        f"{DEFAULT.version}: guest agent, KMS, PCCS and auth webhooks. {WARNING}",
        epilog="First steps: `dstack-emu up` starts everything; `dstack-emu up --fresh` starts a stack as the KMS "
        f"authorization runbook expects it. Everything is of dstack {DEFAULT.version}, {others}. "
        "`dstack-emu COMMAND --help` explains a command.",
    )
    top.add_argument(
        "--version", action="version", version=f"dstack-emu {EMULATOR} (dstack {DEFAULT.version}, {others})"
    )
    return top, top.add_subparsers(dest="command", title="commands", required=True, metavar="COMMAND")


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, as every other error, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        say(f"Error: {message}{_similar_choice(message)} (see {self.prog} --help)")
        sys.exit(USED_WRONGLY)


def _similar_choice(message: str) -> str:
    """Return the question for the most similar choice, if argparse's message is about a choice that does not exist."""
    found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    similar = get_close_matches(found[1], found[2].replace("'", "").split(", "), n=1) if found else []
    return f"; did you mean {similar[0]}?" if similar else ""


def _one_line(error: Exception) -> str:
    """Return an error's text on one line: refusals of a KMS come as indented JSON, one inside another."""
    return re.sub(r"\s*\n\s*", " ", str(error))


def _module(name: str) -> Any:
    return importlib.import_module(f"dstack_emu.cli.commands.{name.replace('-', '_')}")
