"""`dstack-emu health`: check that a running stack, or one service of it, is ready."""

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Final

from dstack_emu.cli.commands.common import UsageError, say, seconds_to_wait
from dstack_emu.deployment.config import STATE_VARIABLE
from dstack_emu.deployment.healthcheck import check
from dstack_emu.transport.open_calls import Asked
from dstack_emu.transport.urls import without_credentials

DESCRIPTION = (
    "Check every service of the stack in a state folder, or the services that are named. Exit 0 if all answer; "
    "otherwise print the reasons, and exit 1."
)
INTERVAL: Final = 0.25
"""The seconds between two checks of `--wait`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help=f"the folder given to `up --state` (${STATE_VARIABLE}, if no option is given)",
    )
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="URL",
        help="http(s)://host:port/path that must answer with status 200",
    )
    parser.add_argument(
        "--kms", action="append", default=[], metavar="HOST:PORT", help="a KMS that must answer, in either phase"
    )
    parser.add_argument(
        "--wait",
        type=seconds_to_wait,
        default=0.0,
        metavar="SECONDS",
        help="repeat the check for so long until all answer (default: check once)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the services and print what is wrong."""
    if not arguments.state and not arguments.url and not arguments.kms:
        arguments.state = _state_of_environment()
    give_up = time.monotonic() + arguments.wait
    while (problems := _problems(arguments)) and time.monotonic() < give_up:
        time.sleep(INTERVAL)
    for problem in problems:
        say(without_credentials(problem))
    if not problems:
        print("ready")
    return 1 if problems else 0


def _problems(arguments: argparse.Namespace) -> list[str]:
    targets = [*arguments.url, *(f"kms:{address}" for address in arguments.kms)]
    try:
        problems = [problem for target in targets if (problem := _problem(target))]
    except ValueError as error:
        raise UsageError(without_credentials(str(error))) from error
    if arguments.state is not None:
        from dstack_emu.deployment.health import (
            check_health,  # slow to import, and not needed for one URL
        )

        problems += asyncio.run(check_health(arguments.state))
    return problems


def _problem(target: str) -> str:
    with Asked("for the health", target.removeprefix("kms:")):
        return check(target)


def _state_of_environment() -> Path:
    if state := os.environ.get(STATE_VARIABLE):
        return Path(state)
    raise UsageError(f"nothing to check: give --state DIR, --url URL or --kms HOST:PORT, or set {STATE_VARIABLE}")
