"""`dstack-emu check-kms`: check that a KMS refuses what it must, and still releases what it should."""

import argparse
import asyncio
import json
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dstack_emu.attest.release import Release
from dstack_emu.cli import kms_check_report as report
from dstack_emu.cli.commands.common import UsageError, add_release, interruptible, say
from dstack_emu.cli.junit import to_junit
from dstack_emu.cli.progress import ProgressLine
from dstack_emu.cli.terminal import paint, printable, wants_colour
from dstack_emu.deployment.errors import StackError
from dstack_emu.kms_check.allow import needless, parse_allowed, with_allowed
from dstack_emu.kms_check.case import Case
from dstack_emu.kms_check.catalogue import select
from dstack_emu.kms_check.errors import UnusableError
from dstack_emu.kms_check.runner import Result, Settings, check_kms

DESCRIPTION = (
    "Check a KMS. It is run in an emulated trust domain, with a webhook, a PCCS, a guest agent, callers and other KMS "
    "that do what each case needs: deny, fail, forge, revoke. Each case requires a refusal, and then the success that "
    "shows that the KMS still works. Exit 0 if all is as expected, 1 if not, 2 if the KMS does not start or an "
    "argument cannot be used."
)
EXAMPLES: Final = """\
examples:
  dstack-emu check-kms --kms 'dstack-emu kms -c {config}'              check the emulator's own KMS
  dstack-emu check-kms --kms './my-kms --config {config}' --release 0.5 --junit check-kms.xml
  dstack-emu check-kms --kms '…' --only 'self-check/*' --only 'image/*'      some cases
  dstack-emu check-kms --external --folder /tmp/check                  you start the KMS, in a debugger or a container
  dstack-emu check-kms --list                                          all cases, with what each proves
"""
WAIT, EXTERNAL_WAIT = 60.0, 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = textwrap.fill(DESCRIPTION, report.WIDTH), EXAMPLES
    parser.add_argument(
        "--kms",
        metavar="COMMAND",
        help="the command that runs the KMS, with {config} where the path of its kms.toml belongs; it finds its guest "
        "agent by DSTACK_AGENT_ADDRESS",
    )
    parser.add_argument(
        "--external",
        action="store_true",
        help="write kms.toml, and wait until you have started the KMS; it is started once, so cases that need a second "
        "one are skipped",
    )
    add_release(parser, "the dstack release whose rules and texts are expected")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="run only the cases with this name, in which * stands for any text; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="print all cases, and run none")
    parser.add_argument(
        "--allow",
        type=Path,
        metavar="FILE",
        help="cases that may fail, each with a reason: a JSON object, or lines of a name and a reason",
    )
    parser.add_argument(
        "--self-check-cache",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="for how long the KMS uses an answer of its webhook about itself: 1 for dstack's KMS of 0.6 (%(default)g)",
    )
    parser.add_argument(
        "--patience",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long a call may take (%(default)g)",
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        metavar="SECONDS",
        help=f"how long the KMS may take to start ({WAIT:g}; {EXTERNAL_WAIT:g} with --external)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where kms.toml, the keys and the output of the KMS are kept (a temporary folder)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the result as JUnit XML, too")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"seconds, up to 3600, expected, got {text!r:.40}")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Check the KMS and print the report."""
    try:
        cases = select(arguments.only, arguments.release)
        allowed = _allowed(arguments.allow, arguments.release)
        if arguments.list:
            _list(cases, as_json=arguments.json)
            return 0
        results = _check(arguments, cases, allowed)
    except (UnusableError, StackError) as error:
        raise UsageError(_lines(str(error))) from error
    unneeded, command = needless(results, allowed), arguments.kms
    if arguments.junit is not None:
        _write(arguments.junit, to_junit(f"check-kms {command or 'external'}", report.to_junit_cases(results)))
    if arguments.json:
        print(json.dumps(report.to_json(results, arguments.release.name, command, unneeded)))
    else:
        lines = report.render(results, _again(arguments), unneeded, colour=wants_colour(sys.stdout))
        print("\n".join(lines))
    return 0 if report.is_ok(results) else 1


def _check(arguments: argparse.Namespace, cases: Sequence[Case], allowed: Mapping[str, str]) -> list[Result]:
    if arguments.external == (arguments.kms is not None):
        raise UnusableError("either --kms 'COMMAND {config}' or --external expected: which KMS is to be checked")
    progress, colour = ProgressLine(), wants_colour(sys.stderr)

    def observe(result: Result, number: int, total: int) -> None:
        shown = with_allowed(result, allowed)
        text = f"[{number}/{total}] {shown.outcome:<7} {shown.case.name}"
        if progress.is_shown and shown.outcome == "pass":
            progress.show(text)
            return
        progress.clear()
        say(paint(text, report.tone(shown.outcome), colour))

    with tempfile.TemporaryDirectory(prefix="dstack-emu-") as temporary:
        settings = Settings(
            command=arguments.kms,
            release=arguments.release,
            folder=_folder(arguments.folder, Path(temporary)),
            wait=arguments.wait or (EXTERNAL_WAIT if arguments.external else WAIT),
            patience=arguments.patience,
            self_check_cache=arguments.self_check_cache,
        )
        work = check_kms(settings, cases, observe, say if arguments.external else progress.show)
        try:
            results = asyncio.run(interruptible(work))
        finally:
            progress.clear()
    return [with_allowed(result, allowed) for result in results]


def _folder(given: Path | None, temporary: Path) -> Path:
    if given is None:
        return temporary
    folder = given.absolute()
    used = [str(path) for path in folder.glob("kms-*")]
    if used:
        raise UnusableError(f"--folder: {used[0]} is there already, and a fresh KMS is needed: name another folder")
    return folder


def _allowed(path: Path | None, release: Release) -> Mapping[str, str]:
    if path is None:
        return {}
    try:
        return parse_allowed(path.read_text(encoding="utf-8"), release)
    except OSError as error:
        raise UnusableError(f"{path} cannot be read: {error.strerror}") from error
    except (UnusableError, ValueError) as error:
        raise UnusableError(f"{path}: {error}") from error


def _list(cases: Sequence[Case], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"name": case.name, "about": case.about} for case in cases]))
        return
    width = max(len(case.name) for case in cases)
    print("\n".join(f"{case.name:<{width}}  {case.about}" for case in cases))


def _again(arguments: argparse.Namespace) -> list[str]:
    """Return the words of the command that was given, without the cases."""
    words = ["dstack-emu", "check-kms"]
    words += ["--external"] if arguments.external else ["--kms", arguments.kms]
    words += ["--release", arguments.release.name]
    if arguments.self_check_cache:
        words += ["--self-check-cache", f"{arguments.self_check_cache:g}"]
    return words


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.splitlines()))
