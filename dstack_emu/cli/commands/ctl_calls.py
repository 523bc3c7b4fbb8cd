"""The calls of the control API that `dstack-emu ctl` makes: a function for each command, which returns what to print.

An answer that is not text is printed as JSON, and None is not printed. Each raises `ControlRefusedError` if the stack
refuses, and `UsageError` if the arguments do not make a call.
"""

import argparse
import json
import os
import shlex
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.alias_generators import to_camel

from dstack_emu.auth.policy import Policy
from dstack_emu.auth.spelling import unread_keys
from dstack_emu.cli.commands.common import UsageError, say
from dstack_emu.cli.commands.control_client import Api, ControlRefusedError
from dstack_emu.cli.commands.policy_subject import subject
from dstack_emu.deployment.environment import environment
from dstack_emu.observability.mermaid import mermaid
from dstack_emu.observability.record_text import texts
from dstack_emu.observability.sequence_diagram import sequence_diagram
from dstack_emu.observability.svg import svg
from dstack_emu.transport.files import replace_file_durably


def pair(text: str) -> tuple[str, Any]:
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


def _name(arguments: argparse.Namespace) -> str:
    if not arguments.name:
        raise UsageError(f"ctl {arguments.do} {arguments.verb}: a name expected; `ctl {arguments.do}` lists the names")
    return urllib.parse.quote(arguments.name, safe="")


def env(api: Api, arguments: argparse.Namespace) -> str:
    """Return the variables that `exec` sets, as lines NAME=VALUE or as commands for a shell."""
    variables = environment(api.get("/stack"), api.token)
    if arguments.export:
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
    return "\n".join(f"{name}={value}" for name, value in variables.items())


def health(api: Api, arguments: argparse.Namespace) -> str:
    """Return `ready`, or refuse with what is wrong with each service."""
    answers: dict[str, str] = api.get("/stack/health")
    if wrong := {name: said for name, said in answers.items() if said != "ok"}:
        raise ControlRefusedError("; ".join(wrong.values()))
    return "ready"


def tail(api: Api, arguments: argparse.Namespace) -> None:
    """Print the calls that have ended and, unless told not to, those that end from now on."""
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


def trace(api: Api, arguments: argparse.Namespace) -> str:
    """Return one record as text or as a picture."""
    record = api.get(f"/journal/{urllib.parse.quote(arguments.id, safe='')}")
    if (arguments.svg or arguments.mermaid) and "call" not in record:
        raise UsageError(f"ctl trace: record {arguments.id} is a verification: the call around it expected")
    if arguments.svg:
        return svg(sequence_diagram(record)).rstrip()
    if arguments.mermaid:
        return "\n".join(mermaid(record))
    return "\n".join(texts([record], colours=False))


def why(api: Api, arguments: argparse.Namespace) -> Any:
    """Return why webhooks denied what they did in one call, or the last denial of all, as text or as JSON."""
    number = arguments.id
    if number is None:
        found = api.get("/journal?outcome=denied&limit=1")["records"]
        if not found:
            return (
                []
                if arguments.json
                else "The journal has no denial: `dstack-emu ctl tail` shows the calls that it has."
            )
        number = found[0]["id"]
    denials = api.get(f"/journal/{urllib.parse.quote(number, safe='')}/why")["denials"]
    if arguments.json:
        return denials
    return "\n\n".join("\n".join(_denial(each)) for each in denials) or f"No webhook denied anything in call {number}."


def _denial(explained: dict[str, Any]) -> Iterator[str]:
    decision = explained["decision"]
    yield f"{explained['id']}: {explained['service']} denied {explained['call']}: {decision.get('reason', '')}"
    change = explained.get("change")
    if obstacle := explained.get("problem") or explained.get("no_change_because"):
        yield f"  {obstacle}"
        yield from ["  It was asked about:"] if decision.get("asked") else []
        for name, value in decision.get("asked", {}).items():
            yield f"    {to_camel(name)} {', '.join(value) if isinstance(value, list) else value}".rstrip()
    elif change is None:
        yield "  It would be allowed now."
    else:
        yield "  The smallest change that admits it:"
        yield from (f"    {line}" for line in change["diff"].splitlines())


def _following(api: Api, position: int, past: list[Any], *, follow: bool) -> Iterator[Any]:
    yield from past
    if follow:
        yield from api.events(f"/journal/stream?since={position}")


def journal(api: Api, arguments: argparse.Namespace) -> Any:
    """Return the records that match, or their number, or remove all."""
    if arguments.verb == "clear":
        return api.send("DELETE", "/journal")
    query = urllib.parse.urlencode(arguments.matching)
    if arguments.verb == "count":
        return str(api.get(f"/journal/count?{query}")["calls"])
    return api.get(f"/journal?{query}")["records"]


def policy(api: Api, arguments: argparse.Namespace) -> Any:
    """Return a policy, or change it."""
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


def platform(api: Api, arguments: argparse.Namespace) -> Any:
    """Return platforms, add one, or change its state."""
    if not arguments.name:
        if arguments.set or arguments.new:
            raise UsageError("ctl platform: a name expected; `ctl platform` lists the names")
        return api.get("/platforms")
    path = f"/platforms/{urllib.parse.quote(arguments.name, safe='')}"
    made = api.send("PUT", path, {}) if arguments.new else None
    if arguments.set:
        return api.send("PATCH", path, dict(arguments.set))
    return made or api.get(path)


def vendor(api: Api, arguments: argparse.Namespace) -> Any:
    """Return or change the vendor's state."""
    return api.send("PATCH", "/vendor", dict(arguments.set)) if arguments.set else api.get("/vendor")


def clock(api: Api, arguments: argparse.Namespace) -> Any:
    """Return or change the clock."""
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


def gateway(api: Api, arguments: argparse.Namespace) -> Any:
    """Return the gateway, let it have heard nothing of an instance, or change a TXT record."""
    verb, what, value = arguments.verb, arguments.what, arguments.value
    if verb == "show":
        if what:
            raise UsageError(f"ctl gateway show takes nothing else, got {what!r:.60}")
        return api.get("/gateway")
    if not what:
        raise UsageError(f"ctl gateway {verb}: {'a domain name' if verb == 'txt' else 'an instance id'} expected")
    path = urllib.parse.quote(what, safe="")
    if verb == "txt":
        if value is None:
            return api.send("DELETE", f"/gateway/txt/{path}")
        return api.send("PUT", f"/gateway/txt/{path}", {"value": value})
    if value is not None:
        raise UsageError(f"ctl gateway end-handshake takes one instance id, got {value!r:.60} too")
    return api.send("POST", f"/gateway/instances/{path}/end-handshake", {})


def fault(api: Api, arguments: argparse.Namespace) -> Any:
    """Return faults, add one, or lift them."""
    words = arguments.words
    if not words:
        return api.get("/faults")
    if words[0] == "clear":
        for fault in words[1:]:
            api.send("DELETE", f"/faults/{urllib.parse.quote(fault, safe='')}")
        return None if words[1:] else api.send("DELETE", "/faults")
    try:
        return api.send("POST", "/faults", dict(map(pair, words)) | ({"later": True} if arguments.later else {}))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"ctl fault: {error}") from error


def guest(api: Api, arguments: argparse.Namespace) -> Any:
    """Return trust domains, or change one."""
    return _one_of(api, arguments, "/guests", {"boot": "boot", "event": "events"})


def kms(api: Api, arguments: argparse.Namespace) -> Any:
    """Return KMS, or change one."""
    return _one_of(api, arguments, "/kms", {"onboard": "onboard", "restart": "restart"})


def _one_of(api: Api, arguments: argparse.Namespace, path: str, changes: Mapping[str, str]) -> Any:
    """List, show, add or delete what is below a path, or change it: `changes` has the last part of the path by verb."""
    verb, fields = arguments.verb, dict(arguments.fields)
    if verb == "list":
        return api.get(path)
    if verb == "add":
        return api.send("POST", path, {"name": arguments.name, **fields})
    one = f"{path}/{_name(arguments)}"
    if verb == "show":
        return api.get(one)
    return api.send("POST", f"{one}/{changes[verb]}", fields) if verb in changes else api.send("DELETE", one)


def snapshot(api: Api, arguments: argparse.Namespace) -> None:
    """Take a snapshot."""
    api.send("POST", "/snapshots", {"name": arguments.name})


def revert(api: Api, arguments: argparse.Namespace) -> None:
    """Restore a snapshot."""
    api.send("POST", f"/snapshots/{urllib.parse.quote(arguments.name, safe='')}/revert", {})


def save(api: Api, arguments: argparse.Namespace) -> None:
    """Write the state of the stack to a file."""
    text = json.dumps(api.get("/state"), indent=1) + "\n"
    try:
        if arguments.file.exists() and not arguments.file.is_file():
            arguments.file.write_text(text)  # a terminal or a pipe, say
        else:
            replace_file_durably(arguments.file.resolve(), text.encode(), 0o600)  # it contains private keys
    except OSError as error:
        raise UsageError(f"{arguments.file} cannot be written: {error.strerror}") from error


def load(api: Api, arguments: argparse.Namespace) -> None:
    """Restore the state in a file."""
    api.send("PUT", "/state", _read_json(str(arguments.file)))


def call(api: Api, arguments: argparse.Namespace) -> Any:
    """Make the call that the arguments spell out."""
    body = arguments.body
    if body is None and arguments.method in ("POST", "PUT", "PATCH"):
        body = {}
    return api.send(arguments.method, arguments.path, body)
