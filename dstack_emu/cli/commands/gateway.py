"""`dstack-emu gateway`: run one gateway."""

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

from dstack_emu.cli import logs
from dstack_emu.cli.commands.common import WARNING, add_release, run_server, say, stop_on_signals
from dstack_emu.cli.commands.production import add_trust_production, require_emulated_service
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.gateway.agent import DEFAULT_ADDRESS
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.server import RPC, GatewayDependencies, GatewayServer
from dstack_emu.transport.trust_root import trust_anchor

DESCRIPTION = (
    "Run one gateway with upstream's gateway.toml, without WireGuard: instances register, and the ingress reaches none "
    "of them but localhost, where the file allows it. The environment variable DSTACK_AGENT_ADDRESS is its guest agent "
    f"(unix:/path or http://host:port; default {DEFAULT_ADDRESS}; `dstack-emu agent` runs one). " + WARNING
)

TALKATIVE = ("gateway",)


def log_level() -> str | None:
    """Return the log level that upstream's variable sets."""
    return logs.level_of(os.environ.get("RUST_LOG", ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="the gateway.toml")
    add_release(parser, "the dstack release of the gateway")
    add_trust_production(parser, "real machines are then registered as instances")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Run the gateway until an operator ends it or a signal comes."""
    config = GatewayConfig.load(arguments.config)
    core = config.core
    if not (arguments.trust_production or core.debug.insecure_skip_attestation):
        require_emulated_service(
            trust_anchor(core.attestation, "core."),
            core.pccs,
            arguments.config,
            "This gateway is an emulator, and would register real machines.",
        )
    given = GatewayDependencies(
        clock=wall_clock,
        entropy=os.urandom,
        agent_address=os.environ.get("DSTACK_AGENT_ADDRESS") or DEFAULT_ADDRESS,
        environment=os.environ,
        has_ingress=True,
    )
    gateway = GatewayServer(config, given, release=arguments.release)
    return run_server(_run(gateway, as_json=arguments.json), has_grpc=False)


async def _run(gateway: GatewayServer, *, as_json: bool) -> int:
    stop = stop_on_signals()
    await gateway.start()
    try:
        others = [f", {name} at {url}" for name, url in gateway.urls.items() if name != RPC]
        say(f"gateway at {gateway.urls[RPC]}{''.join(others)}. {WARNING}")
        if as_json:
            print(json.dumps(_description(gateway)), flush=True)
        ends = [asyncio.create_task(each) for each in (gateway.wait(), stop.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
    finally:
        await gateway.stop()
    return 0


def _description(gateway: GatewayServer) -> dict[str, Any]:
    """Return what `--json` prints for programs."""
    return {"urls": gateway.urls, "data_dir": str(gateway.config.core.sync.data_dir.absolute())}
