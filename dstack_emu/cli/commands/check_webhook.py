"""`dstack-emu check-webhook`: check that a KMS understands an auth webhook."""

import argparse
import asyncio
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from dstack_emu.cli.commands.common import UsageError, add_release
from dstack_emu.cli.commands.inspect import WIDTH, print_text
from dstack_emu.cli.terminal import BOLD, GREEN, RED, YELLOW, paint, printable, wants_colour
from dstack_emu.kms_emu.auth_api import TIMEOUT
from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.transport.urls import shown_url
from dstack_emu.webhook_check.check import Report, check_webhook
from dstack_emu.webhook_check.sample_requests import SampleError, SampleRequests

DESCRIPTION = (
    "Send an auth webhook every request that a KMS of 0.5.x, of next and of a later release sends, for KMS and apps "
    "that are known, unknown and out of date, one after another and many at once. The emulated KMS's own client reads "
    "the answers. Exit 0 if a KMS understands all answers, 1 if not. Decisions are shown, not checked: the webhook "
    "decides whom to allow. The requests are those of the KMS and the app of a stack with the default seed; --seed "
    "and --boot-info change that."
)

_TONES: Final = {"ok": GREEN, "warning": YELLOW, "broken": RED, "skipped": YELLOW}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("url", metavar="URL", type=_url, help="the webhook, as core.auth_api.webhook.url has it")
    parser.add_argument(
        "--seed", default=DEFAULT_SEED, metavar="TEXT", help="send the values of this seed's stack (%(default)s)"
    )
    add_release(parser, "the dstack release of that stack, which the User-Agent says")
    parser.add_argument(
        "--boot-info",
        type=Path,
        metavar="FILE",
        help='send these values: JSON with fields of a request (mrAggregated, appId, …), or {"kms": {…}, "app": {…}}',
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help="wait that long for an answer (%(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"http(s)://host:port expected, got {text!r:.200}")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"seconds, up to 3600, expected, got {text!r:.40}")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Check the webhook and print the report."""
    requests = SampleRequests.of_seed(arguments.seed, arguments.release)
    if arguments.boot_info is not None:
        try:
            requests = requests.with_values(_read(arguments.boot_info))
        except SampleError as error:
            raise UsageError(printable(f"{arguments.boot_info}: {error}")) from error
    report = asyncio.run(check_webhook(arguments.url, requests, patience=arguments.timeout, release=arguments.release))
    if arguments.json:
        print_text(json.dumps(report.to_json()))
    else:
        print_text("\n".join(_render(report, wants_colour(sys.stdout))))
    return 0 if report.ok else 1


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SampleError(f"JSON cannot be read from it: {error}") from error


def _render(report: Report, colour: bool) -> Iterator[str]:
    yield paint(f"{shown_url(report.url)}, as a KMS sees it", BOLD, colour)
    yield ""
    for finding in report.findings:
        yield paint(f"{finding.level:<7}", _TONES[finding.level], colour) + f"  {finding.name}"
        for label, text in (("", finding.said), ("breaks: ", finding.breaks), ("hint: ", finding.hint)):
            if text:
                margin = " " * 9
                yield from textwrap.wrap(
                    printable(label + text), WIDTH, initial_indent=margin, subsequent_indent=margin + " " * len(label)
                )
    yield ""
    if report.ok:
        yield paint(f"Nothing here breaks a KMS; {_count(len(report.warnings), 'warning')}.", GREEN, colour)
    else:
        yield paint(f"{_count(len(report.broken), 'finding')} would break a KMS.", RED, colour)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
