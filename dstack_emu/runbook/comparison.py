"""A denial in the evidence page: what the webhook got, and below it what its policy had, byte under byte."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Final

from dstack_emu.observability.record import Record, flattened
from dstack_emu.runbook.markup import Markup, tag

GROUP: Final = 8
"""Hex digits between two blanks: four bytes."""
SHOWN_VALUES: Final = 5


def decisions(records: Iterable[Record]) -> Iterator[Record]:
    """Yield each call of a webhook that decided, inner calls too."""
    return (each for record in records for each in flattened(record) if each.get("decision") is not None)


def denial(record: Record) -> Markup:
    """Show by which rule a webhook denied, what it got and what its policy had."""
    decision = record["decision"]
    rule = decision.get("rule") or "none is named"
    what = [tag("p", f"{record['service']} denied {record['caller']}: ", tag("strong", decision.get("reason") or "…"))]
    what.append(tag("p", "Rule: ", tag("code", rule)))
    if decision.get("chain_error"):
        what.append(tag("p", f"The chain gave no decision: {decision['chain_error']}"))
    if mismatch := decision.get("mismatch"):
        what.append(_table(record, mismatch))
    return tag("div", what, class_="denial")


def asked(record: Record) -> Markup | None:
    """Show what a webhook was asked: the measured values of a boot."""
    decision = record["decision"]
    if not decision.get("asked"):
        return None
    said = "allowed" if decision["allowed"] is True else "denied"
    rows = [(tag("dt", name), tag("dd", plain(value), class_="mono")) for name, value in decision["asked"].items()]
    summary = tag("summary", f"What {record['service']} was asked by {record['call']}, and {said}")
    return tag("details", summary, tag("dl", rows))


def plain(value: Any) -> str:
    """Return a value of JSON as text; a list as its members, and in words that there is nothing."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value not in ("", None) else "empty"


def _table(record: Record, mismatch: dict[str, Any]) -> Markup:
    field, allowed = mismatch["field"], mismatch["allowed"]
    wanted_of = [allowed] if isinstance(allowed, str) else list(allowed)
    got_of = [mismatch["got"]] if isinstance(mismatch["got"], str) else list(mismatch["got"]) or [""]
    rows = []
    for got in got_of:
        own = _pieces(got)
        wanted = sorted(wanted_of, key=lambda one: (-_likeness(own, _pieces(one)), one))
        rows.append(_row("got", own, _pieces(wanted[0]) if wanted else None))
        rows += [_row("wanted", _pieces(each), own) for each in wanted[:SHOWN_VALUES]]
        if len(wanted) > SHOWN_VALUES:
            rows.append(
                tag("tr", tag("th", "wanted", scope="row"), tag("td", f"and {len(wanted) - SHOWN_VALUES} more"))
            )
        if not wanted:
            rows.append(tag("tr", tag("th", "wanted", scope="row"), tag("td", "nothing: the policy lists none")))
    caption = tag("caption", f"{field}: what {record['service']} got, and what its policy had; marked bytes differ")
    table = tag("table", caption, tag("tbody", rows))
    return tag("div", table, class_="scroll", tabindex="0", role="group", aria_label=f"{field}: got and wanted")


def _pieces(text: str) -> list[str]:
    """Return the bytes of hex as pairs of digits; the characters of another text."""
    bare = text.lower().removeprefix("0x")
    if len(bare) >= 2 and len(bare) % 2 == 0 and not set(bare) - set("0123456789abcdef"):
        return textwrap.wrap(bare, 2)
    return list(text)


def _likeness(one: list[str], other: list[str]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


def _row(name: str, own: list[str], other: list[str] | None) -> Markup:
    return tag("tr", tag("th", name, scope="row"), tag("td", list(_marked(own, other)) or "empty", class_="mono"))


def _marked(own: list[str], other: list[str] | None) -> Iterator[str]:
    """Yield the pieces, those marked that differ from the other's; after four bytes is a blank."""
    is_hex = len(own) > 1 and all(len(piece) == 2 for piece in own)
    run, state = "", False
    for index, piece in enumerate(own):
        differs = other is None or index >= len(other) or other[index] != piece
        if differs != state and run:
            yield tag("mark", run) if state else run
            run = ""
        state = differs
        run += piece + (" " if is_hex and index % 4 == 3 and index + 1 < len(own) else "")
    if run:
        yield tag("mark", run) if state else run
