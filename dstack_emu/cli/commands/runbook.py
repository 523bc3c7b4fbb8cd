"""`dstack-emu runbook`: run dstack's runbook for KMS self authorization."""

import argparse
import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.attest.version import EMULATOR
from dstack_emu.cli.commands.common import WARNING, UsageError, add_release, interruptible, say
from dstack_emu.cli.commands.production import require_emulated
from dstack_emu.cli.commands.stack_options import add_kms_options
from dstack_emu.cli.commands.token_options import add_tokens, tokens
from dstack_emu.cli.runbook_report import to_stderr, to_stdout
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.deployment.config import AUTH_KINDS, StackConfig
from dstack_emu.deployment.guest_network import HOST_IN_GUEST
from dstack_emu.runbook.cases import run_cases
from dstack_emu.runbook.deploy import DeployedKms, Vmm
from dstack_emu.runbook.errors import RunbookError
from dstack_emu.runbook.evidence import Destination, evidence_files, normalised, normalised_log
from dstack_emu.runbook.kms_client import KmsClient, PrpcKmsClient
from dstack_emu.runbook.page import CALLS, REPORT
from dstack_emu.runbook.runner import RunbookRun
from dstack_emu.runbook.step_calls import StepCalls
from dstack_emu.runbook.target import INTEL, SIDES, Target, TargetError
from dstack_emu.runbook.transcript import Step, Transcript
from dstack_emu.simulator.seed import DEFAULT_SEED, Entropy, Seed
from dstack_emu.stack import Stack
from dstack_emu.transport.events import LOGGERS
from dstack_emu.transport.ports import PORTS
from dstack_emu.transport.secrets import Secrets

DESCRIPTION = (
    "Run the five test cases of dstack's runbook for KMS self authorization, on a fresh stack that the command "
    "starts, or on one that runs elsewhere, through public interfaces and the two policy files, or transactions. Exit "
    "0 if every case passes, 1 if a check fails, 2 if the runbook cannot be run. " + WARNING
)

PATIENCE: Final = 60.0
LOGGED: Final = ("auth", "kms_emu", "simulator", "transport")


def _grpc_client(onboard_token: str) -> KmsClient:
    from dstack_emu.runbook.grpc_kms_client import GrpcKmsClient  # grpcio costs time and memory

    return GrpcKmsClient(onboard_token)


TRANSPORTS: Final[Mapping[str, Callable[[str], KmsClient]]] = {"prpc": PrpcKmsClient, "grpc": _grpc_client}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--seed",
        default=DEFAULT_SEED,
        metavar="TEXT",
        help="the seed of the stack that it starts; the same text gives the same evidence (%(default)s)",
    )
    where.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="run it on a fresh stack that runs elsewhere: stack.json in its state folder, or JSON with the same keys",
    )
    parser.add_argument(
        "--intel",
        action="store_true",
        help="with --against, judge a stack on real hardware: verify its evidence under Intel's production root",
    )
    parser.add_argument(
        "--deploy",
        action="store_true",
        help="deploy the two KMS into machines of a VMM, as the runbook does, and remove them at the end",
    )
    parser.add_argument(
        "--runbook-ports",
        action="store_true",
        help="with --deploy, use the runbook's ports for webhooks and KMS: 3101, 3102, 9301, 9302 (free ones)",
    )
    parser.add_argument(
        "--source-url", metavar="URL", help="the URL of kms-src as kms-dst reaches it, if it is another one"
    )
    parser.add_argument(
        "--wait", type=_seconds, default=PATIENCE, metavar="SECONDS", help="how long to wait for a KMS (%(default)g)"
    )
    add_kms_options(parser)
    parser.add_argument(
        "--auth",
        choices=AUTH_KINDS,
        help="what decides in the stack that it starts: policies (simple), or contracts on a chain of the stack (eth), "
        "which are changed by transactions; needs the extra `eth`",
    )
    add_tokens(parser)
    add_release(parser, "the dstack release of the stack, unless the one that runs elsewhere says its own")
    parser.add_argument(
        "--transport", choices=list(TRANSPORTS), default="prpc", help="how to call the KMS (%(default)s)"
    )
    parser.add_argument(
        "--evidence",
        metavar="PATH",
        help="write calls and answers, and a page that shows them: into an archive (.tar.gz), or into a folder if PATH "
        "is an empty one or ends with a slash",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, no more on stdout")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"a number of seconds expected, got {text!r:.40}")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Run the cases, report them, and write the evidence."""
    if arguments.source_url and not arguments.against:
        raise UsageError("--source-url is only for a stack that runs elsewhere: give --against, too")
    if arguments.intel and not arguments.against:
        raise UsageError("--intel is only for a stack that runs elsewhere: give --against, too")
    if arguments.against and arguments.auth:
        raise UsageError("--auth is for the stack that the command starts: leave out --against, or give it to `up`")
    if arguments.against and (arguments.kms or arguments.kms_wait):
        raise UsageError("--kms is for the stack that the command starts: leave out --against, or give it to `up`")
    if (arguments.onboard_token or arguments.source_token) and not arguments.against:
        raise UsageError("tokens are only for a stack that runs elsewhere: give --against, too")
    if arguments.kms and arguments.transport == "grpc":
        raise UsageError("--transport grpc needs gRPC listeners, which a KMS of --kms does not have: leave one out")
    _check_deploy(arguments)
    try:
        destination = None
        if path := arguments.evidence:
            destination = Destination(Path(path), is_folder=path.endswith("/"))
    except OSError as error:
        raise UsageError(f"--evidence: cannot write {arguments.evidence}: {error.strerror}") from error
    try:
        return asyncio.run(interruptible(_run(arguments, destination)))
    except (RunbookError, TargetError) as error:
        raise UsageError(str(error)) from error
    finally:
        if destination is not None:
            destination.discard()


def _check_deploy(arguments: argparse.Namespace) -> None:
    if arguments.runbook_ports and not arguments.deploy:
        raise UsageError("--runbook-ports is about the machines of --deploy: give --deploy, too")
    others = {"--against": arguments.against, "--kms": arguments.kms, "--transport grpc": arguments.transport == "grpc"}
    if arguments.deploy and (given := next((name for name, value in others.items() if value), None)):
        raise UsageError(f"--deploy deploys its own two KMS, which serve pRPC: leave out {given}, or --deploy")


async def _run(arguments: argparse.Namespace, destination: Destination | None) -> int:
    report = to_stderr() if arguments.json else to_stdout()
    calls = StepCalls()

    def on_step(step: Step) -> None:
        calls.note(step.name)
        report.step(step)

    transcript = Transcript(report.case, on_step, Secrets(*_tokens(arguments)))
    about: dict[str, Any] = {"emulator": EMULATOR, "transport": arguments.transport}
    by_grpc = arguments.transport == "grpc"
    if arguments.against:
        target = _target_elsewhere(arguments, by_grpc=by_grpc)
        about["upstream"] = (target.release or arguments.release).version
        await _run_cases(arguments, target, transcript, os.urandom)
        logs: dict[str, str] = {}
    else:
        about |= {"seed": arguments.seed, "upstream": arguments.release.version}
        about |= {"deploy": "machines of the VMM"} if arguments.deploy else {}
        about |= {"auth": arguments.auth} if arguments.auth else {}
        _let_logs_through()
        config = StackConfig.on_free_ports(
            seed=arguments.seed,
            release=arguments.release.name,
            fresh=True,
            grpc=by_grpc,
            kms=dict(arguments.kms),
            kms_wait=arguments.kms_wait,
            vmm=arguments.deploy,
            auth={} if arguments.auth is None else dict.fromkeys(SIDES, arguments.auth),
        )
        if arguments.runbook_ports:
            webhooks = {name: PORTS[name] for name in ("auth-src", "auth-dst")}
            config = replace(config, ports={**config.ports, **webhooks})
        async with Stack(config, progress=lambda text: say(f"… {text}")) as stack:
            calls.journal = stack.control.journal
            entropy = Seed.of(arguments.seed).child("runbook").stream("client")
            if arguments.deploy:
                target, lines = await _run_deployed(arguments, stack, transcript, entropy)
            else:
                target = _target_of(stack)
                await _run_cases(arguments, target, transcript, entropy)
                lines = {name: stack.log_lines(name, logging.INFO) for name in stack.services}
            logs = {f"logs/{name}.log": normalised_log(each, target.names) for name, each in lines.items()}
    report.summary(transcript)
    if destination is not None:
        _write(destination, transcript, target, about, {CALLS: _json(calls.document(transcript.seen))}, logs)
        say(f"Evidence: {destination.path}")
    if arguments.json:
        document = json.dumps({**about, "ok": transcript.ok, "cases": transcript.to_json()})
        print(transcript.secrets.redact(document), flush=True)
    return 0 if transcript.ok else 1


def _target_elsewhere(arguments: argparse.Namespace, *, by_grpc: bool) -> Target:
    """Read the description of --against; refuse real hardware without --intel, which trusts Intel's root alone."""
    target = Target.load(arguments.against, source_url=arguments.source_url, by_grpc=by_grpc)
    if arguments.intel:
        return replace(target, anchor=TrustAnchor.intel(), root=INTEL)
    if target.pccs is not None:  # without one, nothing is verified
        advice = "of an emulated stack are expected, or --intel, which judges real hardware"
        require_emulated(target.anchor, target.pccs, f"in {arguments.against}, root_ca and services.pccs {advice}")
    return target


def _tokens(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the tokens; none for a stack that the command starts, which demands none."""
    return tokens(arguments) if arguments.against else ("", "")


async def _run_cases(arguments: argparse.Namespace, target: Target, transcript: Transcript, entropy: Entropy) -> None:
    onboard_token, source_token = _tokens(arguments)
    for url in target.urls:
        transcript.secrets.learn(urlsplit(url).password or "")
    kms_client = TRANSPORTS[arguments.transport](onboard_token)
    async with RunbookRun(
        target,
        kms_client,
        transcript,
        entropy=entropy,
        clock=wall_clock,
        patience=arguments.wait,
        source_token=source_token,
    ) as run:
        await run_cases(run)


async def _run_deployed(
    arguments: argparse.Namespace, stack: Stack, transcript: Transcript, entropy: Entropy
) -> tuple[Target, dict[str, list[str]]]:
    """Run the cases on two KMS that are deployed for it; return the target and the lines of the logs by name."""
    vmm, deployed = Vmm(stack.services["vmm"], arguments.wait), {}
    try:
        for side in SIDES:
            say(f"… deploying kms-{side}")
            port = PORTS[f"kms-{side}"] if arguments.runbook_ports else 0
            deployed[side] = await vmm.deploy(f"kms-{side}", stack.services[f"auth-{side}"], port)
        target = _target_of(stack, deployed)
        await _run_cases(arguments, target, transcript, entropy)
        lines = {
            name: stack.log_lines(name, logging.INFO)
            for name in stack.services
            if not name.startswith(("kms-", "agent-"))
        }
        lines |= {f"kms-{side}": await vmm.log(kms.vm_id) for side, kms in deployed.items()}
        for kms in deployed.values():
            await vmm.remove(kms.vm_id)
    finally:
        await vmm.close()
    return target, lines


def _target_of(stack: Stack, deployed: Mapping[str, DeployedKms] = MappingProxyType({})) -> Target:
    """Return the target of our own stack, from the description that it would print, with the KMS that are deployed."""
    description = stack.description()
    for side, kms in deployed.items():
        description["services"] = {**description["services"], f"kms-{side}": kms.url}
    if deployed:
        description["source_url"] = deployed["src"].source_url
    addresses = {urlsplit(url).netloc: name for name, url in description["services"].items()}
    inside = {f"{HOST_IN_GUEST}:{kms.port}": f"{HOST_IN_GUEST}:KMS-{side}" for side, kms in deployed.items()}
    names = {
        **addresses,
        **inside,
        **{target: name for name, target in stack.grpc.items()},
        str(stack.state): "STATE",
    }
    return Target.of(description, "the stack", stack.state, names, by_grpc=stack.config.grpc)


def _let_logs_through() -> None:
    """Let the parts' logs reach the evidence, and stderr only as far as the verbosity says."""
    root = logging.getLogger()
    for handler in root.handlers:
        handler.setLevel(max(handler.level, root.level))
    for name in LOGGED:
        logging.getLogger(LOGGERS + name).setLevel(min(logging.INFO, root.level))


def _json(document: Any) -> str:
    return json.dumps(document, indent=2) + "\n"


def _write(
    destination: Destination,
    transcript: Transcript,
    target: Target,
    about: dict[str, Any],
    calls: Mapping[str, str],
    logs: Mapping[str, str],
) -> None:
    document = {**about, "ok": transcript.ok, "cases": transcript.to_json(with_times=False)}
    files = {**transcript.files, **calls, REPORT: _json(document)}
    named = {name: transcript.secrets.redact(normalised(text, target.names)) for name, text in files.items()}
    try:
        destination.write(evidence_files({**named, **logs}, {**about, "ok": transcript.ok}))
    except OSError as error:
        raise UsageError(f"--evidence: cannot write {destination.path}: {error.strerror}") from error
