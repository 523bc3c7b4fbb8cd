"""HTTP statuses in words, as upstream's programs have them, whichever Python this is.

Source: Rust's `http` crate, src/status.rs at 1.3.1. Python's own words are the same but for a few, some of which later
versions of it changed.
"""

from http import HTTPStatus
from typing import Final

_OTHERWISE: Final = {
    203: "Non Authoritative Information",
    413: "Payload Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    418: "I'm a teapot",
    422: "Unprocessable Entity",
}
UNKNOWN: Final = "<unknown status code>"


def reason_phrase(status: int) -> str:
    """What a status is called; `UNKNOWN` where it has no name."""
    try:
        return _OTHERWISE.get(status) or HTTPStatus(status).phrase
    except ValueError:
        return UNKNOWN


def status_line(status: int) -> str:
    """Number and name, as upstream's errors show a status."""
    return f"{status} {reason_phrase(status)}"
