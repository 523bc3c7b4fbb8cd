"""Runs work on large data in a thread, so that the event loop answers other calls meanwhile.

What a decoder does with LARGE bytes at their worst takes less than 20 ms, which is a loop's limit for one step.
"""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

LARGE: Final = 32 * 1024
"""The size of data in bytes above which work on it is done in a thread; starting one costs about 0.1 ms.

Requests of guests are smaller, except SignCert with a large event log.
"""


LARGE_EVIDENCE: Final = 256 * 1024
"""The same for `Attestation.size`, and for the documents of a PCCS; a guest's evidence has about 60,000."""


async def run_aside(size: int, work: Callable[[], T], large: int = LARGE) -> T:
    """Return the result of work on data of that size, or raise its error; it is done in a thread if they are large."""
    return work() if size <= large else await asyncio.to_thread(work)
