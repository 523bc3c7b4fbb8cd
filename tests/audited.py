"""Counts what this process asks of the file system, by the events that Python audits."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

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
