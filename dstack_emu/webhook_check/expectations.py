"""A file that says what a webhook is to answer, where that is not what dstack's auth servers answer.

JSON: the name of a request, or a pattern with `*`, and `allowed`, `denied`, `error`, `refused` (either of the two) or
`any`. Of several patterns the last counts.
"""

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, get_args

from dstack_emu.webhook_check.sample_requests import SampleError

Wanted = Literal["allowed", "denied", "error", "refused", "any"]
WANTED: Final[tuple[Wanted, ...]] = get_args(Wanted)


def parse_expectations(document: Any) -> Mapping[str, Wanted]:
    """Read the parsed file; raise `SampleError` for a value that is none."""
    if not isinstance(document, Mapping):
        raise SampleError(f"an object expected, got {type(document).__name__}")
    return {str(name): _wanted(str(name), value) for name, value in document.items()}


def _wanted(name: str, value: Any) -> Wanted:
    for each in WANTED:
        if each == value:
            return each
    raise SampleError(f"{name}: {', '.join(WANTED)} expected, got {value!r:.40}")


def resolve(expectations: Mapping[str, Wanted], names: Iterable[str]) -> Mapping[str, Wanted]:
    """Return what is expected for each name; raise `SampleError` for a pattern that none of them fits."""
    known, found = list(names), dict[str, Wanted]()
    for pattern, wanted in expectations.items():
        fitting = [name for name in known if fnmatchcase(name, pattern)]
        if not fitting:
            near = difflib.get_close_matches(pattern, known, n=1)
            advice = f"did you mean {near[0]!r}? " if near else ""
            raise SampleError(f"no request is named {pattern!r:.80}: {advice}--list prints all names")
        found |= dict.fromkeys(fitting, wanted)
    return found


def is_met(wanted: Wanted, outcome: str) -> bool:
    """Return whether an answer is what is expected."""
    return wanted in ("any", outcome) or (wanted == "refused" and outcome in ("denied", "error"))
