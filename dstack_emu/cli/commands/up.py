"""`dstack-emu up`: run a whole stack."""

import argparse
import asyncio
import contextlib
import gc
import json
import time
from dataclasses import replace

from dstack_emu.cli.commands.common import WARNING, Interrupted, interruptible, say
from dstack_emu.cli.commands.stack_options import add_stack_options, stack_config
from dstack_emu.cli.stack_summary import summary
from dstack_emu.deployment.config import TOKEN_FILE, StackConfig
from dstack_emu.transport.file_limit import raise_file_limit

TALKATIVE = ("kms_emu",)

DESCRIPTION = (
    "Start a PCCS, two auth-simple webhooks, two KMS in trust domains of their own, and an app; measure both KMS, "
    "allow them, bootstrap the source, onboard the destination, and boot the app with keys from the source. The stack "
    "runs until Ctrl-C. You may edit the two policy files meanwhile: they are read again at every request. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_stack_options(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")
    parser.add_argument(
        "--listen",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen on (%(default)s); the control API demands a token unless it is a loopback address",
    )
    parser.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME",
        help="a name in the certificates of the KMS, beside the address; may be repeated (default: the address)",
    )
    parser.add_argument("--free-ports", action="store_true", help="take free ports instead of the runbook's")


def run(arguments: argparse.Namespace) -> int:
    """Run the stack until a signal."""
    config = stack_config(arguments, free_ports=arguments.free_ports, host=arguments.listen.strip("[]"))
    config = replace(config, domains=tuple(arguments.domain))
    raise_file_limit()  # a trust domain has three sockets, and the usual limit is 1024
    with contextlib.suppress(Interrupted):  # a signal is the regular end of a stack
        asyncio.run(interruptible(_run_stack(config, as_json=arguments.json)))
    return 0


async def _run_stack(config: StackConfig, *, as_json: bool) -> None:
    from dstack_emu.stack import Stack  # imported here, because it is slow and --help does not need it

    began = time.monotonic()
    async with Stack(config, progress=lambda text: say(f"… {text}")) as stack:
        # All objects so far live as long as the stack: the garbage collector need not examine them again.
        gc.collect()
        gc.freeze()
        if stack.control_token is not None:
            say(f"The control API demands this token: {stack.control_token} (also in {stack.state / TOKEN_FILE})")
        description = stack.description()
        print(json.dumps(description) if as_json else summary(description, time.monotonic() - began), flush=True)
        await asyncio.get_running_loop().create_future()  # until a signal, or a part that fails
