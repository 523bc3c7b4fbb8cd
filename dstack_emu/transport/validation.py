"""Formats pydantic's validation errors: each problem with the path to its value."""

import difflib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EXTRA: Final = "extra_forbidden"
"""pydantic's type of that problem."""

UNKNOWN_KEY: Final = "unknown key"
"""The message for a key that a document must not have; pydantic's is about "extra inputs"."""
_NEAR: Final = 0.65
"""How similar a name must be that is suggested, from 0 to 1: with 0.6, `repeat` is near `path`."""


def problems(error: ValidationError, *, document: str = "") -> list[str]:
    """Return each problem as `path: message`; `document`, if given, is the path of the whole document."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return [": ".join(filter(None, (".".join(map(str, f["loc"])) or document, _message(f)))) for f in faults]


def _message(fault: "ErrorDetails") -> str:
    return UNKNOWN_KEY if fault["type"] == EXTRA else fault["msg"]


def describe(error: ValidationError, known: Collection[str] = ()) -> str:
    """Return all problems on one line, without pydantic's prefix for our own checks.

    `known` are the keys of the document; for an unknown key, the nearest of them is named, or all if none is near.
    """
    told = "; ".join(problem.replace("Value error, ", "", 1) for problem in problems(error))
    unknown = [f["loc"][0] for f in error.errors(include_url=False) if f["type"] == EXTRA and len(f["loc"]) == 1]
    return told + "".join(_advice(str(key), known) for key in unknown[:1] if known)


def _advice(name: str, known: Collection[str]) -> str:
    return suggestion(name, known) or f"; known: {', '.join(known)}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the known name that is nearest to a name; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=_NEAR)
    return f"; did you mean {near[0]!r}?" if near else ""
