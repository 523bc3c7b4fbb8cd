"""Descriptions of evidence: plain data (dicts, lists, texts, numbers, bytes, dates, `Named`) in the protocol's words.

`cli.commands.inspect` renders them for a terminal. A part that cannot be read is replaced by a text that says why.
"""

import datetime
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from cryptography import x509

from dstack_emu.attest.certificate import UNREADABLE
from dstack_emu.attest.errors import AttestError, FormatError

Description = dict[str, Any]
MAX_NESTING: Final = 32
UNREAD: Final = "cannot be read: "
UNKNOWN_NAME: Final = "?"


@dataclass(frozen=True, slots=True)
class Named:
    """A number of the protocol and its name."""

    value: int
    name: str


def as_json(value: Any) -> Any:
    """Return a description as JSON can hold it: bytes in hex, dates in ISO 8601, a `Named` as {value, name}."""
    if isinstance(value, dict):
        return {key: as_json(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(child) for child in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime.datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%SZ")
    return asdict(value) if isinstance(value, Named) else value


def load_json(text: str | bytes) -> Any:
    """Parse JSON of bounded depth; raise `FormatError` for anything else."""
    try:
        # Numbers with a point occur in none of these documents; kept as text, not one of them is infinite.
        value = json.loads(text, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise FormatError(str(error)) from error
    level = [value]
    for _ in range(MAX_NESTING):
        nested = [one for one in level if isinstance(one, (dict, list))]
        level = [child for one in nested for child in (one.values() if isinstance(one, dict) else one)]
    if any(isinstance(one, (dict, list)) for one in level):
        raise FormatError(f"at most {MAX_NESTING} levels of JSON expected, got more")
    return value


def attempt(read: Callable[[], Any]) -> Any:
    """Read a field; return a text if it is malformed."""
    try:
        return read()
    except (*UNREADABLE, x509.ExtensionNotFound, AttestError) as error:
        return f"{UNREAD}{error}"
