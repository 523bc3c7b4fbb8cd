"""Formats pydantic's validation errors: each problem with the path to its value."""

from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

UNKNOWN_KEY: Final = "unknown key"
"""The message for a key that a document must not have; pydantic's is about "extra inputs"."""


def problems(error: ValidationError, *, document: str = "") -> list[str]:
    """Return each problem as `path: message`; `document`, if given, is the path of the whole document."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return [": ".join(filter(None, (".".join(map(str, f["loc"])) or document, _message(f)))) for f in faults]


def _message(fault: "ErrorDetails") -> str:
    return UNKNOWN_KEY if fault["type"] == "extra_forbidden" else fault["msg"]


def describe(error: ValidationError) -> str:
    """Return all problems on one line, without pydantic's prefix for our own checks."""
    return "; ".join(problem.replace("Value error, ", "", 1) for problem in problems(error))
