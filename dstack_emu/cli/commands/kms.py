"""`dstack-emu kms`: run one KMS."""

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

from dstack_emu.cli import logs
from dstack_emu.cli.commands.common import (
    WARNING,
    add_release,
    listen_address,
    run_server,
    say,
    stop_on_signals,
)
from dstack_emu.cli.commands.production import add_trust_production, require_emulated_service
from dstack_emu.deployment.clock import ISSUED_AT, wall_clock
from dstack_emu.kms_emu.agent_client import DEFAULT_ADDRESS
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT
from dstack_emu.kms_emu.config import VARIABLES, KmsConfig
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.server import KmsServer
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.listen import bind_tcp
from dstack_emu.transport.trust_root import trust_anchor

DESCRIPTION = (
    "Run one KMS with upstream's kms.toml; both phases use the same port. The environment variable "
    "DSTACK_AGENT_ADDRESS is the guest agent that quotes for it (unix:/path or http://host:port; default "
    f"{DEFAULT_ADDRESS}; `dstack-emu agent` runs one). A variable can set any key of the file: "
    f"{VARIABLES}CORE__SITE_NAME is core.site_name. " + WARNING
)

TALKATIVE = ("kms_emu",)


def log_level() -> str | None:
    """Return the log level that upstream's variable sets."""
    return logs.level_of(os.environ.get("RUST_LOG", ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="the kms.toml")
    parser.add_argument(
        "--listen",
        type=listen_address,
        metavar="HOST:PORT",
        help="address of both phases, instead of that in the file (port 0: a free one)",
    )
    parser.add_argument(
        "--seed",
        metavar="TEXT",
        help="the text from which keys and certificates are derived (default: they are random)",
    )
    add_release(parser, "the dstack release of the KMS")
    parser.add_argument(
        "--auth-api-cache",
        action="store_true",
        help="use a successful self check and GetMeta's info for a second, as a KMS of 0.6 does "
        "(emulator.auth_api_cache)",
    )
    add_trust_production(parser, "real machines then get keys that protect nothing")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Run the KMS until it ends or a signal comes."""
    config = KmsConfig.load(arguments.config, os.environ)
    if arguments.auth_api_cache:
        config = config.with_auth_api_cache()
    agent = os.environ.get("DSTACK_AGENT_ADDRESS") or DEFAULT_ADDRESS
    return run_server(_run_kms(config, agent, arguments), has_grpc=config.emulator.grpc.enabled)


def _kms(config: KmsConfig, agent: str, arguments: argparse.Namespace) -> KmsServer:
    options: dict[str, Any] = {
        "entropy": os.urandom,
        "clock": wall_clock,
        "environment": os.environ,
        "release": arguments.release,
    }
    if arguments.seed is not None:
        options |= {"entropy": Seed.of(arguments.seed).stream("kms"), "issue_clock": lambda: ISSUED_AT}
    if arguments.listen is not None:
        options["sock"] = bind_tcp(*arguments.listen, setting="--listen HOST:PORT")
        config = config.listening_at(*arguments.listen)
    return KmsServer(config, agent, **options)


async def _run_kms(config: KmsConfig, agent: str, arguments: argparse.Namespace) -> int:
    stop = stop_on_signals()
    kms = _kms(config, agent, arguments)
    if not arguments.trust_production:
        require_emulated_service(
            trust_anchor(config.core.attestation, "core."),
            config.core.pccs,
            arguments.config,
            "This KMS is an emulator, and would give real machines keys that protect nothing.",
        )
    await kms.start()
    for key, target in kms.grpc_targets.items():
        say(f"gRPC at {target} (emulator.grpc.{key})")
    say(f"KMS ({kms.phase} phase) at {kms.url}. {WARNING}")
    if arguments.json:
        print(json.dumps(_description(kms)), flush=True)
    waiting, stopping = asyncio.create_task(kms.wait()), asyncio.create_task(stop.wait())
    await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if waiting.done():
        waiting.result()
    was_fresh = kms.phase == "onboard"
    await kms.stop()
    waiting.cancel()
    if was_fresh:
        raise KmsError("Failed to onboard")  # what upstream's KMS prints if a signal comes before it has keys
    return 0


def _description(kms: KmsServer) -> dict[str, Any]:
    """Return what `--json` prints for programs."""
    cert_dir = kms.config.core.cert_dir.absolute()
    return {
        "url": kms.url,
        "phase": kms.phase,
        "address": kms.runtime_address,
        "admin_url": kms.admin_url,
        "grpc": kms.grpc_targets,
        "cert_dir": str(cert_dir),
        "kms_ca": str(cert_dir / ROOT_CA_CERT),
    }
