"""What a campaign is made of: acts, scripts, outcomes, and the world in which scripts run."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol


@dataclass(frozen=True)
class Act:
    """One step of a case: its name and its arguments, which are JSON. The report counts it as `counted` (its name)."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    counted_as: str = ""

    @property
    def counted(self) -> str:
        """The name under which the report counts it."""
        return self.counted_as or self.name

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"act": self.name, **self.fields}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={json.dumps(value)}" for key, value in self.fields.items())])


Script = tuple[Act, ...]
"""The acts of a case, in their order."""


@dataclass(frozen=True)
class Finding:
    """What must not be: the broken `rule`, by which equal findings are recognized, and what happened."""

    rule: str
    text: str


@dataclass
class Outcome:
    """What came of a script: how often what happened, what must not be, and what was measured at its end."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)


class World(Protocol):
    """Where scripts run. Each one begins in the same state, so that a case can be run alone."""

    def run(self, script: Script) -> Outcome:
        """Run a script, and judge it. An exception is a finding, too; the world is then made anew."""
        ...


class Campaign(Protocol):
    """A kind of cases."""

    name: str
    about: str
    """What it tries and what it holds against what, in one sentence."""

    def draw(self, chance: Random) -> Script:
        """Draw a case."""
        ...

    def world(self) -> AbstractContextManager[World]:
        """Make the world of this campaign, which lives as long as the block."""
        ...


def chance_of(seed: str, number: int) -> Random:
    """Return the randomness of one case: it depends on nothing but the seed and the number of the case."""
    return Random(f"{seed}:{number}")


def numbers() -> Iterator[int]:
    """Yield the numbers of cases, from 1."""
    number = 0
    while True:
        yield (number := number + 1)
