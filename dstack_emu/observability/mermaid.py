"""Writes a record of the journal as a sequence diagram in Mermaid, which many places show that take Markdown.

Texts are written so that none can be syntax: what is no letter, digit or harmless sign becomes Mermaid's entity code, a
`#`, the character's number and a `;`. A colon is one of them: Mermaid takes `wrap:` at the beginning of a text for an
option, and `style…:…#…;` for a style. Source: Mermaid's page on sequence diagrams, its grammar
`sequenceDiagram.jison`, and `encodeEntities` in `utils.ts`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final

from dstack_emu.observability.record import Record, flattened
from dstack_emu.observability.record_text import compared_lines, outcome_text, verification_text
from dstack_emu.observability.sequence_diagram import shown_inner

_SPECIAL = re.compile(r"[^\w \-.,/()\[\]]", re.ASCII)
"""Characters that may mean something in Mermaid or in HTML."""
_NEW_LINE: Final = "<br/>"
_NOTHING: Final = "(empty)"


def mermaid(record: Record) -> Iterator[str]:
    """Yield the lines of a diagram of a call, with the calls that it caused in their order."""
    names = dict.fromkeys(
        name for each in flattened(record) if "call" in each for name in (each["caller"], each["service"])
    )
    ids = {name: f"p{index}" for index, name in enumerate(names)}  # a name may be a word of Mermaid
    yield "sequenceDiagram"
    label = f"{record['caller']} to {record['service']} {record['call']}: {outcome_text(record)}"
    yield f"  accTitle: {_text(label)}"
    yield from (f"  participant {identifier} as {_text(name)}" for name, identifier in ids.items())
    yield from _call(record, ids)


def _call(record: Record, ids: Mapping[str, str]) -> Iterator[str]:
    caller, service = ids[record["caller"]], ids[record["service"]]
    yield f"  {caller}->>{service}: {_text(record['call'])}"
    for inner in shown_inner(record):
        yield from _call(inner, ids) if "call" in inner else _verification(service, inner, ids)
    if compared := compared_lines(record):
        yield f"  Note over {service}: {_NEW_LINE.join(map(_text, compared))}"
    duration = f" ({record['ms']} ms)" if record["ms"] else ""
    arrow = "-->>" if record["outcome"] == "ok" else "--x"
    yield f"  {service}{arrow}{caller}: {_text(outcome_text(record))}{duration}"


def _verification(service: str, record: Record, ids: Mapping[str, str]) -> Iterator[str]:
    yield f"  Note right of {service}: {_text(verification_text(record))}"
    for inner in shown_inner(record):
        yield from _call(inner, ids)


def _text(text: str) -> str:
    return _SPECIAL.sub(lambda match: f"#{ord(match[0])};", " ".join(text.split()) or _NOTHING)
