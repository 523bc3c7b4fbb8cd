"""Writes a record of the journal as a sequence diagram in Mermaid, which many places show that take Markdown.

Texts are written so that none can be syntax: what is no letter, digit or harmless sign becomes Mermaid's entity code, a
`#`, the character's number and a `;`. A colon is one of them: Mermaid takes `wrap:` at the beginning of a text for an
option, and `style…:…#…;` for a style. A diagram is never longer than what Mermaid draws: texts are cut, and what has no
place is left out and counted. Source: Mermaid's page on sequence diagrams, its grammar `sequenceDiagram.jison`,
`encodeEntities` in `utils.ts`, and `maxTextSize` in `config.schema.yaml`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final

from dstack_emu.observability.record import Record, flattened
from dstack_emu.observability.record_text import compared_lines, outcome_text, short, verification_text
from dstack_emu.observability.sequence_diagram import shown_inner

_SPECIAL = re.compile(r"[^\w \-.,/()\[\]]", re.ASCII)
"""Characters that may mean something in Mermaid or in HTML."""
_NEW_LINE: Final = "<br/>"
_NOTHING: Final = "(empty)"
_MAX_LENGTH: Final = 50_000
"""Characters of a diagram; of a longer one Mermaid shows only that it is too long."""
_RESERVED: Final = 100
"""Characters for the line that counts what was left out."""


def mermaid(record: Record) -> Iterator[str]:
    """Yield the lines of a diagram of a call with the calls that it caused, in order: 50,000 characters at most."""
    lines, left = list(_lines(record)), _MAX_LENGTH - _RESERVED
    for number, line in enumerate(lines):
        left -= len(line) + 1
        if left < 0:
            yield f"  Note over p0: {len(lines) - number} further lines are left out"
            return
        yield line


def _lines(record: Record) -> Iterator[str]:
    names = dict.fromkeys(
        name for each in flattened(record) if "call" in each for name in (each["caller"], each["service"])
    )
    ids = {name: f"p{index}" for index, name in enumerate(names)}  # a name may be a word of Mermaid
    yield "sequenceDiagram"
    caller, service, call, outcome = map(
        _text, (record["caller"], record["service"], record["call"], outcome_text(record))
    )
    yield f"  accTitle: {caller} to {service} {call}#58; {outcome}"
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
    return _SPECIAL.sub(lambda match: f"#{ord(match[0])};", short(text) or _NOTHING)
