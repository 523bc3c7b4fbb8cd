"""Writes a record of the journal as a sequence diagram in Mermaid, which many places show that take Markdown."""

import re
from collections.abc import Iterator, Mapping

from dstack_emu.observability.journal import Record, flattened
from dstack_emu.observability.record_text import result_text

_SPECIAL = re.compile(r"[^\w \-.,:/()\[\]]", re.ASCII)
"""Characters that may mean something in Mermaid or in HTML; they are written as entities of Mermaid."""


def mermaid(record: Record) -> Iterator[str]:
    """Yield the lines of a diagram of a call, with the calls that it caused in their order."""
    names = dict.fromkeys(
        name for each in flattened(record) if "call" in each for name in (each["caller"], each["service"])
    )
    ids = {name: f"p{index}" for index, name in enumerate(names)}  # a name may be a word of Mermaid
    yield "sequenceDiagram"
    yield from (f"  participant {identifier} as {_text(name)}" for name, identifier in ids.items())
    yield from _call(record, ids)


def _call(record: Record, ids: Mapping[str, str]) -> Iterator[str]:
    caller, service = ids[record["caller"]], ids[record["service"]]
    yield f"  {caller}->>{service}: {_text(record['call'])}"
    for inner in record.get("inner", ()):
        yield from _call(inner, ids) if "call" in inner else _verification(service, inner, ids)
    duration = f" ({record['ms']} ms)" if record["ms"] else ""
    arrow = "-->>" if record["outcome"] == "ok" else "--x"
    yield f"  {service}{arrow}{caller}: {_text(result_text(record))}{duration}"


def _verification(service: str, record: Record, ids: Mapping[str, str]) -> Iterator[str]:
    holds = record.get("attestation") == "holds"
    text = f"evidence holds: {record['tcb_status']}" if holds else f"evidence refused: {record.get('error', '')}"
    yield f"  Note right of {service}: {_text(text)}"
    for inner in record.get("inner", ()):
        if inner.get("outcome") != "ok" or "fault" in inner:
            yield from _call(inner, ids)


def _text(text: str) -> str:
    return _SPECIAL.sub(lambda match: f"#{ord(match[0])};", " ".join(text.split()))
