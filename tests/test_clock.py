"""The clock of a stack."""

import pytest

from dstack_emu.deployment.clock import ISSUED_AT, ClockError, StackClock


def test_clock_follows_the_wall_until_it_is_touched() -> None:
    wall = [1000.5]
    clock = StackClock(lambda: wall[0])
    assert (clock(), clock.issue()) == (1000, ISSUED_AT)
    clock.set(5000)
    wall[0] += 10
    assert (clock(), clock.issue(), clock.is_frozen) == (5010, 5010, False)
    clock.freeze()
    wall[0] += 10
    clock.advance(-10)
    assert (clock(), clock.is_frozen) == (5000, True)
    clock.resume()
    wall[0] += 1
    assert (clock(), clock.is_frozen) == (5001, False)
    with pytest.raises(ClockError, match="Unix seconds from 0 to"):
        clock.freeze(-1)
    assert clock() == 5001
    clock.follow_the_wall()
    assert (clock(), clock.issue()) == (int(wall[0]), ISSUED_AT)
