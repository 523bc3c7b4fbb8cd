"""`dstack-emu why` on a terminal: verdict, reason, what was got beside what was wanted, the change, and what to do."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from dstack_emu.auth.boot_info import Refusal
from dstack_emu.cli.terminal import BOLD, GREEN, RED, YELLOW, paint, printable
from dstack_emu.inspection.contract_steps import ContractChange
from dstack_emu.inspection.policy_change import PolicyChange, pointer
from dstack_emu.inspection.why_report import Report

WIDTH: Final = 100
GROUP: Final = 8
"""Hex digits between two blanks: four bytes."""
SHOWN_VALUES: Final = 3
"""Values of a policy that are shown beside one that was got, the most similar first."""

_TONES: Final = {"allowed": GREEN, "denied": RED, "refused": RED}


def render(report: Report, *, colour: bool) -> str:
    """Render a report as text."""
    return "\n".join(_lines(report, colour))


def _lines(report: Report, colour: bool) -> Iterator[str]:
    who = "KMS" if report.caller == "kms" else "app"
    by = "the KMS" if report.verdict == "refused" else str(report.decider)
    yield f"{paint(report.verdict.upper(), _TONES[report.verdict], colour)}: {who}, by {printable(by)}"
    yield from _wrapped("", report.sentence)
    yield ""
    yield from _evidence(report, colour)
    explained = report.explained
    if explained and not explained.is_allowed:
        rule = f"{explained.rule}: " if explained.rule else ""
        yield from _wrapped("Rule      ", f'{rule}"{explained.reason}"')
    change = explained.change if explained else None
    for number, refusal in enumerate(change.refusals if change else ()):
        yield ""
        if number == 1:
            yield "If that is changed, these are refused next:"
            yield ""
        yield from _comparison(refusal, colour)
    if change and change.patch:
        yield from _change(change, colour)
    if (of_contract := report.contract_change) is not None:
        yield from _contract_change(of_contract, colour)
    yield from _exchange(report, colour)
    for warning in report.warnings:
        yield ""
        yield from (paint(line, YELLOW, colour) for line in _wrapped("Note      ", warning))
    yield ""
    yield paint("Next", BOLD, colour)
    for number, step in enumerate(report.next_steps, 1):
        yield from _wrapped(f"  {number}. ", step)


def _evidence(report: Report, colour: bool) -> Iterator[str]:
    used = report.verification
    if used is None:
        yield from _wrapped("Evidence  ", f"{report.what}: a claim, nothing in it was verified")
        return
    when = datetime.fromtimestamp(used.time, UTC)
    verb = "does not verify" if report.examination.problem else "verifies"
    yield from _wrapped("Evidence  ", f"{report.what}: it {verb} at {when:%Y-%m-%dT%H:%M:%SZ} under {used.root}")
    yield from _wrapped("          ", f"collateral: {used.collateral}")
    for check in report.examination.checks:
        if check.ok is False:
            said = f"{check.name}: {check.detail or check.got}"
            unasked = "" if report.examination.problem else " (a KMS does not check this)"
            yield from _wrapped("          ", f"FAILED {said}{unasked}")
    if request := report.examination.request:
        info = request.boot_info
        advisories = ", ".join(info.advisory_ids) or "none"
        yield from _wrapped("Platform  ", f"TCB status {info.tcb_status or 'absent'}, advisories {advisories}")


def _exchange(report: Report, colour: bool) -> Iterator[str]:
    """Show the boot info, and the answer of a webhook that was asked."""
    request, explained = report.examination.request, report.explained
    if request is None or explained is None:
        return
    yield ""
    is_webhook = report.decider.kind == "webhook"
    url = report.decider.where.rstrip("/") if is_webhook else ""
    yield paint(printable(f"Request   POST {url}/bootAuth/{report.caller}"), BOLD, colour)
    for name, value in request.document.items():
        yield from _wrapped(f"  {printable(name):<18}", value if isinstance(value, str) else json.dumps(value))
    if not is_webhook:
        return
    yield paint("Answer", BOLD, colour)
    for name, said in (
        ("isAllowed", json.dumps(explained.is_allowed)),
        ("reason", explained.reason),
        ("gatewayAppId", explained.gateway_app_id),
    ):
        yield from _wrapped(f"  {name:<18}", said)


# ---- got and wanted


def _comparison(refusal: Refusal, colour: bool) -> Iterator[str]:
    place = pointer(refusal.path) or "no member of the file"
    yield f"{paint(refusal.member, BOLD, colour)}  ({printable(place)})"
    for got in refusal.got:
        wanted = sorted(refusal.expected, key=lambda one: (-_likeness(_bare(got), _bare(one)), one))
        yield f"  got     {_aligned(got)}"
        for one in wanted[:SHOWN_VALUES]:
            yield f"  wanted  {_aligned(one)}"
            if marks := _marks(_bare(got), _bare(one)):
                yield f"          {paint(marks, RED, colour)}"
        if len(wanted) > SHOWN_VALUES:
            yield f"          … and {len(wanted) - SHOWN_VALUES} more"
    if not refusal.expected:
        yield "  wanted  nothing is listed there"


def _bare(text: str) -> str:
    """Return the digits of hex; other text as it is."""
    digits = text.strip().lower().removeprefix("0x")
    return digits if _is_hex(digits) else printable(text)


def _is_hex(text: str) -> bool:
    return len(text) >= 2 * GROUP and not set(text) - set("0123456789abcdef")


def _aligned(text: str) -> str:
    """Return hex in groups of four bytes; other text as it is."""
    bare = _bare(text)
    return " ".join(textwrap.wrap(bare, GROUP)) if _is_hex(bare) else (bare or "(empty)")


def _marks(got: str, wanted: str) -> str:
    """Return carets below the bytes that differ; nothing for texts, or if most of it differs."""
    if not (_is_hex(got) and _is_hex(wanted)):
        return ""
    size = max(len(got), len(wanted))
    differs = [got[at : at + 2] != wanted[at : at + 2] for at in range(0, size, 2)]
    marks = "".join("^^" if each else "  " for each in differs)
    return " ".join(marks[at : at + GROUP] for at in range(0, size, GROUP)).rstrip()


def _likeness(one: str, other: str) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


# ---- the change


def _change(change: PolicyChange, colour: bool) -> Iterator[str]:
    yield ""
    yield paint("The smallest change that admits it", BOLD, colour)
    for line in change.diff.splitlines():
        yield f"  {paint(printable(line), GREEN if line.startswith('+') else '', colour)}"
    yield "  as a JSON Patch (RFC 6902):"
    yield from _operations(change.patch)


def _contract_change(change: ContractChange, colour: bool) -> Iterator[str]:
    yield ""
    yield paint("The change of a contract that lifts this reason", BOLD, colour)
    for line in change.diff.splitlines():
        yield f"  {paint(printable(line), GREEN if line.startswith('+') else '', colour)}"
    yield f"  by the transaction {printable(change.call)}"


def _operations(patch: Sequence[object]) -> Iterator[str]:
    for number, operation in enumerate(patch):
        opening, closing = "[" if number == 0 else " ", "]" if number == len(patch) - 1 else ","
        yield f"  {opening}{json.dumps(operation)}{closing}"


def _wrapped(label: str, text: str) -> Iterator[str]:
    lines = textwrap.wrap(printable(text), WIDTH - len(label), break_on_hyphens=False) or [""]
    yield (label + lines[0]).rstrip()
    yield from (" " * len(label) + line for line in lines[1:])
