"""Faults of a test's stack."""

from types import TracebackType
from typing import Self

from dstack_emu.observability.fault_rules import InstalledRule
from dstack_emu.testing.access import StackAccess


class LiveFault:
    """A fault in force. It ends with `lift`, with its `with` block, or with the test.

    A `with` block whose fault was applied to no call raises `AssertionError`, unless `must_apply` is false.
    """

    def __init__(self, access: StackAccess, rule: InstalledRule, *, must_apply: bool = True) -> None:
        self._access, self._rule, self._must_apply = access, rule, must_apply

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
        if kind is None and self._must_apply and self.met == 0:
            fault = self._rule.to_json()
            described = ", ".join(
                f"{key}={fault[key]!r}" for key in ("service", "call", "caller", "kind") if key in fault
            )
            raise AssertionError(
                f"the fault ({described}) was applied to no call of its block: {fault['seen']} calls matched it; "
                "with must_apply=False it need not apply"
            )
