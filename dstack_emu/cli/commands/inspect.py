"""`dstack-emu inspect`: identify a file, and show its contents."""

import argparse
import datetime
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.cli.commands.common import UsageError
from dstack_emu.cli.terminal import BOLD, GREEN, RED, YELLOW, paint, printable, wants_colour
from dstack_emu.inspection.description import UNKNOWN_NAME, UNREAD, Description, Named, as_json
from dstack_emu.inspection.finding import Finding
from dstack_emu.inspection.identify import MAX_INPUT_SIZE, inspect_input

DESCRIPTION = (
    "Show a quote, a versioned attestation, certificates, a signing request, collateral, an event log, an app-compose, "
    "a boot info, or an answer that has one of them inside, in binary, hex, base64, PEM or JSON. Nothing is verified: "
    "`dstack-emu verify` does that."
)

WIDTH: Final = 100
LABEL: Final = 28
"""Characters of a name at most."""
COLUMNS: Final = 12
"""Columns of a table at most."""
HEX_DIGITS: Final = 64
"""Digits in a line: a register of 48 bytes takes two."""
LONGEST: Final = 640
"""Characters of a value that are shown; --json has all of them."""

_HEADINGS: Final = {
    "td_report": "TD report",
    "qe_report": "QE report",
    "pck_certificate": "PCK certificate",
    "pck_chain": "PCK chain",
    "vm_config": "VM config",
    "certificates": "Certificate",
    "parts": "Part",
    "tcbInfo": "TCB info",
    "tcb_info_issuer_chain": "TCB info's issuer chain",
    "enclaveIdentity": "QE identity",
    "qe_identity_issuer_chain": "QE identity's issuer chain",
    "crl": "CRL",
    "pck_crl": "PCK CRL",
    "pck_crl_issuer_chain": "PCK CRL's issuer chain",
    "root_ca_crl": "Root CA CRL",
}
_GOOD: Final = {
    "debug": False,
    "emulated": None,
    "stated_equals_quoted": True,
    "binds_it": True,
    "names_the_attestation_key": True,
    "signed_by_the_next": True,
    "device_id_is_sha256_of_ppid": True,
}
"""The right value of a field (None: both are right, and yes is highlighted)."""
_EMULATED: Final = "yes: EMULATED, it proves nothing"
_TONES: Final = {"equal": GREEN, "differs": RED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_input(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every value in full")


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add the file to read."""
    parser.add_argument("file", metavar="FILE", help="the file to read, - for standard input (at most 10 MiB)")


def run(arguments: argparse.Namespace) -> int:
    """Inspect the file and print the result."""
    data, found = read_input(arguments.file)
    if arguments.json:
        head = {"what": found.what, "sure": found.sure, "form": list(found.form), "size": len(data)}
        print(json.dumps(head | as_json(found.description)))
    else:
        colour = wants_colour(sys.stdout)
        lines = [paint(headline(found, len(data)), BOLD, colour), *render(found.description, colour)]
        if found.evidence:
            lines += ["", "Read, not verified: use `dstack-emu verify`."]
        print("\n".join(lines))
    return 0


# ---- pieces that `dstack-emu verify` shares


def read_input(name: str) -> tuple[bytes, Finding]:
    """Read a file (or standard input) and identify it; raise `UsageError` if that fails."""
    data = read_bytes(name)
    return data, identify(name, data)


def read_bytes(name: str) -> bytes:
    """Read a file (or standard input), at most one byte more than may be identified; raise `UsageError`."""
    try:
        if name == "-":
            return sys.stdin.buffer.read(MAX_INPUT_SIZE + 1)
        with Path(name).open("rb") as file:
            return file.read(MAX_INPUT_SIZE + 1)
    except OSError as error:
        raise UsageError(f"{printable(name)} cannot be read: {error.strerror or error}") from error


def identify(name: str, data: bytes) -> Finding:
    """Identify what was read from a file; raise `UsageError`, which names it."""
    try:
        return inspect_input(data)
    except FormatError as error:
        raise UsageError(printable(f"{'standard input' if name == '-' else name}: {error}")) from error


def headline(found: Finding, size: int) -> str:
    """Return what the input is, whether that is sure, and its form."""
    form = " of ".join(found.form) or "binary"
    return textwrap.fill(printable(f"{'' if found.sure else 'Looks like: '}{found.what}; {form}, {size} bytes"), WIDTH)


# ---- rendering


def render(description: Description, colour: bool) -> list[str]:
    """Render a description as lines of at most 100 columns: groups with headings, aligned names, tables."""
    return list(_group(description, 0, colour))


def _group(description: Description, indent: int, colour: bool) -> Iterator[str]:
    plain = [(printable(key)[:LABEL], key, value) for key, value in description.items() if not _is_nested(value)]
    width = max((len(label) for label, _, _ in plain), default=0)
    for label, key, value in plain:
        tone = _tone(key, value)
        said = _EMULATED if key == "emulated" and value is True else value
        first, *more = _value(said, WIDTH - indent - width - 2)
        yield f"{' ' * indent}{label:<{width}}  {paint(first, tone, colour)}"
        yield from (f"{' ' * (indent + width + 2)}{paint(line, tone, colour)}" for line in more)
    for key, value in description.items():
        if _is_nested(value):
            yield from _block(key, value, indent, colour)


def _is_nested(value: Any) -> bool:
    return bool(value) and (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)))


def _block(key: str, value: Any, indent: int, colour: bool) -> Iterator[str]:
    heading = _HEADINGS.get(key) or printable(key[:1].upper() + key[1:60]).replace("_", " ")
    inner = min(indent + 2, 16)
    if isinstance(value, dict):
        yield from ("", f"{' ' * indent}{paint(heading, BOLD, colour)}")
        yield from _group(value, inner, colour)
        return
    rows = [row for row in value if isinstance(row, dict)]
    view = _VIEWS.get(key)
    if view or not any(_is_nested(cell) for row in rows for cell in row.values()):
        yield from ("", f"{' ' * indent}{paint(heading, BOLD, colour)}")
        yield from _table([view(row) if view else row for row in rows], inner, colour)
        return
    for number, row in enumerate(rows, 1):
        yield from ("", f"{' ' * indent}{paint(f'{heading} {number} of {len(rows)}', BOLD, colour)}")
        yield from _group(row, inner, colour)


def _tone(key: str, value: Any) -> str:
    if isinstance(value, str) and value.startswith(UNREAD):
        return RED
    if not isinstance(value, bool) or key not in _GOOD:
        return ""
    if _GOOD[key] is None:
        return YELLOW if value else ""
    return GREEN if value == _GOOD[key] else RED


def _value(value: Any, width: int) -> list[str]:
    """Render one value as lines that are not longer than `width`."""
    width = max(width, 24)
    if isinstance(value, bytes):
        return _bytes(value, min(width, HEX_DIGITS))
    text = _words(value)
    suffix = f"… ({len(text)} characters)" if len(text) > LONGEST else ""
    return textwrap.wrap(text[:LONGEST] + suffix, width, drop_whitespace=True) or [""]


def _bytes(value: bytes, width: int) -> list[str]:
    if not value:
        return ["-"]
    if len(value) > 1 and not any(value):
        return [f"zero ({len(value)} bytes)"]
    width -= width % 2
    lines = [value.hex()[at : at + width] for at in range(0, 2 * min(len(value), LONGEST // 2), width)]
    return [*lines, f"… ({len(value)} bytes)"] if len(value) > LONGEST // 2 else lines


def _words(value: Any) -> str:
    """Render one value on one line."""
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case bytes():
            return value.hex() or "-"
        case Named():
            return f"{value.value:#x} ({value.name})" if value.value > 9 else f"{value.value} ({value.name})"
        case datetime.datetime():
            return value.strftime("%Y-%m-%dT%H:%M:%SZ")
        case list() | tuple():
            if all(isinstance(one, int) for one in value):
                return " ".join(map(str, value)) or "-"
            return ", ".join(map(_words, value)) or "-"
        case dict():
            return ", ".join(f"{printable(key)} {_words(one)}" for key, one in value.items()) or "-"
    return printable(str(value))


def _table(rows: Sequence[Description], indent: int, colour: bool) -> Iterator[str]:
    """Render rows as a table; if a line would be too long, the widest columns are cut."""
    names = list(dict.fromkeys(key for row in rows for key in row))[:COLUMNS]
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    heads = [printable(name)[:LABEL].replace("_", " ") for name in names]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH - indent and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1

    def line(texts: Sequence[str]) -> str:
        padded = [
            paint(f"{_cut(text, width):<{width}}", _TONES.get(text, ""), colour)
            for text, width in zip(texts, widths, strict=True)
        ]
        return f"{' ' * indent}{'  '.join(padded)}".rstrip()

    yield line(heads)
    yield from map(line, cells)


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return (value.hex() or "-") if len(value) <= 8 else f"{value.hex()[:12]}…"
    if isinstance(value, Named):
        return value.name if value.name != UNKNOWN_NAME else f"{value.value:#x}"
    return _words(value)[:LONGEST]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


# ---- rows of tables


def _event(row: Description) -> Description:
    agrees = row.get("digest_agrees")
    return {
        "#": row["index"],
        "IMR": row["imr"],
        "type": row["event_type"],
        "event": row["event"] + ("" if row["version"] == 1 else f" (v{row['version']})"),
        "payload": row["payload_text"] or row["payload"],
        "digest": f"{_cell(row['digest'])}{' WRONG' if agrees is False else ''}" if row["digest"] else "-",
    }


def _replay(row: Description) -> Description:
    return {key: row[key] for key in ("register", "events", "replayed", "quoted", "result")}


def _link(row: Description) -> Description:
    return {
        "subject": _common_name(row["subject"]),
        "issuer": _common_name(row["issuer"]),
        "not_after": row["not_after"],
        "sha256": row["sha256"],
    }


def _common_name(name: str) -> str:
    found = re.search(r"CN=((?:[^,\\]|\\.)*)", name)
    return found.group(1) if found else name


def _level(row: Description) -> Description:
    tcb = row.get("tcb")
    out = {"status": row.get("tcbStatus"), "date": str(row.get("tcbDate"))[:10]}
    if isinstance(tcb, dict):
        out |= {key.removesuffix("tcbcomponents"): _svns(value) for key, value in tcb.items()}
    return out | {"advisories": row.get("advisoryIDs")}


def _svns(value: Any) -> Any:
    """Return component SVNs in a row, without the zeros at their end; return anything else as it is."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return value
    numbers = [str(one.get("svn")) for one in value]
    while numbers[1:] and numbers[-1] == "0":
        numbers.pop()
    return ".".join(numbers)


def _module(row: Description) -> Description:
    levels = row.get("tcbLevels")
    statuses = [one.get("tcbStatus") for one in levels if isinstance(one, dict)] if isinstance(levels, list) else None
    return {key: value for key, value in row.items() if key != "tcbLevels"} | {"levels": statuses}


_VIEWS: Final[dict[str, Callable[[Description], Description]]] = {
    "event_log": _event,
    "replay": _replay,
    "pck_chain": _link,
    "tcb_info_issuer_chain": _link,
    "qe_identity_issuer_chain": _link,
    "pck_crl_issuer_chain": _link,
    "tcbLevels": _level,
    "tdxModuleIdentities": _module,
}
