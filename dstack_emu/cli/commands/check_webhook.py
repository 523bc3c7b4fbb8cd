"""`dstack-emu check-webhook`: check that a KMS understands an auth webhook, and that it allows nobody else."""

import argparse
import asyncio
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.release import Release, release
from dstack_emu.cli.commands.common import UsageError, add_release
from dstack_emu.cli.commands.control_client import Api, find_control
from dstack_emu.cli.commands.inspect import WIDTH
from dstack_emu.cli.junit import JunitCase, to_junit
from dstack_emu.cli.progress import ProgressLine
from dstack_emu.cli.terminal import BOLD, GREEN, RED, YELLOW, paint, printable, wants_colour
from dstack_emu.deployment.config import STATE_VARIABLE
from dstack_emu.kms_emu.auth_api import TIMEOUT
from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.transport.urls import is_http_url, shown_url
from dstack_emu.webhook_check.allowed import (
    CONTRACTS,
    AllowedRequests,
    Contract,
    from_document,
    from_guests,
    from_samples,
)
from dstack_emu.webhook_check.check import SLOW, Report, check_webhook
from dstack_emu.webhook_check.expectations import Wanted, parse_expectations, resolve
from dstack_emu.webhook_check.safety import FAILURES, RequestCheck, SafetyReport, check_safety, list_requests
from dstack_emu.webhook_check.sample_requests import SampleError, SampleRequests

DESCRIPTION = (
    "Check an auth webhook. First its answers: it is sent every request that a KMS of 0.5.x, of next and of a later "
    "release sends, one after another and many at once, and the emulated KMS's own client reads the answers. Then its "
    "decisions: a request that it allows is sent again with one thing changed, about 250 times for each path, and what "
    "is still allowed although dstack's auth servers deny it is a failure. Exit 0 if a KMS understands all answers and "
    "nothing is allowed that should not be, 1 if not or if nothing could be proven, 2 if the arguments cannot be used."
)
EXAMPLES: Final = """\
examples:
  dstack-emu check-webhook http://127.0.0.1:3000 --allowed auth-config.json    start with what your policy allows
  dstack-emu check-webhook http://127.0.0.1:3000 --allowed boot-info.json      or with a boot info that it allows
  dstack-emu check-webhook http://127.0.0.1:3000 --control http://127.0.0.1:8070    or what a running stack's allows
  dstack-emu check-webhook --list > expected.json                              all requests, to edit what you want
  dstack-emu check-webhook http://127.0.0.1:3000 --expect expected.json --junit check-webhook.xml
"""

_TONES: Final = {"ok": GREEN, "warning": YELLOW, "skipped": YELLOW}
"""The colours of levels; all others are failures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = textwrap.fill(DESCRIPTION, WIDTH), EXAMPLES
    parser.add_argument(
        "url", metavar="URL", nargs="?", type=_url, help="the webhook, as core.auth_api.webhook.url has it"
    )
    parser.add_argument(
        "--allowed",
        "--boot-info",
        type=Path,
        metavar="FILE",
        help="what the webhook allows: a policy of auth-simple, or a boot info: JSON with fields of a request "
        '(mrAggregated, appId, …), or {"kms": {…}, "app": {…}}; fields that are left out are those of --seed',
    )
    parser.add_argument(
        "--control",
        metavar="URL",
        default=os.environ.get("DSTACK_EMU_CONTROL") or None,
        help="take what the policy of a running stack's source KMS allows, or its source KMS and app if it asks a "
        "webhook of yours, if there is no --allowed; the stack's control API, by default that in DSTACK_EMU_CONTROL, "
        f"or that of the stack in the folder {STATE_VARIABLE}",
    )
    parser.add_argument(
        "--seed",
        metavar="TEXT",
        help=f"otherwise take the KMS and the app of this seed's stack ({DEFAULT_SEED})",
    )
    add_release(parser, "the dstack release of that stack, which the User-Agent says")
    parser.add_argument(
        "--contract",
        choices=CONTRACTS,
        help="compare with auth-simple under this contract, with dstack-auth (file), or with auth-eth-bun and a "
        "DstackKms contract (eth); by default with the release's auth-simple",
    )
    parser.add_argument(
        "--expect",
        type=Path,
        metavar="FILE",
        help="expect what this file says in place of what dstack's servers answer: JSON with names of requests (or "
        "patterns with *), and allowed, denied, error, refused (denied or error) or any",
    )
    parser.add_argument("--list", action="store_true", help="print all names as such a file, and send nothing")
    parser.add_argument(
        "--answers-only", action="store_true", help="check only that a KMS understands the answers, not the decisions"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help="wait that long for an answer (%(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the result as JUnit XML, too")


def _url(text: str) -> str:
    if not is_http_url(text):
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
    allowed, contract, used = _allowed(arguments)
    expectations = _expectations(arguments.expect, allowed, contract)
    if arguments.list:
        print(json.dumps({**list_requests(allowed, contract), **expectations}, indent=1))
        return 0
    if arguments.url is None:
        raise UsageError("the webhook's URL is missing: dstack-emu check-webhook http://host:port")
    report, safety = asyncio.run(_check(arguments, allowed, contract, expectations, used))
    if arguments.junit is not None:
        title = f"check-webhook {shown_url(arguments.url)}"
        _write(arguments.junit, to_junit(title, _junit_cases(report, safety)))
    is_ok = report.ok and (safety is None or safety.ok)
    if arguments.json:
        document = report.to_json() | {"ok": is_ok, "slow": _slow(report, safety)}
        print(json.dumps(document | (safety.to_json() if safety is not None else {})))
    else:
        print("\n".join(_render(report, safety, wants_colour(sys.stdout))))
    return 0 if is_ok else 1


async def _check(
    arguments: argparse.Namespace,
    allowed: AllowedRequests,
    contract: Contract,
    expectations: dict[str, Wanted],
    used: Release,
) -> tuple[Report, SafetyReport | None]:
    progress = ProgressLine()
    try:
        progress.show("checking the answers")
        report = await check_webhook(arguments.url, allowed.samples, patience=arguments.timeout, release=used)
        is_answering = not any(each.level == "skipped" for each in report.findings)
        if arguments.answers_only or not is_answering:
            return report, None
        safety = await check_safety(
            arguments.url,
            allowed,
            contract,
            expectations=expectations,
            patience=arguments.timeout,
            release=used,
            progress=lambda number, total, name: progress.show(f"{number} of {total}: {name}"),
        )
        return report, safety
    finally:
        progress.clear()


# ---- what to send


def _allowed(arguments: argparse.Namespace) -> tuple[AllowedRequests, Contract, Release]:
    """Find the requests that should be allowed, and the contract and release to go by."""
    used: Release = arguments.release
    is_stack_named = arguments.control is not None or bool(os.environ.get(STATE_VARIABLE))
    if arguments.allowed is None and arguments.seed is None and is_stack_named:
        return _of_stack(arguments.control, arguments.contract)
    contract: Contract = arguments.contract or used.auth_contract
    seed = arguments.seed or DEFAULT_SEED
    samples = SampleRequests.of_seed(seed, used)
    if arguments.allowed is None:
        return from_samples(samples, f"the KMS and the app of the stack with the seed {seed}"), contract, used
    try:
        document = _read(arguments.allowed)
        return from_document(document, samples, contract, str(arguments.allowed)), contract, used
    except SampleError as error:
        raise UsageError(printable(f"{arguments.allowed}: {error}")) from error


def _of_stack(control: str | None, named: Contract | None) -> tuple[AllowedRequests, Contract, Release]:
    if control is not None and not control.startswith("http://"):
        raise UsageError(f"--control: an http:// URL expected, got {control!r:.100}")
    try:
        url, token = find_control(control, None, None)
    except UsageError as error:
        raise UsageError(f"{error}; --allowed, --control or --seed name what is allowed otherwise") from error
    api = Api(url, token)
    stack = api.get("/stack")
    used = release(stack["release"])
    contract: Contract = named or used.auth_contract
    samples = SampleRequests.of_seed(stack["seed"], used)
    if "src" in stack["webhooks"]:
        source = f"the source KMS and the app of the stack at {shown_url(url)}"
        return from_guests(api.get("/guests"), samples, source), contract, used
    source, policy = f"the policy of the source KMS at {shown_url(url)}", api.get("/policies/src")
    try:
        return from_document(policy, samples, contract, source), contract, used
    except SampleError as error:
        raise UsageError(printable(f"{source}: {error}")) from error


def _expectations(path: Path | None, allowed: AllowedRequests, contract: Contract) -> dict[str, Wanted]:
    if path is None:
        return {}
    try:
        return dict(resolve(parse_expectations(_read(path)), list_requests(allowed, contract)))
    except SampleError as error:
        raise UsageError(printable(f"{path}: {error}")) from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SampleError(f"JSON cannot be read from it: {error}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


# ---- the report


def _junit_cases(report: Report, safety: SafetyReport | None) -> Iterator[JunitCase]:
    for each in report.findings:
        is_broken = each.level == "broken"
        yield JunitCase("check-webhook.answers", each.name, each.seconds, each.level, each.said, is_broken)
    for check in safety.requests if safety is not None else ():
        suite, said = f"check-webhook.safety.{check.side}", f"{check.outcome}: {check.said}"
        yield JunitCase(suite, check.name, check.seconds, check.level, said, check.level in FAILURES)


def _slow(report: Report, safety: SafetyReport | None) -> list[str]:
    times = [(each.name, each.seconds) for each in report.findings]
    times += [(each.name, each.seconds) for each in (safety.requests if safety is not None else ())]
    return [name for name, seconds in times if seconds > SLOW]


def _render(report: Report, safety: SafetyReport | None, colour: bool) -> Iterator[str]:
    yield paint(f"{shown_url(report.url)}, as a KMS sees it", BOLD, colour)
    yield ""
    for finding in report.findings:
        time = f"  ({_milliseconds(finding.seconds)})" if finding.seconds else ""
        yield paint(f"{finding.level:<10}", _tone(finding.level), colour) + f"  {finding.name}{time}"
        for label, text in (("", finding.said), ("breaks: ", finding.breaks), ("hint: ", finding.hint)):
            yield from _indented(label, text)
    yield ""
    if safety is not None:
        yield from _decisions(safety, colour)
    yield from _verdict(report, safety, colour)


def _decisions(safety: SafetyReport, colour: bool) -> Iterator[str]:
    yield paint("Whom it allows: one thing changed at a time", BOLD, colour)
    yield from textwrap.wrap(f"Allowed is: {printable(safety.source)}", WIDTH)
    yield from textwrap.wrap(f"dstack's servers: {_server(safety.contract)}", WIDTH)
    yield ""
    for each in safety.requests:
        outcome = each.outcome or "not sent"
        line = f"{outcome:<8}  {_milliseconds(each.seconds):>9}  {printable(each.name)}"
        yield paint(f"{each.level:<10}", _tone(each.level), colour) + f"  {line}"
        if each.level != "ok":
            yield from _indented("", _explained(each))
    yield ""


def _server(contract: Contract) -> str:
    others = {"file": "dstack-auth", "eth": "auth-eth-bun with a DstackKms contract"}
    return others.get(contract, f"auth-simple, contract {contract}")


def _explained(each: RequestCheck) -> str:
    said = f" ({each.said})" if each.said else ""
    if each.level == "unsafe":
        answer = "deny it" if each.expected == "denied" else "refuse it as malformed"
        return f"still allowed: dstack's servers {answer}{said}"
    if each.level == "warning":
        return "allowed: dstack's servers refuse it as malformed; no KMS sends it, and it decides nothing"
    if each.level == "broken":
        return f"a KMS can send this, and takes the answer for an error, not for a denial: {each.said}"
    if each.level == "unexpected":
        return f"{each.expected} expected, got {each.outcome}{said}"
    return each.said


def _verdict(report: Report, safety: SafetyReport | None, colour: bool) -> Iterator[str]:
    yield from _summary(safety, colour)
    slow = _slow(report, safety)
    if slow:
        yield paint(f"Slow, over {SLOW:g} s: {printable(', '.join(slow))}.", YELLOW, colour)
    if report.ok:
        yield paint(f"Nothing here breaks a KMS; {_count(len(report.warnings), 'warning')}.", GREEN, colour)
    else:
        yield paint(f"{_count(len(report.broken), 'finding')} would break a KMS.", RED, colour)


def _summary(safety: SafetyReport | None, colour: bool) -> Iterator[str]:
    if safety is None:
        yield "Whom it allows was not checked."
    elif safety.ok:
        yield paint(
            f"Nothing is allowed that dstack's servers deny, of {len(safety.requests)} requests.", GREEN, colour
        )
    else:
        for line in safety.summary():
            yield from textwrap.wrap(printable(line), WIDTH, subsequent_indent="  ")
        others = [each.name for each in safety.failures if each.level != "unsafe"]
        if others:
            yield from textwrap.wrap(printable(f"failed otherwise: {', '.join(others)}"), WIDTH, subsequent_indent="  ")
        count = f"{len(safety.failures)} of {_count(len(safety.requests), 'request')} failed"
        yield paint(f"{count}: --expect FILE changes what is expected.", RED, colour)


def _indented(label: str, text: str) -> Iterator[str]:
    margin = " " * 12
    if text:
        yield from textwrap.wrap(
            printable(label + text), WIDTH, initial_indent=margin, subsequent_indent=margin + " " * len(label)
        )


def _tone(level: str) -> str:
    return _TONES.get(level, RED)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
