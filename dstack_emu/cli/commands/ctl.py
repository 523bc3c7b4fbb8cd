"""`dstack-emu ctl`: call the control API of a running stack."""

import argparse
import json
import os
import shlex
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from dstack_emu.auth.policy import Policy
from dstack_emu.auth.spelling import unread_keys
from dstack_emu.cli.commands.common import UsageError, say
from dstack_emu.cli.commands.control_client import Api, ControlRefusedError, find_control
from dstack_emu.cli.commands.policy_subject import add_subject, subject
from dstack_emu.deployment.config import TOKEN_FILE, TOKEN_VARIABLE
from dstack_emu.deployment.environment import environment
from dstack_emu.observability.record_text import texts

DESCRIPTION = (
    "Call the control API of a running stack. The stack is named by --url, by --state, or by the environment variables "
    "DSTACK_EMU_CONTROL (URL) or DSTACK_EMU_STATE (folder); otherwise its default port is used. `ctl tail` shows each "
    "call when it ends; `ctl COMMAND --help` explains a command. If the call is refused, the exit status is 1, and the "
    "reason is on stderr."
)

EXAMPLES: Final = """\
examples:
  dstack-emu ctl tail                                   each call, and why it was refused
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

    def command(name: str, text: str, act: Callable[[Api, argparse.Namespace], Any]) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = choice.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made.set_defaults(act=act)
        return made

    command("info", "show the stack and all its parts, as JSON", lambda api, a: api.get("/stack"))
    env = command("env", "print the variables that `exec` sets, for this stack, as NAME=VALUE lines", _env)
    env.add_argument("--export", action="store_true", help='as commands for a shell: eval "$(… ctl env --export)"')
    command("health", "check that every service answers", _health)

    tail = command("tail", "show each call as it ends, with the calls that it caused", _tail)
    tail.add_argument("-n", "--last", type=int, default=10, metavar="N", help="first show this many past calls (10)")
    tail.add_argument("--no-follow", action="store_true", help="show the past calls, and end")
    tail.add_argument("--short", action="store_true", help="one line for each call, without the calls that it caused")
    tail.add_argument("--json", action="store_true", help="JSON lines, as in the file of `up --journal`")

    journal = command("journal", "show the calls that match (JSON), count them, or remove all", _journal)
    journal.add_argument("verb", nargs="?", choices=("find", "count", "clear"), default="find")
    journal.add_argument(
        "matching", nargs="*", type=_pair, metavar="KEY=PATTERN", help="call=, service=, caller=, outcome=, since="
    )

    policy = command("policy", "show a policy; allow or deny a trust domain in it; replace it with a file", _policy)
    policy.add_argument("verb", choices=("show", "allow", "deny", "set"))
    policy.add_argument("side", help="the KMS whose webhook has it: src, dst, or an added KMS")
    policy.add_argument("what", nargs="?", help="trust domain (app, kms-dst, …), or a file for `set` (- for stdin)")
    policy.add_argument("--this-device-only", action="store_true", help="allow it only on its own platform")
    add_subject(policy)

    platform = command("platform", "show every platform or one; change its state; add one", _platform)
    platform.add_argument("name", nargs="?", help="such as 'host of app'")
    _add_settings(
        platform,
        "tcb_status, advisory_ids, module_status, module_advisory_ids, pck_revoked, other_root, recovery_status, …",
    )
    platform.add_argument("--new", action="store_true", help="add a platform of that name")

    vendor = command("vendor", "show or change the vendor's state, for all platforms", _vendor)
    _add_settings(
        vendor,
        "qe_status, qe_advisory_ids, pck_ca_revoked, collateral_until=DATE, tcb_recovery=early, collateral=expired, …",
    )

    clock = command("clock", "show the clock, or set, advance, freeze, resume it", _clock)
    verbs = ("show", "set", "advance", "freeze", "resume", "wall")
    clock.add_argument("verb", nargs="?", choices=verbs, default="show")
    clock.add_argument("value", nargs="?", help="2026-06-01T12:00:00Z to set and freeze, 12h or 30d to advance")

    fault = command("fault", "show the faults, add one (KEY=VALUE …), or `clear` one or all", _fault)
    words = "KEY=VALUE | clear [ID]"
    fault.add_argument("--later", action="store_true", help="its service, call or caller may be added later")
    fault.add_argument("words", nargs="*", metavar=words, help="service=auth-src kind=hang times=2 …")

    guest = command("guest", "show, add, boot or remove a trust domain", _guest)
    guest.add_argument("verb", nargs="?", choices=("list", "show", "add", "boot", "event", "remove"), default="list")
    guest.add_argument("name", nargs="?")
    pairs: dict[str, Any] = {"nargs": "*", "type": _pair, "metavar": "KEY=VALUE"}
    guest.add_argument("fields", **pairs, help="add: app_id=, platform=, compose=@FILE …; boot: kms=")

    kms = command("kms", "show, add, onboard, restart or remove a KMS", _kms)
    verbs = ("list", "show", "add", "onboard", "restart", "remove")
    kms.add_argument("verb", nargs="?", choices=verbs, default="list")
    kms.add_argument("name", nargs="?")
    kms.add_argument("fields", **pairs, help="add: webhook=URL …; onboard: source=src, or source=null for new keys")

    for name, text in (("snapshot", "take a snapshot of the stack"), ("revert", "restore a snapshot")):
        made = command(name, text, _snapshot if name == "snapshot" else _revert)
        made.add_argument("name", nargs="?", default="snapshot")
    command("reset", "restore the state in which the stack became ready", lambda api, a: api.send("POST", "/reset", {}))
    command("save", "write the stack's state to a file", _save).add_argument("file", type=Path)
    command("load", "restore the state in a file", _load).add_argument("file", type=Path)

    call = command("call", "make any call of the API (GET /openapi.json lists them)", _call)
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


def _pair(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE for argparse. A value in JSON is parsed; @FILE stands for the text of a file."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"KEY=VALUE expected, got {text!r:.60}")
    if value.startswith("@"):
        try:
            return key, Path(value[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"{key}: cannot read {value[1:]} ({error})") from error
    try:
        parsed = json.loads(value)
    except ValueError:
        return key, value
    # A number of many digits is hex without letters, such as an app id.
    return key, value if isinstance(parsed, int | float) and len(value) > 15 else parsed


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"JSON expected ({error})") from error


def _add_settings(parser: argparse.ArgumentParser, known: str) -> None:
    parser.add_argument("--set", action="append", default=[], type=_pair, metavar="KEY=VALUE", help=known)


def _name(arguments: argparse.Namespace) -> str:
    if not arguments.name:
        raise UsageError(f"ctl {arguments.do} {arguments.verb}: a name expected; `ctl {arguments.do}` lists the names")
    return urllib.parse.quote(arguments.name, safe="")


# ---- commands


def _env(api: Api, arguments: argparse.Namespace) -> str:
    variables = environment(api.get("/stack"), api.token)
    if arguments.export:
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
    return "\n".join(f"{name}={value}" for name, value in variables.items())


def _health(api: Api, arguments: argparse.Namespace) -> str:
    answers: dict[str, str] = api.get("/stack/health")
    if wrong := {name: said for name, said in answers.items() if said != "ok"}:
        raise ControlRefusedError("; ".join(wrong.values()))
    return "ready"


def _tail(api: Api, arguments: argparse.Namespace) -> None:
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    past = api.get(f"/journal?limit={max(arguments.last, 0)}")
    records = _following(api, past["position"], past["records"], follow=not arguments.no_follow)
    shown = (
        (json.dumps(record, separators=(",", ":")) for record in records)
        if arguments.json
        else texts(records, colours=colours, details=not arguments.short)
    )
    for line in shown:
        print(line, flush=True)


def _following(api: Api, position: int, past: list[Any], *, follow: bool) -> Iterator[Any]:
    yield from past
    if follow:
        with api.open("GET", f"/journal/stream?since={position}") as stream:
            for line in stream:
                yield json.loads(line)


def _journal(api: Api, arguments: argparse.Namespace) -> Any:
    if arguments.verb == "clear":
        return api.send("DELETE", "/journal")
    query = urllib.parse.urlencode(arguments.matching)
    if arguments.verb == "count":
        return str(api.get(f"/journal/count?{query}")["calls"])
    return api.get(f"/journal?{query}")["records"]


def _policy(api: Api, arguments: argparse.Namespace) -> Any:
    path = f"/policies/{urllib.parse.quote(arguments.side, safe='')}"
    if arguments.verb == "show":
        policy = api.get(path)
        for warning in unread_keys(policy, Policy):
            say(f"Warning: {warning}")
        return policy
    if arguments.verb == "set":
        if not arguments.what:
            raise UsageError("ctl policy set: a file expected (- for stdin)")
        return api.send("PUT", path, _read_json(arguments.what))
    body = subject(arguments)
    if arguments.verb == "allow":
        body["this_device_only"] = arguments.this_device_only
    return api.send("POST", f"{path}/{arguments.verb}", body)


def _read_json(name: str) -> Any:
    try:
        return json.loads(sys.stdin.read() if name == "-" else Path(name).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: JSON expected ({error})") from error


def _platform(api: Api, arguments: argparse.Namespace) -> Any:
    if not arguments.name:
        if arguments.set or arguments.new:
            raise UsageError("ctl platform: a name expected; `ctl platform` lists the names")
        return api.get("/platforms")
    path = f"/platforms/{urllib.parse.quote(arguments.name, safe='')}"
    made = api.send("PUT", path, {}) if arguments.new else None
    if arguments.set:
        return api.send("PATCH", path, dict(arguments.set))
    return made or api.get(path)


def _vendor(api: Api, arguments: argparse.Namespace) -> Any:
    return api.send("PATCH", "/vendor", dict(arguments.set)) if arguments.set else api.get("/vendor")


def _clock(api: Api, arguments: argparse.Namespace) -> Any:
    verb, value = arguments.verb, arguments.value
    if verb == "show":
        return api.get("/clock")
    if verb in ("set", "advance") and value is None:
        raise UsageError(
            f"ctl clock {verb}: a value expected, such as "
            + ("2026-06-01T12:00:00Z" if verb == "set" else "12h or 30d")
        )
    if verb in ("resume", "wall") and value is not None:
        raise UsageError(f"ctl clock {verb} takes no value, got {value!r:.60}")
    return api.send("POST", "/clock", {{"wall": "follow_the_wall"}.get(verb, verb): True if value is None else value})


def _fault(api: Api, arguments: argparse.Namespace) -> Any:
    words = arguments.words
    if not words:
        return api.get("/faults")
    if words[0] == "clear":
        for fault in words[1:]:
            api.send("DELETE", f"/faults/{urllib.parse.quote(fault, safe='')}")
        return None if words[1:] else api.send("DELETE", "/faults")
    try:
        return api.send("POST", "/faults", dict(map(_pair, words)) | ({"later": True} if arguments.later else {}))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"ctl fault: {error}") from error


def _guest(api: Api, arguments: argparse.Namespace) -> Any:
    fields = dict(arguments.fields)
    match arguments.verb:
        case "list":
            return api.get("/guests")
        case "show":
            return api.get(f"/guests/{_name(arguments)}")
        case "add":
            return api.send("POST", "/guests", {"name": arguments.name, **fields})
        case "boot":
            return api.send("POST", f"/guests/{_name(arguments)}/boot", fields)
        case "event":
            return api.send("POST", f"/guests/{_name(arguments)}/events", fields)
    return api.send("DELETE", f"/guests/{_name(arguments)}")


def _kms(api: Api, arguments: argparse.Namespace) -> Any:
    fields = dict(arguments.fields)
    match arguments.verb:
        case "list":
            return api.get("/kms")
        case "show":
            return api.get(f"/kms/{_name(arguments)}")
        case "add":
            return api.send("POST", "/kms", {"name": arguments.name, **fields})
        case "onboard":
            return api.send("POST", f"/kms/{_name(arguments)}/onboard", fields)
        case "restart":
            return api.send("POST", f"/kms/{_name(arguments)}/restart", fields)
    return api.send("DELETE", f"/kms/{_name(arguments)}")


def _snapshot(api: Api, arguments: argparse.Namespace) -> None:
    api.send("POST", "/snapshots", {"name": arguments.name})


def _revert(api: Api, arguments: argparse.Namespace) -> None:
    api.send("POST", f"/snapshots/{urllib.parse.quote(arguments.name, safe='')}/revert", {})


def _save(api: Api, arguments: argparse.Namespace) -> None:
    text = json.dumps(api.get("/state"), indent=1) + "\n"
    try:
        arguments.file.touch(mode=0o600)  # it contains private keys
        arguments.file.write_text(text)
    except OSError as error:
        raise UsageError(f"{arguments.file} cannot be written: {error.strerror}") from error


def _load(api: Api, arguments: argparse.Namespace) -> None:
    api.send("PUT", "/state", _read_json(str(arguments.file)))


def _call(api: Api, arguments: argparse.Namespace) -> Any:
    body = arguments.body
    if body is None and arguments.method in ("POST", "PUT", "PATCH"):
        body = {}
    return api.send(arguments.method, arguments.path, body)
