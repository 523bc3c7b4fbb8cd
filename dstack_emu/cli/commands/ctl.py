"""`dstack-emu ctl`: call the control API of a running stack."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from dstack_emu.cli.commands import ctl_calls as calls
from dstack_emu.cli.commands.common import say
from dstack_emu.cli.commands.control_client import Api, ControlRefusedError, find_control
from dstack_emu.cli.commands.policy_subject import add_subject
from dstack_emu.deployment.config import TOKEN_FILE, TOKEN_VARIABLE

DESCRIPTION = (
    "Call the control API of a running stack. The stack is named by --url, by --state, or by the environment variables "
    "DSTACK_EMU_CONTROL (URL) or DSTACK_EMU_STATE (folder); otherwise its default port is used. `ctl tail` shows each "
    "call when it ends; `ctl COMMAND --help` explains a command. If the call is refused, the exit status is 1, and the "
    "reason is on stderr."
)

EXAMPLES: Final = """\
examples:
  dstack-emu ctl tail                                   each call, and why it was refused
  dstack-emu ctl why                                    the last denial, and the change that allows it
  dstack-emu ctl trace 3 --svg                          a picture of call 3, and of what it led to
  dstack-emu ctl policy deny src app                    revoke the app
  dstack-emu ctl platform 'host of app' --set tcb_status=OutOfDate
  dstack-emu ctl vendor --set collateral_until=2026-06-01
  dstack-emu ctl clock set 2026-06-02
  dstack-emu ctl fault service=auth-src kind=hang       the webhook hangs, until `ctl fault clear`
  dstack-emu ctl fault service=auth-src script='["allow","deny","500"]'
  dstack-emu ctl guest add other && dstack-emu ctl policy allow src other && dstack-emu ctl guest boot other
  dstack-emu ctl kms add third webhook=src && dstack-emu ctl policy allow src kms-third
  dstack-emu ctl kms onboard third                      from kms-src, after the line before
  dstack-emu ctl snapshot before; dstack-emu ctl revert before; dstack-emu ctl reset
  dstack-emu ctl save state.json; dstack-emu ctl load state.json
"""


_Act = Callable[[Api, argparse.Namespace], Any]
_AddCommand = Callable[[str, str, _Act], argparse.ArgumentParser]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options and the commands."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", metavar="URL", help="the control API's URL, as `up` prints it")
    where.add_argument("--state", type=Path, metavar="DIR", help="the folder given to `up --state`")
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help="the token of a stack that listens elsewhere than on a loopback address "
        f"(default: {TOKEN_VARIABLE}, or the file {TOKEN_FILE} in the state folder)",
    )
    choice = parser.add_subparsers(dest="do", title="commands", required=True, metavar="COMMAND")

    def command(name: str, text: str, act: _Act) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = choice.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made.set_defaults(act=act)
        return made

    _add_observation(command)
    _add_policy(command)
    _add_conditions(command)
    _add_parts(command)
    _add_state(command)


def _add_observation(command: _AddCommand) -> None:
    """Add the commands that show the stack and its calls."""
    command("info", "show the stack and all its parts, as JSON", lambda api, a: api.get("/stack"))
    env = command("env", "print the variables that `exec` sets, for this stack, as NAME=VALUE lines", calls.env)
    env.add_argument("--export", action="store_true", help='as commands for a shell: eval "$(… ctl env --export)"')
    command("health", "check that every service answers", calls.health)

    tail = command("tail", "show each call as it ends, with the calls that it caused", calls.tail)
    tail.add_argument("-n", "--last", type=int, default=10, metavar="N", help="first show this many past calls (10)")
    tail.add_argument("--no-follow", action="store_true", help="show the past calls, and end")
    tail.add_argument("--short", action="store_true", help="one line for each call, without the calls that it caused")
    tail.add_argument("--json", action="store_true", help="JSON lines, as in the file of `up --journal`")

    trace = command("trace", "show one call with the calls that it caused, or draw it as a picture", calls.trace)
    trace.add_argument("id", metavar="ID", help="the number of the call, as `tail` shows it")
    pictures = trace.add_mutually_exclusive_group()
    pictures.add_argument("--svg", action="store_true", help="a sequence diagram (SVG), which loads nothing")
    pictures.add_argument(
        "--mermaid", action="store_true", help="the same in Mermaid, for texts such as a pull request's"
    )

    why = command("why", "say why a webhook denied a boot, and which change allows it", calls.why)
    why.add_argument("id", nargs="?", metavar="ID", help="the number of a call, as `tail` shows it (the last denial)")
    why.add_argument("--json", action="store_true", help="as JSON, with the acts or the JSON Patch of the change")

    journal = command("journal", "show the calls that match (JSON), count them, or remove all", calls.journal)
    journal.add_argument("verb", nargs="?", choices=("find", "count", "clear"), default="find")
    journal.add_argument(
        "matching",
        nargs="*",
        type=calls.pair,
        metavar="KEY=PATTERN",
        help="call=, service=, caller=, outcome=, since=",
    )


def _add_policy(command: _AddCommand) -> None:
    """Add the command about policies."""
    policy = command(
        "policy", "show a policy; allow or deny a trust domain in it; replace it with a file", calls.policy
    )
    policy.add_argument("verb", choices=("show", "allow", "deny", "set"))
    policy.add_argument("side", help="the KMS whose webhook has it: src, dst, or an added KMS")
    policy.add_argument("what", nargs="?", help="trust domain (app, kms-dst, …), or a file for `set` (- for stdin)")
    policy.add_argument("--this-device-only", action="store_true", help="allow it only on its own platform")
    add_subject(policy)


def _add_conditions(command: _AddCommand) -> None:
    """Add the commands about platforms, their vendor, the clock and faults."""
    platform = command("platform", "show every platform or one; change its state; add one", calls.platform)
    platform.add_argument("name", nargs="?", help="such as 'host of app'")
    _add_settings(
        platform,
        "tcb_status, advisory_ids, module_status, module_advisory_ids, pck_revoked, other_root, recovery_status, …",
    )
    platform.add_argument("--new", action="store_true", help="add a platform of that name")

    vendor = command("vendor", "show or change the vendor's state, for all platforms", calls.vendor)
    _add_settings(
        vendor,
        "qe_status, qe_advisory_ids, pck_ca_revoked, collateral_until=DATE, tcb_recovery=early, collateral=expired, …",
    )

    clock = command("clock", "show the clock, or set, advance, freeze, resume it", calls.clock)
    verbs = ("show", "set", "advance", "freeze", "resume", "wall")
    clock.add_argument("verb", nargs="?", choices=verbs, default="show")
    clock.add_argument("value", nargs="?", help="2026-06-01T12:00:00Z to set and freeze, 12h or 30d to advance")

    fault = command("fault", "show the faults, add one (KEY=VALUE …), or `clear` one or all", calls.fault)
    words = "KEY=VALUE | clear [ID]"
    fault.add_argument("--later", action="store_true", help="its service, call or caller may be added later")
    fault.add_argument("words", nargs="*", metavar=words, help="service=auth-src kind=hang times=2 …")


def _add_parts(command: _AddCommand) -> None:
    """Add the commands about trust domains, KMS and the gateway."""
    gateway = command("gateway", "show the gateway and its instances; let one be gone; set a TXT record", calls.gateway)
    gateway.add_argument("verb", nargs="?", choices=("show", "end-handshake", "txt"), default="show")
    gateway.add_argument("what", nargs="?", metavar="ID|NAME", help="instance id for `end-handshake`, domain for `txt`")
    gateway.add_argument("value", nargs="?", help="for `txt`: the record, <app or instance id>:<port>; none deletes it")

    guest = command("guest", "show, add, boot or remove a trust domain", calls.guest)
    guest.add_argument("verb", nargs="?", choices=("list", "show", "add", "boot", "event", "remove"), default="list")
    guest.add_argument("name", nargs="?")
    pairs: dict[str, Any] = {"nargs": "*", "type": calls.pair, "metavar": "KEY=VALUE"}
    guest.add_argument(
        "fields", **pairs, help="add: app_id=, platform=, compose=@FILE …; boot: kms=; event: event=NAME payload=HEX"
    )

    kms = command("kms", "show, add, onboard, restart or remove a KMS", calls.kms)
    verbs = ("list", "show", "add", "onboard", "restart", "remove")
    kms.add_argument("verb", nargs="?", choices=verbs, default="list")
    kms.add_argument("name", nargs="?")
    kms.add_argument("fields", **pairs, help="add: webhook=URL …; onboard: source=src, or source=null for new keys")


def _add_state(command: _AddCommand) -> None:
    """Add the commands about the state of the whole stack, and any other call."""
    for name, text in (("snapshot", "take a snapshot of the stack"), ("revert", "restore a snapshot")):
        made = command(name, text, calls.snapshot if name == "snapshot" else calls.revert)
        made.add_argument("name", nargs="?", default="snapshot")
    command("reset", "restore the state in which the stack became ready", lambda api, a: api.send("POST", "/reset", {}))
    command("save", "write the stack's state to a file", calls.save).add_argument("file", type=Path)
    command("load", "restore the state in a file", calls.load).add_argument("file", type=Path)

    call = command("call", "make any call of the API (GET /openapi.json lists them)", calls.call)
    call.add_argument("method", choices=("GET", "POST", "PUT", "PATCH", "DELETE"))
    call.add_argument("path")
    call.add_argument("body", nargs="?", type=_json, help="JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and print the answer."""
    try:
        answer = arguments.act(Api(*find_control(arguments.url, arguments.state, arguments.token)), arguments)
        if answer is not None and answer != {}:
            print(answer if isinstance(answer, str) else json.dumps(answer, indent=2), flush=True)
    except ControlRefusedError as error:
        say(f"Error: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        return 0  # it ends `tail`
    return 0


# ---- arguments


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"JSON expected ({error})") from error


def _add_settings(parser: argparse.ArgumentParser, known: str) -> None:
    parser.add_argument("--set", action="append", default=[], type=calls.pair, metavar="KEY=VALUE", help=known)
