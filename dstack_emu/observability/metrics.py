"""Counts what the journal records, for as long as the stack runs: calls, durations, decisions, faults, verifications.

A key of a count is a tuple of labels. Their number is bounded: the name of a call that its service does not have is
`other`, and so is everything of a service once a count has MAX_KEYS keys.

Not here: the text in which Prometheus reads this (`control.metrics`).
"""

from bisect import bisect_left
from collections.abc import Callable, Collection
from typing import Final

from dstack_emu.observability.record import outcome_of
from dstack_emu.observability.service_calls import BOOT
from dstack_emu.observability.spans import GIVEN_UP, CallSpan, Span

BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The upper bounds of the durations in seconds that are counted together; one more has all longer ones."""
MAX_KEYS: Final = 2000
"""The maximum number of keys of one count, apart from those of `other`."""
OTHER: Final = "other"
"""The name of a call, or of a service, that is not counted by its own name."""

Key = tuple[str, ...]
Counts = dict[Key, int]


class CallCounts:
    """One call of one service: its outcomes, and of those that were answered the durations by bucket and their sum."""

    __slots__ = ("buckets", "outcomes", "seconds")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0


class Metrics:
    """The counts of one stack. `calls_of` returns the names of the calls of a service.

    The first label is the service. Further ones: of `calls` the call; of `decisions` what was decided about (`kms` or
    `app`), `allowed` or `denied`, and the rule; of `faults` the kind; of `verifications` by a service the result and
    the TCB status; of `verdicts` the result.
    """

    def __init__(self, calls_of: Callable[[str], Collection[str]]) -> None:
        self._calls_of = calls_of
        self.calls: dict[Key, CallCounts] = {}
        self.decisions: Counts = {}
        self.faults: Counts = {}
        self.verifications: Counts = {}
        self.verdicts: Counts = {}

    def count(self, call: CallSpan) -> None:
        """Count a call that has ended, and everything inside it."""
        status, _, ended = call.outcome or GIVEN_UP
        said = call.annotations
        counts = self.calls.get((call.service, call.call)) or self._counts_of(call)
        outcome = outcome_of(status, said)
        counts.outcomes[outcome] = counts.outcomes.get(outcome, 0) + 1
        if ended is not None and (seconds := ended - call.time) >= 0:  # the stack's clock may have been set back
            counts.buckets[bisect_left(BUCKETS, seconds)] += 1
            counts.seconds += seconds
        if said:
            self._count_annotations(call)
        for inner in call.inner:
            if isinstance(inner, CallSpan):
                self.count(inner)
            else:
                self._count_verification(inner, call.service)

    def _counts_of(self, call: CallSpan) -> CallCounts:
        """Return where a call is counted that may have no counts yet."""
        is_known = call.call == BOOT or call.call in self._calls_of(call.service)
        key = _kept(self.calls, (call.service, call.call if is_known else OTHER))
        return self.calls.setdefault(key, CallCounts())

    def _count_verification(self, span: Span, service: str) -> None:
        said = span.annotations
        if "attestation" in said:
            _add(self.verifications, (service, said["attestation"], said.get("tcb_status", "")))
        for inner in span.inner:
            if isinstance(inner, CallSpan):
                self.count(inner)

    def _count_annotations(self, call: CallSpan) -> None:
        service, said = call.service, call.annotations
        if (decision := said.get("decision")) is not None:
            result = "allowed" if decision["allowed"] is True else "denied"
            _add(self.decisions, (service, decision.get("about", ""), result, decision.get("rule") or ""))
        if (verdict := said.get("verdict")) is not None:
            _add(self.verdicts, (service, "valid" if verdict["is_valid"] else "invalid"))
        if (fault := said.get("fault")) is not None:
            _add(self.faults, (service, fault["kind"]))


def _add(counts: Counts, key: Key) -> None:
    key = _kept(counts, key)
    counts[key] = counts.get(key, 0) + 1


def _kept(counts: Collection[Key], key: Key) -> Key:
    """Return the key under which something is counted."""
    return key if len(counts) < MAX_KEYS or key in counts else (OTHER,) * len(key)
