"""All cases, in the order in which they run."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from dstack_emu.attest.release import Release
from dstack_emu.kms_check.case import Case
from dstack_emu.kms_check.cases.authorization import AUTHORIZATION, FIRST_CALL
from dstack_emu.kms_check.cases.bootstrap import BOOTSTRAP
from dstack_emu.kms_check.cases.evidence import EVIDENCE
from dstack_emu.kms_check.cases.handover import AS_RECEIVER, AS_SOURCE
from dstack_emu.kms_check.cases.images import IMAGES
from dstack_emu.kms_check.cases.keys import KEYS
from dstack_emu.kms_check.cases.onboarding import ONBOARDING
from dstack_emu.kms_check.cases.platforms import PLATFORMS
from dstack_emu.kms_check.cases.requests import REQUESTS
from dstack_emu.kms_check.errors import UnusableError

CASES: Final[Sequence[Case]] = tuple(
    case
    for cases in (
        BOOTSTRAP,
        FIRST_CALL,
        AUTHORIZATION,
        EVIDENCE,
        IMAGES,
        PLATFORMS,
        REQUESTS,
        KEYS,
        AS_SOURCE,
        ONBOARDING,
        AS_RECEIVER,
    )
    for case in cases.cases
)


def select(patterns: Iterable[str], release: Release) -> list[Case]:
    """Return the cases of a release whose names fit one of the patterns; all of them without patterns.

    Raises `UnusableError` for a pattern that fits none.
    """
    cases, wanted = [case for case in CASES if case.applies(release)], list(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise UnusableError(unknown(pattern, release))
    return [case for case in cases if not wanted or any(fnmatchcase(case.name, pattern) for pattern in wanted)]


def unknown(name: str, release: Release) -> str:
    """Say that no case has a name or fits a pattern, with the nearest name."""
    near = difflib.get_close_matches(name, [case.name for case in CASES], n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    return f"no case of release {release.name} is named {name!r:.80}: {advice}--list prints all names"
