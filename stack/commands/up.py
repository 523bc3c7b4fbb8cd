"""`dstack-emu up`: the whole stack."""

import argparse
import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path

from simulator.seed import DEFAULT_SEED
from stack.commands.common import WARNING, say, stop_on_signals
from stack.config import PORTS, StackConfig
from stack.report import show
from stack.stack import Stack

HELP = "bring the whole stack up"

DESCRIPTION = (
    "Bring up a PCCS, two auth-simple webhooks, two KMS in trust domains of their own, and an app; measure both KMS, "
    "allow them, bootstrap the source, onboard the destination, and boot the app with keys from the source. It runs "
    "until Ctrl-C. The two policy files may be edited meanwhile: they are read anew for every question. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
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
    parser.add_argument("--journal", type=Path, metavar="FILE", help="append a record of each call, as JSON lines")
    parser.add_argument("--policies", type=Path, metavar="DIR", help="keep auth-src.json and auth-dst.json here")


def _port(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in PORTS or not number.isdigit() or int(number) > 65535:
        raise argparse.ArgumentTypeError(
            f"NAME=PORT expected, with a name of {', '.join(PORTS)} and a port of 0 to 65535, got {text!r}"
        )
    return name, int(number)


def run(arguments: argparse.Namespace) -> int:
    """Run the stack until a signal."""
    ports: Mapping[str, int] = dict.fromkeys(PORTS, 0) if arguments.free_ports else PORTS
    config = StackConfig(
        seed=arguments.seed,
        fresh=arguments.fresh,
        host=arguments.listen,
        ports={**ports, **dict(arguments.port)},
        state=arguments.state,
        policies=arguments.policies,
        journal=arguments.journal,
    )
    return asyncio.run(_run_stack(config, as_json=arguments.json))


async def _run_stack(config: StackConfig, *, as_json: bool) -> int:
    stop = stop_on_signals()
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
    return await Stack(config, progress=lambda text: say(f"… {text}")).__aenter__()


async def _until_stopped(stack: Stack, stopping: "asyncio.Task[bool]") -> int:
    """Wait for a signal, or for a KMS that ends by itself (`/finish` without keys is upstream's way to fail)."""
    ends = {asyncio.create_task(kms.wait()): side for side, kms in stack.kms.items()}
    done, _ = await asyncio.wait((stopping, *ends), return_when=asyncio.FIRST_COMPLETED)
    for task in ends:
        if task in done and (error := task.exception()):
            say(f"Error: kms-{ends[task]} ended: {error}")
            return 1
        task.cancel()
    return 0
