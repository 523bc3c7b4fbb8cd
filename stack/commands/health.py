"""`dstack-emu health`: is a running stack ready?"""

import argparse
import asyncio
from pathlib import Path

from stack.commands.common import say
from stack.health import check_health

HELP = "ask whether a stack is ready"

DESCRIPTION = "Ask every service of the stack in a state folder; exit 0 when all answer, 1 with the reason otherwise."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="the folder given to `up --state`")


def run(arguments: argparse.Namespace) -> int:
    """Ask, and say what is wrong."""
    problems = asyncio.run(check_health(arguments.state))
    for problem in problems:
        say(problem)
    if not problems:
        print("ready")
    return 1 if problems else 0
