"""`dstack-emu vmm`: run a VMM without a stack."""

import argparse
import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.cli.commands.common import WARNING, UsageError, add_release, listen_address, say, stop_on_signals
from dstack_emu.cli.terminal import printable
from dstack_emu.deployment.standalone_vmm import UNIX, StandaloneVmm, VmmSettings
from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.ports import PORTS
from dstack_emu.transport.trust_root import read_root
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.discovery import discovery_folder

PCCS = f"http://127.0.0.1:{PORTS['pccs']}"

DESCRIPTION = (
    "Run a VMM with upstream's vmm.toml: it deploys machines by the requests of vmm-cli.py. Each is a trust domain of "
    "this process, which gets its keys from the KMS that the file or the request names. --seed must be the seed of "
    "the KMS's stack: otherwise the KMS's PCCS does not know the platform of the machines. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="the vmm.toml (default: upstream's defaults)")
    parser.add_argument(
        "--listen",
        type=_address,
        metavar="ADDRESS",
        help="HOST:PORT (port 0: a free one) or unix:PATH, instead of the address in the file",
    )
    parser.add_argument(
        "--seed",
        default=DEFAULT_SEED,
        metavar="TEXT",
        help="the text from which the emulated Intel of the machines' platform is derived (%(default)s)",
    )
    parser.add_argument(
        "--root", type=Path, metavar="FILE", help="verify KMS under the root in this file (default: that of the seed)"
    )
    parser.add_argument(
        "--pccs", metavar="URL", help=f"where to fetch the collateral of a KMS (cvm.pccs_url, or {PCCS})"
    )
    add_release(parser, "the dstack release of the VMM and of its guests")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Run the VMM until a signal."""
    config = VmmConfig() if arguments.config is None else VmmConfig.load(arguments.config)
    if arguments.listen is not None:
        config = config.model_copy(update={"address": arguments.listen, "port": None})
    settings = VmmSettings(
        config=config,
        release=arguments.release,
        seed=arguments.seed,
        pccs_url=arguments.pccs or config.cvm.pccs_url or PCCS,
        discovery=discovery_folder(os.environ),
        config_file=arguments.config,
    )
    if arguments.root is not None:
        settings = replace(settings, anchor=_root(arguments.root))
    return asyncio.run(_run(settings, as_json=arguments.json))


async def _run(settings: VmmSettings, *, as_json: bool) -> int:
    stop = stop_on_signals()
    async with StandaloneVmm(settings) as vmm:
        say(f"VMM at {vmm.url}. {WARNING}")
        if as_json:
            description = {
                "url": vmm.url,
                "run_path": str(settings.config.run_path.absolute()),
                "image_path": str(settings.config.image.path.absolute()),
                "discovery_file": None if vmm.discovery_file is None else str(vmm.discovery_file),
            }
            print(json.dumps(description), flush=True)
        await stop.wait()
    return 0


def _address(text: str) -> str:
    if text.startswith(UNIX) and len(text) > len(UNIX):
        return text
    host, port = listen_address(text)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _root(path: Path) -> TrustAnchor:
    try:
        return TrustAnchor.of(read_root(path))
    except ConfigError as error:
        raise UsageError(printable(str(error))) from error
