"""`dstack-emu why`: why a boot is admitted or refused, and the smallest change of the policy that admits it."""

import argparse
import asyncio
import sys
from pathlib import Path

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.release import Release
from dstack_emu.auth.errors import AuthError
from dstack_emu.auth.policy import CONTRACTS
from dstack_emu.cli.commands.collateral_options import (
    add_collateral,
    add_time,
    chosen_time,
    collector,
    source_of_collateral,
)
from dstack_emu.cli.commands.common import UsageError, add_release
from dstack_emu.cli.commands.inspect import add_input, identify, read_bytes
from dstack_emu.cli.commands.root_options import add_root, chosen_root, default_root
from dstack_emu.cli.terminal import printable, wants_colour
from dstack_emu.cli.why_text import render
from dstack_emu.inspection.checks import Expectations
from dstack_emu.inspection.policy_file import PolicyFile
from dstack_emu.inspection.why import BootRequest, Examination, Explained, UnusableError, ask, examine, explain
from dstack_emu.inspection.why_report import Decider, Report, Verification, as_json
from dstack_emu.kms_emu.errors import UnavailableError
from dstack_emu.transport.errors import TransportError

DESCRIPTION = (
    "Explain a decision: verify evidence as a KMS does, make the request to its webhook of it, and decide by a policy. "
    "The evidence is an attestation, a certificate, a signing request, a GetQuote or Attest answer or a verifier's "
    "request, in any form that `dstack-emu inspect` reads; or a boot info alone, as a KMS sends it. Exit 0 if it is "
    "allowed, 1 if it is denied or the evidence refused, 2 if something cannot be used."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_input(parser)
    decider = parser.add_mutually_exclusive_group(required=True)
    decider.add_argument("--policy", metavar="FILE", help="decide by this policy of auth-simple")
    decider.add_argument("--allowlist", metavar="FILE", help="decide by this allowlist of dstack-auth")
    decider.add_argument("--webhook", metavar="URL", help="ask this webhook")
    parser.add_argument(
        "--as",
        dest="caller",
        choices=("app", "kms"),
        default="app",
        help="whether the evidence is that of an app or of a KMS (%(default)s)",
    )
    parser.add_argument("--contract", choices=CONTRACTS, help="auth-simple's contract (the release's)")
    add_release(parser, "the dstack release of the KMS")
    parser.add_argument(
        "--vm-config", type=Path, metavar="FILE", help="the VM config (JSON) that came beside the evidence"
    )
    add_collateral(parser)
    add_root(parser)
    add_time(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Explain the decision and print it."""
    if arguments.contract and not arguments.policy:
        raise UsageError("--contract is auth-simple's: --policy FILE expected with it")
    try:
        report = _report(arguments)
    except (UnusableError, AuthError, UnavailableError, TransportError, AttestError) as error:
        raise UsageError(printable(f"{arguments.file}: {_advice(error)}")) from error
    print(as_json(report) if arguments.json else render(report, colour=wants_colour(sys.stdout)))
    return 0 if report.verdict == "allowed" else 1


def _advice(error: Exception) -> str:
    match error:
        case UnavailableError():
            return f"no decision, which a KMS takes for a refusal: {error}"
        case TransportError():
            return f"no collateral: {error}; start its PCCS, or see --pccs, --collateral and --offline"
    return str(error)


def _report(arguments: argparse.Namespace) -> Report:
    release: Release = arguments.release
    decider, policy = _decider(arguments, release)
    data = read_bytes(arguments.file)
    request = BootRequest.find(data)
    if request:
        what, verification, examination = "boot info", None, Examination((), request)
    else:
        what, verification, examination = _examined(arguments, data, release)
    if request and not policy:
        examination = Examination((), BootRequest.of(request.boot_info, release))  # as the KMS sends it
    explained: Explained | None = None
    if examination.request and policy:
        explained = explain(policy, examination.request, arguments.caller)
    elif examination.request:
        asking = ask(arguments.webhook, examination.request, arguments.caller, release=release)
        explained = asyncio.run(asking)
    return Report(
        what,
        arguments.caller,
        release.name,
        verification,
        examination,
        decider,
        explained,
        policy.warnings if policy else (),
    )


def _decider(arguments: argparse.Namespace, release: Release) -> tuple[Decider, PolicyFile | None]:
    if arguments.webhook:
        return Decider("webhook", arguments.webhook), None
    contract = None if arguments.allowlist else arguments.contract or release.auth_contract
    try:
        policy = PolicyFile.read(arguments.policy or arguments.allowlist, contract)
    except AuthError as error:  # it names the policy
        raise UsageError(printable(str(error))) from error
    return Decider.of(policy), policy


def _examined(arguments: argparse.Namespace, data: bytes, release: Release) -> tuple[str, Verification, Examination]:
    found = identify(arguments.file, data)
    if found.evidence is None:
        raise UnusableError(f"{found.what}: {found.obstacle or 'no evidence in it'}")
    anchor, root = chosen_root(arguments) or default_root()
    expected = Expectations(anchor, root, chosen_time(arguments))
    config = _vm_config(arguments.vm_config)
    examination = examine(found.evidence, collector(arguments), expected, release, vm_config=config)
    return found.what, Verification(root, expected.now, source_of_collateral(arguments)), examination


def _vm_config(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(printable(f"--vm-config: {path} cannot be read: {error}")) from error
