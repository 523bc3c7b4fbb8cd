"""Start of a single fresh KMS (`dstack-emu kms`): the time until it is ready, and its memory then."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.figure import Bar, Effort, Figure, median
from bench.processes import command, resident_memory, running

READY_BAR, MEMORY_BAR = 0.45, 60.0

_TOML: Final = """
[rpc]
address = "127.0.0.1"
port = 0
[core]
cert_dir = "{certs}"
[core.onboard]
address = "127.0.0.1"
port = 0
"""


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure seconds from exec to the line that reports readiness; resident memory then."""
    ready, memory = [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        config = Path(folder, "kms.toml")
        config.write_text(_TOML.format(certs=Path(folder, "certs")))
        kms = command("kms", effort.release, "--config", str(config), "--trust-production")  # it asks nobody
        for turn in range(effort.starts + 1):
            began = time.perf_counter()
            with running(kms) as (process, _):
                took = time.perf_counter() - began
                if turn:  # the first one finds cold caches
                    ready.append(took)
                    memory.append(resident_memory(process.pid) / 2**20)
    yield Figure("kms_ready", median(ready), "s", Bar(READY_BAR, at_most=True))
    yield Figure("kms_ready_memory", max(memory), "MiB", Bar(MEMORY_BAR, at_most=True))
