"""The clock of a test's stack."""

import datetime
from typing import Any

from dstack_emu.testing.access import StackAccess

Moment = str | float | datetime.datetime


class LiveClock:
    """The clock of the whole stack. A moment is a datetime, Unix seconds, or ISO 8601; without an offset it is UTC."""

    def __init__(self, access: StackAccess) -> None:
        self._access = access

    @property
    def now(self) -> datetime.datetime:
        """The clock's time."""
        seconds = self._access.in_thread(lambda stack: stack.control.time.now())
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)

    def set(self, moment: Moment) -> None:
        """Set the clock; it continues from there, unless it is frozen."""
        self._change(set=_as_moment(moment))

    def advance(self, by: str | float | datetime.timedelta) -> None:
        """Advance the clock by seconds, or text such as `90s`, `12h`, `30d`; a negative duration sets it back."""
        self._change(advance=by.total_seconds() if isinstance(by, datetime.timedelta) else by)

    def freeze(self, moment: Moment | None = None) -> None:
        """Freeze the clock at a moment, or at its present time."""
        self._change(freeze=True if moment is None else _as_moment(moment))

    def resume(self) -> None:
        """Let a frozen clock continue from its present time."""
        self._change(resume=True)

    def follow_the_wall(self) -> None:
        """Let the clock follow the wall clock again, as when the stack started."""
        self._change(follow_the_wall=True)

    def _change(self, **change: Any) -> None:
        self._access.control.set_clock(**change)


def _as_moment(moment: Moment) -> str | float:
    if not isinstance(moment, datetime.datetime):
        return moment
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
