"""Counts what this process asks of the file system, by the events that Python audits, and what it calls."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_counters: list[Counter[str]] = []
"""Those that count now. A hook cannot be removed, so that one hook serves all."""
_is_added = False


@contextmanager
def file_events() -> Iterator["Counter[str]"]:
    """Count the events of the block by name: `open`, and those of the module os, such as `os.listdir`."""
    global _is_added
    if not _is_added:
        sys.addaudithook(_count)
        _is_added = True
    counter = Counter[str]()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(event: str, _: tuple[object, ...]) -> None:
    if _counters and (event == "open" or event.startswith("os.")):
        for counter in _counters:
            counter[event] += 1


@contextmanager
def calls() -> Iterator["Counter[str]"]:
    """Count the calls of the block in this thread: `call` of functions in Python, `c_call` of built-in ones."""
    counter = Counter[str]()

    def count(_: FrameType, event: str, __: object) -> None:
        counter[event] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield counter
    finally:
        sys.setprofile(before)
