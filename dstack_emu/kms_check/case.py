"""Cases: what a KMS must refuse or release, each with a name that stays the same."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from dstack_emu.attest.release import Release
from dstack_emu.kms_check.trial import Trial

Stage = Literal["bootstrap", "keyed", "runtime", "onboard", "onboarded"]
"""When a case runs: on a fresh KMS, before it is bootstrapped; once it has keys, before its first call; after that. On
a second KMS, which is to receive keys; and after it has received them."""

Act = Callable[[Trial], Awaitable[None]]


def _always(_release: Release) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Case:
    """One case: `group/name`, a sentence that says what it proves, its stage, and the calls.

    `applies` says for which releases of dstack it is meant. Without `is_followed` no success is required after it,
    because the case contains one itself.
    """

    name: str
    about: str
    stage: Stage
    act: Act
    applies: Callable[[Release], bool] = _always
    is_followed: bool = True

    @property
    def group(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]


class CaseList:
    """The cases of one stage, in the order in which they were added."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.cases: list[Case] = []

    def add(
        self,
        name: str,
        about: str,
        act: Act,
        *,
        applies: Callable[[Release], bool] = _always,
        is_followed: bool = True,
    ) -> None:
        """Add a case."""
        self.cases.append(Case(name, about, self._stage, act, applies, is_followed))

    def case(
        self, name: str, about: str, *, applies: Callable[[Release], bool] = _always, is_followed: bool = True
    ) -> Callable[[Act], Act]:
        """Add the decorated function as a case."""

        def note(act: Act) -> Act:
            self.add(name, about, act, applies=applies, is_followed=is_followed)
            return act

        return note
