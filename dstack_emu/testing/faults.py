"""Faults of a test's stack."""

from types import TracebackType
from typing import Self

from dstack_emu.observability.fault_rules import InstalledRule
from dstack_emu.testing.access import StackAccess


class LiveFault:
    """A fault in force. It ends with `lift`, with its `with` block, or with the test."""

    def __init__(self, access: StackAccess, rule: InstalledRule) -> None:
        self._access, self._rule = access, rule

    @property
    def met(self) -> int:
        """The number of calls that the fault was applied to."""
        return self._access.in_thread(lambda _stack: self._rule.met)

    def lift(self) -> None:
        """Lift the fault, if it is in force."""
        self._access.in_thread(lambda stack: stack.context.instrumentation.faults.lift(self._rule.id))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lift()
