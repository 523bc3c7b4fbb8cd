"""`dstack-emu kms`: one KMS of its own."""

import argparse
import asyncio
import os
from pathlib import Path

from kms_emu.admin import admin_token
from kms_emu.config import KmsConfig
from kms_emu.errors import KmsError
from kms_emu.guest_agent import DEFAULT_ADDRESS
from kms_emu.server import KmsServer
from stack.clock import wall_clock
from stack.commands.common import WARNING, say, stop_on_signals

HELP = "run one KMS from a kms.toml"

DESCRIPTION = (
    "Run one KMS from upstream's kms.toml, both phases on one port. The guest agent that quotes for it is named by the "
    f"environment variable DSTACK_AGENT_ADDRESS (unix:/path or http://host:port; default {DEFAULT_ADDRESS}). " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="the kms.toml")


def run(arguments: argparse.Namespace) -> int:
    """Run the KMS until it ends or a signal comes."""
    config = KmsConfig.load(arguments.config)
    agent = os.environ.get("DSTACK_AGENT_ADDRESS") or DEFAULT_ADDRESS
    return asyncio.run(_run_kms(config, agent))


async def _run_kms(config: KmsConfig, agent: str) -> int:
    stop = stop_on_signals()
    token = admin_token(config.core.admin, os.environ) if config.core.admin.enabled else None
    kms = KmsServer(config, agent, entropy=os.urandom, clock=wall_clock, admin_token=token)
    await kms.start()
    say(f"KMS ({kms.phase} phase) at {kms.url}. {WARNING}")
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
