"""Fault rules: which service of the stack misbehaves in which call, and how.

Matching is here; what a rule does to an answer is in `observability.fault_effects`. Rules are tried in the order in
which they were added, and the first one that applies counts. Chances come from the stack's seed, a sequence for each
rule.
"""

import asyncio
import fnmatch
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
]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

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
"""Every status of gRPC that is none of success."""

Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Pattern = Annotated[str, Field(min_length=1, max_length=200)]

_COMMON: Final = ("service", "call", "caller", "kind", "times", "after", "probability", "script", "repeat")
_OF_KIND: Final[dict[str, tuple[str, ...]]] = {
    "delay": ("seconds",),
    "slow": ("seconds",),
    "status": ("status", "grpc_status", "body"),
    "decision": ("allow", "reason"),
}


class FaultRule(BaseModel):
    """One rule: which calls it meets, and what then happens.

    `service`, `call` (an RPC such as `GetAppKey`, a path such as `/bootAuth/kms`) and `caller` may have wildcards. It
    meets every call, or the next `times` of them, each with `probability`, once `after` of them have passed.

    In place of a `kind` a webhook may have a `script`, one step for each question: `allow`, `deny`, `pass`, `hang`,
    `reset` or a status; after the last step questions pass, or with `repeat` it begins again. A `decision` without
    `allow` is the opposite of the true one. A call by gRPC is refused with `grpc_status`, or without it with the one
    that gRPC's clients take `status` for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    service: Pattern = "*"
    call: Pattern = "*"
    caller: Pattern = "*"
    kind: Kind | None = None
    times: Annotated[int, Field(ge=1)] | None = None
    after: Annotated[int, Field(ge=0)] = 0
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    seconds: Seconds = 1.0
    status: Annotated[int, Field(ge=400, le=599)] = 500
    grpc_status: GrpcStatus | None = None
    body: str | None = None
    allow: bool | None = None
    reason: str = "decided by a fault"
    script: Annotated[tuple[str, ...], Field(max_length=10_000)] = ()
    repeat: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.kind is None) == (not self.script):
            raise ValueError(f"either a kind ({', '.join(KINDS)}) or a script expected")
        fitting = {*_COMMON, *_OF_KIND.get(self.kind or "", ())}
        if foreign := sorted(self.model_fields_set - fitting):
            raise ValueError(f"{', '.join(foreign)}: has no meaning for the kind {self.kind or 'script'}")
        if self.script and self.model_fields_set & {"times", "probability"}:
            raise ValueError("times and probability: a script says itself what happens to which question")
        if self.repeat and not self.script:
            raise ValueError("repeat: only a script can begin again")
        for step in self.script:
            _step(step)
        return self


def _step(text: str) -> "FaultRule | None":
    """What one step of a script is: a fault of its own, or None to let the question pass."""
    if text == "pass":
        return None
    if text in ("allow", "deny"):
        return FaultRule(kind="decision", allow=text == "allow")
    if text in ("hang", "reset", "drop", "truncate", "malformed", "wrong-type", "stale"):
        return FaultRule(kind=text)  # type: ignore[arg-type]  # they are kinds
    if text.isdecimal() and 400 <= int(text) <= 599:
        return FaultRule(kind="status", status=int(text))
    raise ValueError(
        "script: allow, deny, pass, hang, reset, drop, truncate, malformed, wrong-type, stale or a status from 400 to "
        f"599 expected, got {text!r:.40}"
    )


class FaultState(BaseModel):
    """A fault in force and where it stands: the calls that matched, those that it met, and the chances taken."""

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
    """How many faults have been added so far, and those in force."""

    count: int
    faults: tuple[FaultState, ...]


class InstalledRule:
    """A fault in force: how many calls it has met, and its chances so far."""

    def __init__(self, number: int, fault: FaultRule, chances: Stream) -> None:
        self.id, self._number, self.fault, self._chances = f"f{number}", number, fault, chances
        self.seen = self.met = 0
        self.lifted = asyncio.Event()

    @property
    def is_spent(self) -> bool:
        """Whether it will meet no more calls."""
        fault = self.fault
        if fault.script:
            return not fault.repeat and self.met >= len(fault.script)
        return fault.times is not None and self.met >= fault.times

    def meet(self, service: str, call: str, caller: str) -> FaultRule | None:
        """What happens to a call by this rule, if anything; it counts from here on."""
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
        """Return the rule and where it stands."""
        chances = self._chances.capture()
        return FaultState(number=self._number, fault=self.fault, seen=self.seen, met=self.met, chances=chances)

    def restore(self, state: FaultState) -> None:
        """Put it where it stood."""
        self.seen, self.met = state.seen, state.met
        self._chances.restore(state.chances)

    def to_json(self) -> dict[str, Any]:
        """The rule and where it stands."""
        fields = self.fault.model_dump(mode="json", exclude_defaults=True)
        return {"id": self.id, **fields, "seen": self.seen, "met": self.met, "spent": self.is_spent}


Met = tuple[InstalledRule, FaultRule]
"""A rule that met a call, and what happens to it."""


class FaultRules:
    """The rules in force."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed.child("faults")
        self.rules: list[InstalledRule] = []
        self._count = 0

    def add(self, fault: FaultRule) -> InstalledRule:
        """Put one rule in force."""
        self._count += 1
        rule = InstalledRule(self._count, fault, self._seed.stream(f"chances {self._count}"))
        self.rules = [*self.rules, rule]
        return rule

    def lift(self, rule_id: str) -> bool:
        """Take one rule out of force; whether there was one."""
        return self._keep(lambda rule: rule.id != rule_id)

    def clear(self) -> bool:
        """Take all out of force; whether there were any."""
        return self._keep(lambda _rule: False)

    def capture(self) -> FaultRulesState:
        """Return the rules in force and where each stands."""
        return FaultRulesState(self._count, tuple(rule.capture() for rule in self.rules))

    def restore(self, state: FaultRulesState) -> None:
        """Put captured rules, with their numbers, in the place of all."""
        self.clear()
        self._count = state.count
        self.rules = [self._installed(fault) for fault in state.faults]

    def meet(self, service: str, call: str, caller: str) -> Met | None:
        """What happens to a call: the first rule that meets it."""
        for rule in self.rules:
            if (fault := rule.meet(service, call, caller)) is not None:
                return rule, fault
        return None

    def _installed(self, state: FaultState) -> InstalledRule:
        rule = InstalledRule(state.number, state.fault, self._seed.stream(f"chances {state.number}"))
        rule.restore(state)
        return rule

    def _keep(self, wanted: Callable[[InstalledRule], bool]) -> bool:
        gone = [rule for rule in self.rules if not wanted(rule)]
        self.rules = [rule for rule in self.rules if wanted(rule)]
        for rule in gone:
            rule.lifted.set()
        return bool(gone)
