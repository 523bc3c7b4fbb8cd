"""The reason phrases of HTTP statuses in upstream's programs, independent of the Python version.

Source: Rust's `http` crate, src/status.rs at 1.3.1. Python's phrases differ for a few statuses, some of them only in
later versions.
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
    """Return the phrase of a status; `UNKNOWN` if it has none."""
    try:
        return _OTHERWISE.get(status) or HTTPStatus(status).phrase
    except ValueError:
        return UNKNOWN


def status_line(status: int) -> str:
    """Return number and phrase, as upstream's errors show a status."""
    return f"{status} {reason_phrase(status)}"
