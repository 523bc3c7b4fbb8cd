"""`dstack-emu quote`: write one quote to a file."""

import argparse
import json
import sys
from pathlib import Path

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import for_get_quote
from dstack_emu.attest.report_data import pad_report_data
from dstack_emu.cli.commands.common import WARNING, UsageError, hex_bytes
from dstack_emu.cli.commands.guest_options import add_guest_options, guest_config
from dstack_emu.deployment.guest_config import power_on
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import KeyProvider

DESCRIPTION = (
    "Boot an emulated trust domain, quote the given report_data, and write the raw quote, or (--json) the answer of "
    "GetQuote. A PCCS with the same seed (`dstack-emu pccs`) serves its collateral. " + WARNING
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--report-data", type=hex_bytes, default=b"", metavar="HEX", help="at most 64 bytes, padded with zeros"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: stdout)")
    parser.add_argument(
        "--attestation", action="store_true", help="write the whole attestation (V0) instead of the quote"
    )
    parser.add_argument("--json", action="store_true", help="write JSON: quote, event_log, report_data, vm_config")
    add_guest_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the quote."""
    config = guest_config(arguments, platform_state=PlatformState(other_root=arguments.other_root))
    intel = Intel(Seed.of(config.seed))
    try:
        domain = power_on(intel, config)
        domain.complete(KeyProvider("none"))
        evidence = domain.attest(pad_report_data(arguments.report_data))
    except FormatError as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        document = {
            "quote": evidence.quote.hex(),
            "event_log": [event.to_json() for event in for_get_quote(evidence.event_log)],
            "report_data": evidence.report_data.hex(),
            "vm_config": evidence.config,
        }
        data = json.dumps(document, indent=2).encode() + b"\n"
    else:
        data = evidence.encode() if arguments.attestation else evidence.quote
    _write(data, arguments.out)
    return 0


def _write(data: bytes, out: Path | None) -> None:
    if out is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        out.write_bytes(data)
    except OSError as error:
        raise UsageError(f"--out: cannot write {out}: {error.strerror}") from error
