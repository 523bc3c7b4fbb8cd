"""Files that depend on the surroundings of their process, in the form of `campaigns.outputs`."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def mask() -> str:
    value = os.umask(0)
    os.umask(value)
    return oct(value)


def fails() -> str:
    if mask() != "0o22":
        raise ValueError(f"the umask is {mask()}")
    return ""


PARTS: Mapping[str, Callable[[], str]] = {
    "same": lambda: "",
    "zone": lambda: str(time.localtime(0)[:6]),
    "mask": mask,
    "optimized": lambda: str(sys.flags.optimize),
    "fails": fails,
}

if __name__ == "__main__":
    found, part = Path(sys.argv[1]) / "found", sys.argv[2]
    found.mkdir(parents=True)
    (found / part).write_text(PARTS[part]())
