"""Remembering what a pure function made of an argument, by the argument's identity.

A trust domain's log is one tuple until something more is measured. `functools.lru_cache` would hash it, every event of
it, for each quote; whether it is the very same object is known at once.
"""

from collections.abc import Callable
from typing import Final, TypeVar

A = TypeVar("A")
R = TypeVar("R")

KEPT: Final = 32


def remember_by_identity(function: Callable[[A], R]) -> Callable[[A], R]:
    """Wrap a pure function of one immutable argument; an equal argument that is another object is worked out anew."""
    known: dict[int, tuple[A, R]] = {}  # the argument is kept too, so no other object can get its id

    def call(argument: A) -> R:
        found = known.get(id(argument))
        if found is not None:
            return found[1]
        result = function(argument)
        if len(known) >= KEPT:
            known.clear()
        known[id(argument)] = argument, result
        return result

    return call
