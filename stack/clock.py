"""The two times of a stack: what certificates are dated by, and what everything is judged by."""

import time
from typing import Final

ISSUED_AT: Final = 1_767_225_600
"""2026-01-01T00:00:00Z: every certificate of a stack is dated from here, so a seed gives the same bytes on any day."""


def wall_clock() -> int:
    """Unix seconds, now."""
    return int(time.time())
