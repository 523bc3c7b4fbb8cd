"""Renders a record of the journal as text: a line for the call from outside, and below it the calls that it caused."""

from collections.abc import Iterable, Iterator
from typing import Any, Final

from dstack_emu.observability.journal import Record

COLOURS: Final = {"ok": "32", "denied": "31", "refused": "31", "unanswered": "33", "dim": "2"}
SHOWN_ERROR_LENGTH: Final = 200
"""Characters of an error in a line."""


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
        verdict = record.get("attestation", "not verified")
        if verdict == "holds":
            advisories = f" {' '.join(record['advisory_ids'])}" if record["advisory_ids"] else ""
            text = f"evidence holds: {record['tcb_status']}{advisories}, device {record['device_id'][:12]}…"
        else:
            text = f"evidence {verdict}: {_short(record.get('error', ''))}"
        yield margin + paint("ok" if verdict == "holds" else "refused", text)
        # Requests for collateral that succeeded are left out.
        shown = [inner for inner in record.get("inner", ()) if inner.get("outcome") != "ok" or "fault" in inner]
    for inner in shown:
        yield from _inner(inner, depth + 1, paint)


def _call(record: Record, paint: Any) -> str:
    text = f"{record['caller']} → {record['service']} {record['call']}"
    return f"{text}  {paint(record['outcome'], result_text(record))}"


def result_text(record: Record) -> str:
    """Return what came of a call, on one line: the decision, the verdict, the refusal or the status, and the fault."""
    outcome, status = record["outcome"], record.get("grpc", record["status"])
    decision, result = record.get("decision"), ""
    if decision is not None:
        reason = decision.get("reason") or "no reason given"
        result = "allowed" if decision["allowed"] is True else f"denied: {reason}"
        result += f" [{decision['rule']}]" if decision.get("rule") not in (None, "", "allowed") else ""
        if mismatch := decision.get("mismatch"):
            got, allowed = _listed(mismatch["got"]), _listed(mismatch["allowed"])
            result += f"; {mismatch['field']} {got}, the policy has {allowed}"
    elif verdict := record.get("verdict"):
        result = f"valid: app {verdict['app_id']}" if verdict["is_valid"] else f"not valid: {_short(verdict['reason'])}"
    elif record.get("error"):
        result = _short(record["error"] if status is None else f"{status} {record['error']}")
    elif outcome == "unanswered":
        result = "no answer"
    else:
        result = str(status)
    if fault := record.get("fault"):
        result += f" (fault {fault['id']}: {fault['kind']})"
    return result


def _release(released: dict[str, Any]) -> str:
    to = released["to"]
    receiver = "the caller" if to is None else f"app {to['app_id']}"
    return f"{', '.join(released['fields'])} to {receiver}"


def _listed(values: str | list[str]) -> str:
    return (values if isinstance(values, str) else ", ".join(values)) or "none"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_ERROR_LENGTH else text[: SHOWN_ERROR_LENGTH - 1] + "…"


def _paint(name: str, text: str) -> str:
    return f"\033[{COLOURS[name]}m{text}\033[0m" if text else text


def _plain(_name: str, text: str) -> str:
    return text
