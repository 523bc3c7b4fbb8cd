"""The command line `dstack-emu`."""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from attest.errors import AttestError
from attest.version import EMULATOR, UPSTREAM
from kms_emu.admin import admin_token
from kms_emu.config import KmsConfig
from kms_emu.errors import ConfigError, KmsError
from kms_emu.guest_agent import DEFAULT_ADDRESS
from kms_emu.server import KmsServer
from simulator.seed import DEFAULT_SEED
from stack.config import PORTS, StackConfig, StackError
from stack.health import check_health
from stack.report import show
from stack.stack import Stack, wall_clock
from transport.listen import ListenError

WARNING = "An emulator: it protects nothing. Never give it a secret, never believe its evidence in production."

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status: 0 done, 1 failed, 2 used or set up wrongly."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)],
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    try:
        sys.exit(arguments.run(arguments))
    except (StackError, ConfigError, ListenError) as error:
        sys.exit(_fail(str(error), USAGE_ERROR))
    except (KmsError, AttestError) as error:
        sys.exit(_fail(str(error), 1))


def _fail(text: str, status: int) -> int:
    print(f"Error: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dstack-emu",
        description="A local simulated TDX stack for dstack "
        f"{UPSTREAM}: guest agent, KMS, PCCS and auth webhooks. {WARNING}",
        epilog="First steps: `dstack-emu up` brings everything up; `dstack-emu up --fresh` stops where the KMS "
        "authorization runbook begins. Each command explains itself with --help.",
    )
    parser.add_argument("--version", action="version", version=f"dstack-emu {EMULATOR} (dstack {UPSTREAM})")
    verbosity = argparse.ArgumentParser(add_help=False)
    verbosity.add_argument("-v", "--verbose", action="count", default=0, help="log more to stderr (-vv: everything)")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_up(commands.add_parser("up", parents=[verbosity], help="bring the whole stack up", description=_UP))
    _add_kms(commands.add_parser("kms", parents=[verbosity], help="run one KMS from a kms.toml", description=_KMS))
    _add_health(
        commands.add_parser("health", parents=[verbosity], help="ask whether a stack is ready", description=_HEALTH)
    )
    return parser


_UP = (
    "Bring up a PCCS, two auth-simple webhooks, two KMS in trust domains of their own, and an app; measure both KMS, "
    "allow them, bootstrap the source, onboard the destination, and boot the app with keys from the source. It runs "
    "until Ctrl-C. The two policy files may be edited meanwhile: they are read anew for every question. " + WARNING
)


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fresh", action="store_true", help="stop at the runbook's start: no keys, policies that deny")
    parser.add_argument("--seed", default=DEFAULT_SEED, metavar="TEXT", help="the same text gives the same bytes")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")
    parser.add_argument("--listen", default="127.0.0.1", metavar="HOST", help="address to listen on (%(default)s)")
    parser.add_argument("--free-ports", action="store_true", help="take free ports instead of the runbook's")
    parser.add_argument(
        "--port",
        action="append",
        default=[],
        type=_port,
        metavar="NAME=PORT",
        help="another port for one service (0: a free one); names and defaults: "
        + ", ".join(f"{name}={port}" for name, port in PORTS.items()),
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="keep keys, sockets and policies here, and resume")
    parser.add_argument("--policies", type=Path, metavar="DIR", help="keep auth-src.json and auth-dst.json here")
    parser.set_defaults(run=_up)


def _port(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in PORTS or not number.isdigit() or int(number) > 65535:
        raise argparse.ArgumentTypeError(
            f"NAME=PORT expected, with a name of {', '.join(PORTS)} and a port of 0 to 65535, got {text!r}"
        )
    return name, int(number)


def _up(arguments: argparse.Namespace) -> int:
    ports: Mapping[str, int] = dict.fromkeys(PORTS, 0) if arguments.free_ports else PORTS
    config = StackConfig(
        seed=arguments.seed,
        fresh=arguments.fresh,
        host=arguments.listen,
        ports={**ports, **dict(arguments.port)},
        state=arguments.state,
        policies=arguments.policies,
    )
    return asyncio.run(_run_stack(config, as_json=arguments.json))


async def _run_stack(config: StackConfig, *, as_json: bool) -> int:
    stop = _stop_on_signals()
    began = time.monotonic()
    starting = asyncio.create_task(_entered(config))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    stack = starting.result()
    try:
        description = stack.description()
        print(json.dumps(description) if as_json else show(description, time.monotonic() - began), flush=True)
        return await _until_stopped(stack, stopping)
    finally:
        await stack.__aexit__(None, None, None)


async def _entered(config: StackConfig) -> Stack:
    return await Stack(config, progress=lambda text: print(f"… {text}", file=sys.stderr, flush=True)).__aenter__()


async def _until_stopped(stack: Stack, stopping: "asyncio.Task[bool]") -> int:
    """Wait for a signal, or for a KMS that ends by itself (`/finish` without keys is upstream's way to fail)."""
    ends = {asyncio.create_task(kms.wait()): side for side, kms in stack.kms.items()}
    done, _ = await asyncio.wait((stopping, *ends), return_when=asyncio.FIRST_COMPLETED)
    for task in ends:
        if task in done and (error := task.exception()):
            return _fail(f"kms-{ends[task]} ended: {error}", 1)
        task.cancel()
    return 0


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


_KMS = (
    "Run one KMS from upstream's kms.toml, both phases on one port. The guest agent that quotes for it is named by the "
    f"environment variable DSTACK_AGENT_ADDRESS (unix:/path or http://host:port; default {DEFAULT_ADDRESS}). " + WARNING
)


def _add_kms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="the kms.toml")
    parser.set_defaults(run=_kms)


def _kms(arguments: argparse.Namespace) -> int:
    config = KmsConfig.load(arguments.config)
    agent = os.environ.get("DSTACK_AGENT_ADDRESS") or DEFAULT_ADDRESS
    return asyncio.run(_run_kms(config, agent))


async def _run_kms(config: KmsConfig, agent: str) -> int:
    stop = _stop_on_signals()
    token = admin_token(config.core.admin, os.environ) if config.core.admin.enabled else None
    kms = KmsServer(config, agent, entropy=os.urandom, clock=wall_clock, admin_token=token)
    await kms.start()
    print(f"KMS ({kms.phase} phase) at {kms.url}. {WARNING}", file=sys.stderr, flush=True)
    waiting, stopping = asyncio.create_task(kms.wait()), asyncio.create_task(stop.wait())
    await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if waiting.done():
        waiting.result()
    was_fresh = kms.phase == "onboard"
    await kms.stop()
    waiting.cancel()
    if was_fresh:
        raise KmsError("Failed to onboard")  # upstream's answer to a signal before there are keys
    return 0


_HEALTH = "Ask every service of the stack in a state folder; exit 0 when all answer, 1 with the reason otherwise."


def _add_health(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="the folder given to `up --state`")
    parser.set_defaults(run=_health)


def _health(arguments: argparse.Namespace) -> int:
    problems = asyncio.run(check_health(arguments.state))
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print("ready")
    return 1 if problems else 0
