"""`dstack-emu verify`: check evidence, and report each check that fails."""

import argparse
import asyncio
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from dcap_qvl import QuoteCollateralV3

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.report_data import pad_report_data
from dstack_emu.cli.commands.common import UsageError, hex_bytes
from dstack_emu.cli.commands.inspect import WIDTH, add_input, headline, read_input
from dstack_emu.cli.commands.root_options import add_root, chosen_root, default_root
from dstack_emu.cli.terminal import BOLD, GREEN, RED, YELLOW, paint, printable, wants_colour
from dstack_emu.inspection.checks import Check, Collect, Expectations, all_hold, verify_evidence
from dstack_emu.transport.pccs_client import PccsClient
from dstack_emu.transport.ports import PORTS

DESCRIPTION = (
    "Run every check on a quote, a versioned attestation, an RA-TLS certificate, a signing request, or a GetQuote or "
    "Attest answer, in any form that `dstack-emu inspect` reads. Exit 0 if all hold, 1 if one failed, 2 if there is "
    "nothing to check. If all checks hold, the evidence is genuine, but its application may be the wrong one. Under "
    "the emulated root even that proves nothing: anybody can forge evidence under it."
)

PCCS: Final = f"http://127.0.0.1:{PORTS['pccs']}"
MAX_TIME: Final = 253_402_300_799
"""The last second of the year 9999."""

_STATES: Final = {True: ("ok", GREEN), False: ("FAILED", RED), None: ("skipped", YELLOW)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_input(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pccs", default=PCCS, metavar="URL", help="where to fetch collateral (%(default)s)")
    source.add_argument(
        "--collateral",
        type=Path,
        metavar="FILE",
        help="read collateral from this file (QuoteCollateralV3 JSON) instead",
    )
    add_root(parser)
    parser.add_argument(
        "--time", type=_moment, metavar="WHEN", help="verify for this time (now): Unix seconds or ISO 8601"
    )
    parser.add_argument(
        "--report-data", type=hex_bytes, metavar="HEX", help="require this report_data, padded with zeros to 64 bytes"
    )
    parser.add_argument("--strict", action="store_true", help="refuse every TCB status but UpToDate")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


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


def run(arguments: argparse.Namespace) -> int:
    """Check the evidence and print the result."""
    data, found = read_input(arguments.file)
    if found.evidence is None:
        raise UsageError(printable(f"{arguments.file}: {found.what}: {found.obstacle or 'no evidence in it'}"))
    collect, policy = _collect(arguments), _policy(arguments)
    checks = verify_evidence(found.evidence, collect, policy)
    if arguments.json:
        head = {"ok": all_hold(checks), "what": found.what, "root": policy.root, "time": policy.now}
        print(json.dumps(head | {"checks": [asdict(check) for check in checks]}))
    else:
        print("\n".join(_render(headline(found, len(data)), checks, policy, wants_colour(sys.stdout))))
    return 0 if all_hold(checks) else 1


def _policy(arguments: argparse.Namespace) -> Expectations:
    anchor, root = chosen_root(arguments) or default_root()
    try:
        expected = None if arguments.report_data is None else pad_report_data(arguments.report_data)
    except FormatError as error:
        raise UsageError(f"--report-data: {error}") from error
    now = int(time.time()) if arguments.time is None else arguments.time
    return Expectations(anchor, root, now, expected, arguments.strict)


def _collect(arguments: argparse.Namespace) -> Collect:
    if arguments.collateral is None:
        url: str = arguments.pccs
        return lambda quote: asyncio.run(_fetch(url, quote))
    collateral = _read(arguments.collateral)
    return lambda quote: collateral


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


def _render(title: str, checks: Sequence[Check], policy: Expectations, colour: bool) -> Iterator[str]:
    when = datetime.fromtimestamp(policy.now, UTC)
    yield paint(title, BOLD, colour)
    yield from _wrapped("", printable(f"Verified at {when:%Y-%m-%dT%H:%M:%SZ} under {policy.root}"))
    yield ""
    width = max(len(check.name) for check in checks)
    for check in checks:
        state, tone = _STATES[check.ok]
        said = "; ".join(part for part in (check.got if check.ok else "", check.detail) if part)
        first, *more = _wrapped(f"{state:<7}  {check.name:<{width}}  ", printable(said))
        yield paint(first[:7], tone, colour) + first[7:]
        yield from more
        if check.ok is False:
            for name, text in (("got", check.got), ("expected", check.expected)):
                yield from _wrapped(f"{'':<9}{name:>{width}}  ", printable(text))
    failed, skipped = (sum(check.ok is state for check in checks) for state in (False, None))
    yield ""
    if failed:
        yield paint(f"{failed} of {len(checks)} checks failed, {skipped} skipped.", RED, colour)
    else:
        yield paint(f"All {len(checks) - skipped} checks that could be made hold, {skipped} skipped.", GREEN, colour)
    if not any(check.ok for check in checks if check.name == "quote"):
        yield "The quote is not proven: what holds beside it proves nothing."


def _wrapped(label: str, text: str) -> list[str]:
    """Put text after a label, with further lines indented below the first."""
    lines = textwrap.wrap(text, WIDTH - len(label)) or [""]
    return [(label + lines[0]).rstrip(), *(" " * len(label) + line for line in lines[1:])]
