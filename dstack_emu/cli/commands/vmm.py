"""`dstack-emu vmm`: run a VMM without a stack, check its configuration, or prepare one machine.

The sub-commands are those of upstream's program, with its exit statuses: 1 for a configuration or a machine that is
refused, 2 for wrong arguments.
"""

import argparse
import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.cli.commands.common import WARNING, UsageError, add_release, listen_address, say, stop_on_signals
from dstack_emu.cli.commands.production import require_emulated
from dstack_emu.cli.commands.workload_options import add_workload
from dstack_emu.cli.terminal import printable
from dstack_emu.deployment.standalone_vmm import UNIX, StandaloneVmm, VmmSettings, prepare_machine
from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.ports import PORTS
from dstack_emu.transport.trust_root import read_root
from dstack_emu.vmm.checks import compose_hash
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.config_check import faults
from dstack_emu.vmm.discovery import discovery_folder
from dstack_emu.vmm.errors import VmmError

REFUSED: Final = 1
PCCS: Final = f"http://127.0.0.1:{PORTS['pccs']}"

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
    add_workload(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")
    _add_actions(parser)


def _add_actions(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_subparsers(dest="action", metavar="ACTION")
    choice.add_parser("serve", help="run the VMM, as without an action")
    choice.add_parser("check-config", help="check the vmm.toml, and start nothing")
    once = choice.add_parser("run", help="prepare one machine from a file, without a server")
    once.add_argument("file", type=Path, metavar="FILE", help="the request of CreateVm, in JSON")
    once.add_argument(
        "--workdir", type=Path, metavar="DIR", help="the machine's folder (default: a new one in the working directory)"
    )
    once.add_argument("--dry-run", action="store_true", help="start nothing; needed, because there is no QEMU to run")


def run(arguments: argparse.Namespace) -> int:
    """Run the VMM until a signal, or another action."""
    if arguments.action == "check-config":
        return _check_config(arguments.config)
    if arguments.action == "run":
        return _run_once(arguments)
    config = _config(arguments.config)
    if arguments.listen is not None:
        config = config.model_copy(update={"address": arguments.listen, "port": None})
    return asyncio.run(_run(_settings(arguments, config), as_json=arguments.json))


def _check_config(file: Path | None) -> int:
    try:
        found = faults(_config(file))
    except ConfigError as error:
        found = [str(error)]
    for fault in found:
        say(f"Error: {printable(fault)}")
    if found:
        return REFUSED
    print("configuration is valid")
    return 0


def _run_once(arguments: argparse.Namespace) -> int:
    if not arguments.dry_run:
        raise UsageError("run: only with --dry-run, because there is no QEMU; to start machines, run the VMM")
    try:
        settings = _settings(arguments, _config(arguments.config))
        prepared = asyncio.run(prepare_machine(settings, arguments.file, arguments.workdir))
    except (ConfigError, VmmError) as error:
        say(f"Error: {printable(str(error))}")
        return REFUSED
    print(f"# CID: {prepared.cid}")
    print(f"# Configuration: {arguments.file}")
    print(f"# Working directory: {prepared.folder}")
    print(f"# Compose hash: {compose_hash(prepared.compose_file)}")
    print(f"# App ID: {prepared.manifest.app_id}")
    print(f"# VM ID: {prepared.manifest.id}")
    print("# The machine, a trust domain, in place of a QEMU command:")
    print(prepared.description())
    print("# Dry run: nothing was started")
    return 0


def _config(file: Path | None) -> VmmConfig:
    return VmmConfig() if file is None else VmmConfig.load(file)


def _settings(arguments: argparse.Namespace, config: VmmConfig) -> VmmSettings:
    settings = VmmSettings(
        config=config,
        release=arguments.release,
        seed=arguments.seed,
        pccs_url=arguments.pccs or config.cvm.pccs_url or PCCS,
        discovery=discovery_folder(os.environ),
        config_file=arguments.config,
        workload=arguments.vmm_workload,
        script_image=arguments.vmm_script_image or "",
    )
    if arguments.root is not None:
        settings = replace(settings, anchor=_root(arguments.root))
    require_emulated(
        settings.anchor, settings.pccs_url, "a machine here is of the emulated Intel: see --root and --pccs"
    )
    return settings


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
