"""`dstack-emu pccs`: serve collateral for every platform of a seed."""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from dstack_emu.attest.errors import FormatError
from dstack_emu.cli.commands.common import WARNING, UsageError, listen_address, stop_on_signals
from dstack_emu.cli.commands.guest_options import add_seed, add_vendor_options, platform_state, vendor_state
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.transport.ports import PORTS

DESCRIPTION = (
    "Serve collateral for the quotes of every platform of a seed, with the paths and formats of Intel's PCS v4. The "
    "options below set the state of the platforms named with --platform; all others are up to date. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--listen",
        type=listen_address,
        default=("127.0.0.1", PORTS["pccs"]),
        metavar="HOST:PORT",
        help=f"address (127.0.0.1:{PORTS['pccs']})",
    )
    parser.add_argument("--root-ca", type=Path, metavar="FILE", help="write the root certificate (PEM) to this file")
    parser.add_argument(
        "--platform",
        action="append",
        default=[],
        metavar="NAME",
        help="a platform to which the options below apply; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready, no more on stdout")
    add_seed(parser)
    add_vendor_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    intel = Intel(Seed.of(arguments.seed))
    try:
        intel.state = vendor_state(arguments)
        for name in arguments.platform:
            intel.platform(name).state = platform_state(arguments)
    except FormatError as error:
        raise UsageError(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="dstack-emu-") as folder:
        root_ca = arguments.root_ca or Path(folder, "root-ca.pem")
        try:
            root_ca.write_text(intel.root_pem)
        except OSError as error:
            raise UsageError(f"--root-ca: cannot write {root_ca}: {error.strerror}") from error
        return asyncio.run(_serve(intel, root_ca.absolute(), arguments))


async def _serve(intel: Intel, root_ca: Path, arguments: argparse.Namespace) -> int:
    stop = stop_on_signals()
    host, port = arguments.listen
    server = await serve(pccs_app(intel), bind_tcp(host, port, setting="--listen HOST:PORT"))
    try:
        description = {"url": server.url, "root_ca": str(root_ca)}
        if arguments.json:
            print(json.dumps(description), flush=True)
        else:
            print(f"PCCS at {server.url}; root certificate: {root_ca}. Ctrl-C stops it.", flush=True)
        await stop.wait()
    finally:
        await server.close()
    return 0
