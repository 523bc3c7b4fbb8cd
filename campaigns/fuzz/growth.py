"""Judge whether the cost of an input grows faster than its size."""

from collections.abc import Sequence
from random import Random
from typing import Final

from campaigns.fuzz.judge import Finding, judge, run_without_collector
from campaigns.fuzz.mutation import stretched
from campaigns.fuzz.target import Target

SIZES: Final = (16 * 1024, 64 * 1024, 256 * 1024)
"""Sizes of an input in which one piece is repeated, in bytes."""
FACTOR: Final = 8.0
"""Four times the size may take so many times as long; what is quadratic takes sixteen times as long."""
LEAST: Final = 0.2
"""Seconds of CPU time that the largest input has to take; less is too little to judge growth by."""
ROUNDS: Final = 6
"""So often both sizes are timed again at most, one after the other; the least time of each counts."""


def judge_stretched(target: Target, samples: Sequence[bytes], chance: Random) -> tuple[int, list[Finding]]:
    """Judge inputs in which one piece of a sample is repeated; return their number, and what is wrong."""
    before, piece, after = stretched(chance.choice(samples), chance)
    # What may take any time has no input of the largest size, which takes minutes.
    sizes = SIZES[:-1] if target.is_of_the_user else SIZES
    inputs = [before + piece * (size // len(piece)) + after for size in sizes]
    seconds, found = [], []
    for data in inputs:
        ran = run_without_collector(target, data)
        seconds.append(ran.seconds)
        found.append(judge(target, data, thoroughly=data is inputs[0], ran=ran))
    if not target.is_of_the_user:
        found.append(judge_growth(target, inputs[-2], inputs[-1], seconds[-2], seconds[-1]))
    return len(inputs), [each for each in found if each is not None]


def judge_growth(target: Target, small: bytes, large: bytes, fast: float, slow: float) -> Finding | None:
    """Judge the times of two inputs, of which one has four times the size; time them again while they seem wrong."""
    for _ in range(ROUNDS):
        if not _is_superlinear(fast, slow):
            return None
        fast = min(fast, run_without_collector(target, small).seconds)
        slow = min(slow, run_without_collector(target, large).seconds)
    if not _is_superlinear(fast, slow):
        return None
    text = f"{fast:.3f} s for {len(small)} bytes, {slow:.3f} s for {len(large)}"
    return Finding(target.name, "superlinear", "", text, large)


def _is_superlinear(fast: float, slow: float) -> bool:
    return slow > LEAST and fast > LEAST / 40 and slow > FACTOR * fast
