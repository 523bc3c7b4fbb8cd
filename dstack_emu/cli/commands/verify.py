"""`dstack-emu verify`: check evidence, and report each check that fails."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.report_data import pad_report_data
from dstack_emu.cli.commands.collateral_options import add_collateral, add_time, chosen_time, collector
from dstack_emu.cli.commands.common import UsageError, hex_bytes
from dstack_emu.cli.commands.inspect import WIDTH, add_input, headline, read_input
from dstack_emu.cli.commands.root_options import add_root, chosen_root, default_root
from dstack_emu.cli.terminal import BOLD, GREEN, RED, YELLOW, paint, printable, wants_colour
from dstack_emu.inspection.checks import Check, Expectations, all_hold, verify_evidence

DESCRIPTION = (
    "Run every check on a quote, a versioned attestation, an RA-TLS certificate, a signing request, or a GetQuote or "
    "Attest answer, in any form that `dstack-emu inspect` reads. Exit 0 if all hold, 1 if one failed, 2 if there is "
    "nothing to check. If all checks hold, the evidence is genuine, but its application may be the wrong one. Under "
    "the emulated root even that proves nothing: anybody can forge evidence under it."
)

_STATES: Final = {True: ("ok", GREEN), False: ("FAILED", RED), None: ("skipped", YELLOW)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_input(parser)
    add_collateral(parser)
    add_root(parser)
    add_time(parser)
    parser.add_argument(
        "--report-data", type=hex_bytes, metavar="HEX", help="require this report_data, padded with zeros to 64 bytes"
    )
    parser.add_argument("--strict", action="store_true", help="refuse every TCB status but UpToDate")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Check the evidence and print the result."""
    data, found = read_input(arguments.file)
    if found.evidence is None:
        raise UsageError(printable(f"{arguments.file}: {found.what}: {found.obstacle or 'no evidence in it'}"))
    collect, policy = collector(arguments), _policy(arguments)
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
    return Expectations(anchor, root, chosen_time(arguments), expected, arguments.strict)


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
    if any(check.ok is False for check in checks if check.name == "collateral"):
        yield "--pccs URL names the PCCS of your stack; --offline and --collateral FILE need none."


def _wrapped(label: str, text: str) -> list[str]:
    """Put text after a label, with further lines indented below the first."""
    lines = textwrap.wrap(text, WIDTH - len(label)) or [""]
    return [(label + lines[0]).rstrip(), *(" " * len(label) + line for line in lines[1:])]
