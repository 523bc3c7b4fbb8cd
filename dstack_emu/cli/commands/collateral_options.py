"""The options of commands that verify evidence: where collateral comes from, and the time that counts."""

import argparse
import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest.collateral import CollateralKey, assemble
from dstack_emu.attest.errors import UnverifiableError
from dstack_emu.attest.pcs import Document
from dstack_emu.cli.commands.common import UsageError
from dstack_emu.cli.commands.production import require_emulated
from dstack_emu.cli.commands.root_options import REAL_EVIDENCE
from dstack_emu.cli.terminal import printable
from dstack_emu.inspection.checks import Collect
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.transport.pccs_client import PccsClient
from dstack_emu.transport.ports import PORTS

PCCS: Final = f"http://127.0.0.1:{PORTS['pccs']}"
MAX_TIME: Final = 253_402_300_799
"""The last second of the year 9999."""


def add_collateral(parser: argparse.ArgumentParser) -> None:
    """Add the options for the source of collateral, of which one may be given."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pccs", default=PCCS, metavar="URL", help="where to fetch collateral (%(default)s)")
    source.add_argument(
        "--collateral",
        type=Path,
        metavar="FILE",
        help="read collateral from this file (QuoteCollateralV3 JSON) instead",
    )
    source.add_argument(
        "--offline",
        action="store_true",
        help="make the collateral of the seed's emulated vendor here instead: every platform is UpToDate in it",
    )


def add_time(parser: argparse.ArgumentParser) -> None:
    """Add --time."""
    parser.add_argument(
        "--time", type=_moment, metavar="WHEN", help="verify for this time (now): Unix seconds or ISO 8601"
    )


def chosen_time(arguments: argparse.Namespace) -> int:
    """Return the time that counts, in Unix seconds."""
    return int(time.time()) if arguments.time is None else arguments.time


def collector(arguments: argparse.Namespace) -> Collect:
    """Return what gets the collateral of a quote; raise `UsageError` if a file is no collateral."""
    if arguments.offline:
        if arguments.intel or arguments.root is not None:
            raise UsageError(
                "--offline makes the collateral of an emulated vendor: --seed expected, not --root or --intel"
            )
        intel = Intel(Seed.of(arguments.seed or DEFAULT_SEED))
        return lambda quote: _made(intel, quote)
    if arguments.collateral is None:
        url: str = arguments.pccs
        if not arguments.intel:
            require_emulated(None, url, REAL_EVIDENCE)
        return lambda quote: asyncio.run(_fetch(url, quote))
    collateral = _read(arguments.collateral)
    return lambda quote: collateral


def source_of_collateral(arguments: argparse.Namespace) -> str:
    """Return where the collateral comes from, for people."""
    if arguments.offline:
        return "made here, for a platform that is UpToDate"
    return str(arguments.collateral or arguments.pccs)


def _made(intel: Intel, quote: bytes) -> QuoteCollateralV3:
    fmspc = bytes.fromhex(CollateralKey.of_quote(quote).fmspc)
    if not intel.knows_fmspc(fmspc):
        raise UnverifiableError(f"no platform of this seed has the FMSPC {fmspc.hex()}: name its seed by --seed")
    crl = Document(intel.root_ca_crl.hex().encode())
    return assemble(intel.pck_crl, intel.tcb_info(fmspc), intel.qe_identity, crl)


async def _fetch(url: str, quote: bytes) -> QuoteCollateralV3:
    pccs = PccsClient(url)
    try:
        return await pccs.collateral(quote)
    finally:
        await pccs.close()


def _read(path: Path) -> QuoteCollateralV3:
    try:
        return QuoteCollateralV3.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(printable(f"{path}: {error}")) from error


def _moment(text: str) -> int:
    try:
        seconds = int(text) if text.isascii() and text.isdigit() else _from_iso(text)
    except (ValueError, OverflowError):
        seconds = -1
    if not 0 <= seconds <= MAX_TIME:
        raise argparse.ArgumentTypeError(f"Unix seconds or ISO 8601 from 1970 to 9999 expected, got {text!r:.80}")
    return seconds


def _from_iso(text: str) -> int:
    """Read a date, in UTC if it names no time zone."""
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
