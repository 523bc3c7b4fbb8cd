"""Fault rules: which calls of which services fail, and how.

This module matches calls to rules; `observability.fault_effects` has the effects. Rules are tried in the order in which
they were added, and the first one that matches is applied. Random numbers for `probability` come from the stack's
seed, with a sequence for each rule.
"""

import asyncio
import fnmatch
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from dstack_emu.simulator.seed import Seed, Stream

Kind = Literal[
    "delay",
    "status",
    "reset",
    "hang",
    "drop",
    "truncate",
    "malformed",
    "wrong-type",
    "slow",
    "decision",
    "stale",
    "pruned",
    "reorg",
    "wrong-chain-id",
]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
KINDS_OF_CHAIN: Final[tuple[Kind, ...]] = ("pruned", "reorg", "wrong-chain-id")
"""The kinds that only the chain of a stack has."""

GrpcStatus = Literal[
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]
"""Every status of gRPC except OK."""

DelaySeconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Pattern = Annotated[str, Field(min_length=1, max_length=200)]

_WITHOUT_BODY: Final = (204, 205, 304)
"""Statuses of answers that cannot have a body."""

_COMMON: Final = ("service", "call", "caller", "kind", "times", "after", "probability", "script", "repeat", "later")
_OF_KIND: Final[dict[str, tuple[str, ...]]] = {
    "delay": ("seconds",),
    "slow": ("seconds",),
    "status": ("status", "grpc_status", "body"),
    "decision": ("allow", "reason"),
    **dict.fromkeys(("stale", "pruned", "reorg"), ("blocks",)),
}


class FaultRule(BaseModel):
    """One rule: the calls that it applies to, and what happens to them.

    `service`, `call` (an RPC such as `GetAppKey`, a path such as `/bootAuth/kms`) and `caller` may have wildcards. The
    rule skips the first `after` matching calls. It then applies to each further one with `probability`, at most `times`
    times if that is given.

    A webhook may have a `script` instead of a `kind`, with one step for each request: `allow`, `deny`, `pass`, `hang`,
    `reset`, `drop`, `truncate`, `malformed`, `wrong-type`, `stale`, or a status from 400 to 599. After the last step
    requests pass; with `repeat` the script begins again. A `decision` without `allow` is the opposite of the true one.
    A rule that can apply to no call of the present services is refused, unless `later` is set: then the service, or the
    caller, may be added later.

    The chain of a stack may be `stale`, `blocks` behind (1); have `pruned` the states that are named by a number, from
    `blocks` (0) before the latest on; have a `reorg` of `blocks` (1) before it answers; or a `wrong-chain-id`.

    A `status` below 400 answers with `body`, which may be a JSON object or list: a well-formed, but wrong answer.
    A gRPC call is refused with `grpc_status`; if that is not given, with the code that gRPC's clients derive from the
    HTTP status `status`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    service: Pattern = "*"
    call: Pattern = "*"
    caller: Pattern = "*"
    kind: Kind | None = None
    times: Annotated[int, Field(ge=1)] | None = None
    after: Annotated[int, Field(ge=0)] = 0
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    seconds: DelaySeconds = 1.0
    status: Annotated[int, Field(ge=200, le=599)] = 500
    grpc_status: GrpcStatus | None = None
    body: str | dict[str, Any] | list[Any] | None = None
    allow: bool | None = None
    reason: str = "decided by a fault"
    blocks: Annotated[int, Field(ge=0, le=10_000)] | None = None
    later: bool = False
    script: Annotated[tuple[str, ...], Field(max_length=10_000)] = ()
    repeat: bool = False

    @property
    def content(self) -> tuple[str, str] | None:
        """The body of a `status` as text, with its content type; None if there is none."""
        if self.body is None:
            return None
        if isinstance(self.body, str):
            return self.body, "application/json" if _is_json_document(self.body) else "text/plain"
        return json.dumps(self.body), "application/json"

    @model_validator(mode="after")
    def _validate_combination(self) -> Self:
        if (self.kind is None) == (not self.script):
            raise ValueError(f"either a kind ({', '.join(KINDS)}) or a script expected")
        fitting = {*_COMMON, *_OF_KIND.get(self.kind or "", ())}
        if foreign := sorted(self.model_fields_set - fitting):
            raise ValueError(f"{', '.join(foreign)}: has no meaning for the kind {self.kind or 'script'}; leave it out")
        if self.status in _WITHOUT_BODY:
            raise ValueError(f"status: one whose answer has a body expected, got {self.status}")
        if self.status < 400 and self.body is None:
            raise ValueError(f"body: the answer of the status {self.status} expected, as JSON or as text")
        if self.script and self.model_fields_set & {"times", "probability"}:
            raise ValueError("times and probability: a script says itself what happens to which question")
        if self.repeat and not self.script:
            raise ValueError("repeat: only a script can begin again")
        for step in self.script:
            _step(step)
        return self


def _is_json_document(text: str) -> bool:
    """Return whether a text is a JSON object or list."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _step(text: str) -> "FaultRule | None":
    """Return the fault that a step of a script stands for, None if the request passes; raise `ValueError`."""
    if text == "pass":
        return None
    if text in ("allow", "deny"):
        return FaultRule(kind="decision", allow=text == "allow")
    if text in ("hang", "reset", "drop", "truncate", "malformed", "wrong-type", "stale"):
        return FaultRule(kind=text)  # type: ignore[arg-type]  # they are kinds
    if len(text) == 3 and text.isdecimal() and 400 <= int(text) <= 599:
        return FaultRule(kind="status", status=int(text))
    raise ValueError(
        "script: allow, deny, pass, hang, reset, drop, truncate, malformed, wrong-type, stale or a status from 400 to "
        f"599 expected, got {text!r:.40}"
    )


class FaultState(BaseModel):
    """The state of one fault in force.

    `seen` calls matched, it was applied to `met` of them, and `chances` bytes of its random sequence are used up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    number: Count
    fault: FaultRule
    seen: Count
    met: Count
    chances: Count

    @field_serializer("fault")
    def _as_given(self, fault: FaultRule) -> dict[str, Any]:
        return fault.model_dump(mode="json", exclude_unset=True)  # a field without meaning for its kind is refused


@dataclass(frozen=True, slots=True)
class FaultRulesState:
    """The number of faults added so far, and the state of each one in force."""

    count: int
    faults: tuple[FaultState, ...]


class InstalledRule:
    """A fault in force: `seen` counts the calls that matched it, `met` those that it was applied to."""

    def __init__(self, number: int, fault: FaultRule, chances: Stream) -> None:
        self.id, self._number, self.fault, self._chances = f"f{number}", number, fault, chances
        self.seen = self.met = 0
        self.lifted = asyncio.Event()

    @property
    def is_spent(self) -> bool:
        """Whether the rule will be applied to no further call."""
        fault = self.fault
        if fault.script:
            return not fault.repeat and self.met >= len(fault.script)
        return fault.times is not None and self.met >= fault.times

    def meet(self, service: str, call: str, caller: str) -> FaultRule | None:
        """Count a call if it matches, and return the fault to apply to it, None if there is none."""
        fault = self.fault
        if self.is_spent or not (
            fnmatch.fnmatchcase(service, fault.service)
            and fnmatch.fnmatchcase(call, fault.call)
            and fnmatch.fnmatchcase(caller, fault.caller)
        ):
            return None
        self.seen += 1
        if self.seen <= fault.after:
            return None
        if fault.probability < 1 and int.from_bytes(self._chances(4), "big") >= fault.probability * 2**32:
            return None
        self.met += 1
        if not fault.script:
            return fault
        return _step(fault.script[(self.met - 1) % len(fault.script)])

    def capture(self) -> FaultState:
        """Return the rule and its counters."""
        chances = self._chances.capture()
        return FaultState(number=self._number, fault=self.fault, seen=self.seen, met=self.met, chances=chances)

    def restore(self, state: FaultState) -> None:
        """Set the counters to those of a captured state."""
        self.seen, self.met = state.seen, state.met
        self._chances.restore(state.chances)

    def to_json(self) -> dict[str, Any]:
        """Return the rule and its counters as JSON."""
        fields = self.fault.model_dump(mode="json", exclude_defaults=True)
        return {"id": self.id, **fields, "seen": self.seen, "met": self.met, "spent": self.is_spent}


Met = tuple[InstalledRule, FaultRule]
"""A rule that applies to a call, and the fault of this call (for a script, that of one step)."""


class FaultRules:
    """The rules in force."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed.child("faults")
        self.rules: list[InstalledRule] = []
        self._count = 0

    def add(self, fault: FaultRule) -> InstalledRule:
        """Put a rule in force and return it."""
        self._count += 1
        rule = InstalledRule(self._count, fault, self._seed.stream(f"chances {self._count}"))
        self.rules = [*self.rules, rule]
        return rule

    def lift(self, rule_id: str) -> bool:
        """Lift one rule; return whether it was in force."""
        return self._keep(lambda rule: rule.id != rule_id)

    def clear(self) -> bool:
        """Lift all rules; return whether any was in force."""
        return self._keep(lambda _rule: False)

    def capture(self) -> FaultRulesState:
        """Return the rules in force and their counters."""
        return FaultRulesState(self._count, tuple(rule.capture() for rule in self.rules))

    def restore(self, state: FaultRulesState) -> None:
        """Replace all rules by captured ones, with their numbers and counters."""
        self.clear()
        self._count = state.count
        self.rules = [self._installed(fault) for fault in state.faults]

    def meet(self, service: str, call: str, caller: str) -> Met | None:
        """Return the first rule that applies to a call, and its fault; None if no rule does."""
        for rule in self.rules:
            if (fault := rule.meet(service, call, caller)) is not None:
                return rule, fault
        return None

    def _installed(self, state: FaultState) -> InstalledRule:
        rule = InstalledRule(state.number, state.fault, self._seed.stream(f"chances {state.number}"))
        rule.restore(state)
        return rule

    def _keep(self, stays: Callable[[InstalledRule], bool]) -> bool:
        lifted = [rule for rule in self.rules if not stays(rule)]
        self.rules = [rule for rule in self.rules if stays(rule)]
        for rule in lifted:
            rule.lifted.set()
        return bool(lifted)
