"""Renders a record of the journal as text: a line for the call from outside, and below it the calls that it caused."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from dstack_emu.observability.record import Record

COLOURS: Final = {"ok": "32", "denied": "31", "refused": "31", "unanswered": "33", "dim": "2"}
SHOWN_ERROR_LENGTH: Final = 200
"""Characters of an error in a line, and of a text in Mermaid."""
SHOWN_VALUES: Final = 3
"""Values of a policy that are shown below what was got."""


def texts(records: Iterable[Record], *, colours: bool = False, details: bool = True) -> Iterator[str]:
    """Yield the lines of each record, with the date before those of another day: a stack's clock can jump."""
    paint, day = _paint if colours else _plain, ""
    for record in records:
        shown = list(lines(record, colours=colours, details=details))
        if (today := record.get("time", day)[:10]) != day:
            shown.insert(0, paint("dim", f"── {today}"))
            day = today
        yield from shown


def lines(record: Record, *, colours: bool = False, details: bool = True) -> Iterator[str]:
    """Yield the lines of a record; without `details`, only the first one."""
    paint = _paint if colours else _plain
    if "rewound_to" in record:
        yield paint("dim", f"── back to record {record['rewound_to']}")
        return
    if "lost" in record:
        yield paint("dim", f"── {record['lost']} records were lost: this reads more slowly than calls end")
        return
    head = f"{record['id']:>4} {record['time'][11:23]}  "
    yield head + _call(record, paint) + paint("dim", f"  {record['ms']} ms" if record["ms"] else "")
    if not details:
        return
    if "released" in record:
        yield paint("dim", f"       released {_release(record['released'])}")
    for inner in record.get("inner", ()):
        yield from _inner(inner, 1, paint)


def _inner(record: Record, depth: int, paint: Any) -> Iterator[str]:
    margin = "     " + "  " * depth
    if "call" in record:
        yield margin + _call(record, paint)
        if "released" in record:
            yield margin + paint("dim", f"  released {_release(record['released'])}")
        shown = record.get("inner", ())
    else:
        holds = record.get("attestation") == "holds"
        device = f", device {record['device_id'][:12]}…" if holds else ""
        yield margin + paint("ok" if holds else "refused", verification_text(record) + device)
        # Requests for collateral that succeeded are left out.
        shown = [inner for inner in record.get("inner", ()) if inner.get("outcome") != "ok" or "fault" in inner]
    for inner in shown:
        yield from _inner(inner, depth + 1, paint)


def _call(record: Record, paint: Any) -> str:
    text = f"{record['caller']} → {record['service']} {record['call']}"
    return f"{text}  {paint(record['outcome'], result_text(record))}"


def verification_text(record: Record) -> str:
    """Return what came of a verification of evidence, on one line."""
    verdict = record.get("attestation", "not verified")
    if verdict != "holds":
        return f"evidence {verdict}: {short(record.get('error', ''))}"
    return " ".join([f"evidence holds: {record['tcb_status']}", *record["advisory_ids"]])


def outcome_text(record: Record) -> str:
    """Return what came of a call, on one line that begins with the outcome; `compared_lines` has the rest."""
    outcome, text = record["outcome"], _result(record)
    if text.startswith(outcome):
        return text
    return f"{outcome}: {text}"


def compared_lines(record: Record) -> list[str]:
    """Return the rule by which a webhook denied, and below it what it got and what the policy has, one value a line."""
    decision = record.get("decision")
    if decision is None or decision["allowed"] is True:
        return []
    said = [("rule", decision["rule"])] if decision.get("rule") else []
    if mismatch := decision.get("mismatch"):
        wanted = _values(mismatch["allowed"])
        said.append(("field", mismatch["field"]))
        said += [("got", value) for value in _values(mismatch["got"])]
        said += [("wanted", value) for value in wanted[:SHOWN_VALUES]]
        if len(wanted) > SHOWN_VALUES:
            said.append(("wanted", f"… and {len(wanted) - SHOWN_VALUES} more"))
    return [f"{name:<6} {short(value.removeprefix('0x'))}" for name, value in said]  # hex digits below hex digits


def result_text(record: Record) -> str:
    """Return what came of a call, on one line: the decision, the verdict, the refusal or the status, and the fault."""
    decision, compared = record.get("decision"), ""
    if decision is not None:
        compared += f" [{decision['rule']}]" if decision.get("rule") not in (None, "", "allowed") else ""
        if mismatch := decision.get("mismatch"):
            got, allowed = ", ".join(_values(mismatch["got"])), ", ".join(_values(mismatch["allowed"]))
            compared += f"; {mismatch['field']} {got}, the policy has {allowed}"
    return _result(record, compared) + _said_by_chain(record.get("chain") or {})


def _result(record: Record, compared: str = "") -> str:
    outcome, status = record["outcome"], record.get("grpc", record["status"])
    decision, result = record.get("decision"), ""
    if decision is not None:
        reason = decision.get("reason") or "no reason given"
        result = ("allowed" if decision["allowed"] is True else f"denied: {reason}") + compared
    elif verdict := record.get("verdict"):
        result = f"valid: app {verdict['app_id']}" if verdict["is_valid"] else f"not valid: {short(verdict['reason'])}"
    elif record.get("error"):
        result = short(record["error"] if status is None else f"{status} {record['error']}")
    elif outcome == "unanswered":
        result = "no answer"
    else:
        result = str(status)
    if fault := record.get("fault"):
        result += f" (fault {fault['id']}: {fault['kind']})"
    return result


def _said_by_chain(said: dict[str, Any]) -> str:
    """Return what a node answered, after the status, which is 200 for its refusals, too; nothing if it said nothing."""
    function, block = said.get("function"), said.get("block")
    asked = "".join([f" {function}" if function else "", f" at {block}" if block else ""])
    if "error" in said:
        return f"{asked} error: {short(said['error'])}"
    if "result" not in said:
        return asked
    return f"{asked}{':' if asked else ''} {short(json.dumps(said['result'], ensure_ascii=False))}"


def _release(released: dict[str, Any]) -> str:
    to = released["to"]
    receiver = "the caller" if to is None else f"app {to['app_id']}"
    return f"{', '.join(released['fields'])} to {receiver}"


def _values(values: str | list[str]) -> list[str]:
    return ([values] if isinstance(values, str) else list(values)) or ["none"]


def short(text: str) -> str:
    """Return a text on one line, cut to SHOWN_ERROR_LENGTH characters."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_ERROR_LENGTH else text[: SHOWN_ERROR_LENGTH - 1] + "…"


def _paint(name: str, text: str) -> str:
    return f"\033[{COLOURS[name]}m{text}\033[0m" if text else text


def _plain(_name: str, text: str) -> str:
    return text
