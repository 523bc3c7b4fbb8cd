"""What a test looks at and breaks: the journal, the clock, faults."""

import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dstack_emu.observability.fault_rules import InstalledRule
from dstack_emu.observability.journal import Record
from dstack_emu.observability.record_text import lines

if TYPE_CHECKING:
    from dstack_emu.testing.live import LiveStack

Moment = str | float | datetime.datetime


class LiveJournal:
    """What was asked in the stack since the test began."""

    def __init__(self, live: "LiveStack") -> None:
        self._live = live
        self.since = 0

    def start(self) -> None:
        """Look only at what comes from here on."""
        self.since = self._live.in_thread(lambda stack: stack.control.journal.position)

    def calls(self, call: str = "*", *, service: str = "*", caller: str = "*", outcome: str = "*") -> int:
        """How many calls match, inner ones too; each pattern may have wildcards."""
        return len(self.find(call, service=service, caller=caller, outcome=outcome))

    def find(self, call: str = "*", *, service: str = "*", caller: str = "*", outcome: str = "*") -> list[Record]:
        """The calls that match, inner ones too; outcomes are `ok`, `denied`, `refused` and `unanswered`."""
        since = self.since
        return self._live.in_thread(
            lambda stack: stack.control.journal.find(call, service=service, caller=caller, outcome=outcome, since=since)
        )

    def records(self) -> list[Record]:
        """One record for each call from outside, with what it led to."""
        since = self.since
        return self._live.in_thread(lambda stack: stack.control.journal.records(since=since))

    def text(self) -> str:
        """The same as `dstack-emu ctl tail` shows it."""
        return "\n".join(line for record in self.records() for line in lines(record))


class LiveClock:
    """The clock of the whole stack. Moments are datetimes, Unix seconds, or ISO 8601, in UTC where they do not say."""

    def __init__(self, live: "LiveStack") -> None:
        self._live = live

    @property
    def now(self) -> datetime.datetime:
        """What it shows."""
        seconds = self._live.in_thread(lambda stack: stack.world.clock.now())
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)

    def set(self, moment: Moment) -> None:
        """Put it to a moment; it runs on from there, unless it is frozen."""
        self._change(set=_plain(moment))

    def advance(self, by: str | float | datetime.timedelta) -> None:
        """Put it forward: seconds, or text such as `90s`, `12h`, `30d`; back by a negative one."""
        self._change(advance=by.total_seconds() if isinstance(by, datetime.timedelta) else by)

    def freeze(self, moment: Moment | None = None) -> None:
        """Stop it, at a moment or where it is."""
        self._change(freeze=True if moment is None else _plain(moment))

    def resume(self) -> None:
        """Let it run on from where it stands."""
        self._change(resume=True)

    def follow_the_wall(self) -> None:
        """Make it the clock that a stack begins with."""
        self._change(follow_the_wall=True)

    def _change(self, **change: Any) -> None:
        self._live.control.set_clock(**change)


def _plain(moment: Moment) -> str | float:
    if not isinstance(moment, datetime.datetime):
        return moment
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


class LiveFault:
    """A fault in force: until `lift`, the end of a `with` block over it, or the end of the test."""

    def __init__(self, live: "LiveStack", rule: InstalledRule) -> None:
        self._live, self._rule = live, rule

    @property
    def met(self) -> int:
        """How many calls it has met."""
        return self._live.in_thread(lambda _stack: self._rule.met)

    def lift(self) -> None:
        """Take it out of force, if it is in force."""
        self._live.in_thread(lambda stack: stack.world.faults.lift(self._rule.id))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lift()
