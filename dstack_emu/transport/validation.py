"""Formats pydantic's validation errors: each problem with the path to its value."""

from pydantic import ValidationError


def problems(error: ValidationError, *, document: str = "") -> list[str]:
    """Return each problem as `path: message`; `document`, if given, is the path of the whole document."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return [": ".join(filter(None, (".".join(map(str, f["loc"])) or document, f["msg"]))) for f in faults]


def describe(error: ValidationError) -> str:
    """Return all problems on one line, without pydantic's prefix for our own checks."""
    return "; ".join(problem.replace("Value error, ", "", 1) for problem in problems(error))
