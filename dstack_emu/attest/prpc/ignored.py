"""Members of a request that its message does not have: they are ignored, as upstream does, and may be misspelt ones."""

from difflib import get_close_matches
from typing import Final, NamedTuple

from dstack_emu.attest.prpc.messages import MessageTable

MOST_NAMED: Final = 8
"""Members of one request that are remembered."""
_SHOWN: Final = 64
"""Characters of a name that are remembered."""
_ALIKE: Final = 0.6
"""Similarity from which a known name is taken for the one that was meant."""


class IgnoredMember(NamedTuple):
    """The name of a member that was ignored, cut to 64 characters, and the nearest known one, empty if none is near."""

    name: str
    nearest: str


Ignored = list[IgnoredMember]


def ignore(name: str, table: MessageTable, ignored: Ignored | None) -> None:
    """Remember an ignored member, if a caller collects them."""
    if ignored is not None and len(ignored) < MOST_NAMED:
        shown = name[:_SHOWN]
        near = get_close_matches(_plain(shown), known := {_plain(each): each for each in table.by_name}, 1, _ALIKE)
        ignored.append(IgnoredMember(shown, known[near[0]] if near else ""))


def _plain(name: str) -> str:
    return name.lower().replace("_", "")
