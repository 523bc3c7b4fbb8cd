"""The allow list: cases that a KMS is known not to pass, each with the reason.

It is a JSON object of names and reasons, or lines of a name and a reason, in which `#` begins a comment.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dstack_emu.attest.release import Release
from dstack_emu.kms_check.catalogue import CASES, unknown
from dstack_emu.kms_check.errors import UnusableError
from dstack_emu.kms_check.runner import Result


def parse_allowed(text: str, release: Release) -> Mapping[str, str]:
    """Read an allow list; raise `UnusableError` for a name that no case has, or without a reason."""
    allowed = _of_json(text) if text.lstrip().startswith("{") else _of_lines(text)
    names = {case.name for case in CASES}
    for name, reason in allowed.items():
        if name not in names:
            raise UnusableError(unknown(name, release))
        if not reason.strip():
            raise UnusableError(f"{name}: a reason expected: why this KMS may depart from it")
    return allowed


def _of_json(text: str) -> dict[str, str]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"JSON cannot be read from it: {error}") from error
    for name, reason in document.items():
        if not isinstance(reason, str):
            raise UnusableError(f"{name}: a text, the reason, expected, got {reason!r:.40}")
    return dict(document)


def _of_lines(text: str) -> dict[str, str]:
    lines = [line.strip() for line in text.splitlines()]
    words = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return {name: reason.strip() for name, _, reason in words}


def with_allowed(result: Result, allowed: Mapping[str, str]) -> Result:
    """Return a result that is not a failure if its case is on the list."""
    reason = allowed.get(result.case.name)
    if reason is None or result.outcome != "FAIL":
        return result
    return replace(result, outcome="allowed", said=f"{reason} ({result.said})")


def needless(results: Sequence[Result], allowed: Mapping[str, str]) -> list[str]:
    """Return the names on the list whose cases pass."""
    return [each.case.name for each in results if each.case.name in allowed and each.outcome in ("pass", "warning")]
