"""The journal of a test's stack."""

from dstack_emu.observability.record import Record
from dstack_emu.observability.record_text import texts
from dstack_emu.stack import Stack
from dstack_emu.testing.access import StackAccess


class LiveJournal:
    """The calls in the stack since the test began."""

    def __init__(self, access: StackAccess) -> None:
        self._access = access
        self.since = 0

    def start(self) -> None:
        """Ignore the records so far."""
        self.since = self._access.in_thread(lambda stack: stack.control.journal.position)

    def calls(self, call: str = "*", *, service: str = "*", caller: str = "*", outcome: str = "*") -> int:
        """Count the calls that match, inner ones too; each pattern may have wildcards."""
        return len(self.find(call, service=service, caller=caller, outcome=outcome))

    def find(self, call: str = "*", *, service: str = "*", caller: str = "*", outcome: str = "*") -> list[Record]:
        """Return the calls that match, inner ones too; outcomes are `ok`, `denied`, `refused` and `unanswered`.

        Raises `ControlError` for a name that no service, call or caller of the stack has.
        """
        since = self.since

        def found(stack: Stack) -> list[Record]:
            stack.control.require_recordable(call=call, service=service, caller=caller, outcome=outcome)
            return stack.control.journal.find(call, service=service, caller=caller, outcome=outcome, since=since)

        return self._access.in_thread(found)

    def records(self) -> list[Record]:
        """Return one record for each call from outside, with its inner calls."""
        since = self.since
        return self._access.in_thread(lambda stack: stack.control.journal.records(since=since))

    def text(self) -> str:
        """Return the records as text, as `dstack-emu ctl tail` prints them."""
        return "\n".join(texts(self.records()))
