"""The calls that each service of a stack has, by the names that faults and the journal use.

A fault, or a search of the journal, for something that does not exist would have no effect, and a test that relies on
it would prove nothing. So a name that matches nothing is an error, which says what there is.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from dstack_emu.observability.fault_rules import KINDS_OF_CHAIN, FaultRule
from dstack_emu.observability.middleware import UNFAULTED_PATHS, call_name
from dstack_emu.observability.record import recorded_name
from dstack_emu.observability.spans import OUTSIDE
from dstack_emu.transport.validation import suggestion

OUTCOMES: Final = ("ok", "denied", "refused", "unanswered")
"""The outcomes of a call in the journal."""

INGRESS: Final = "ingress"
"""The ingress of a gateway, which relays connections, and answers no calls."""
CHAIN: Final = "chain"
"""The chain of a stack, which webhooks call."""
INGRESS_KINDS: Final = frozenset(("delay", "hang", "reset", "pass"))
"""The kinds of faults that its connections can have, and the step of a script that lets one pass."""

_CALLERS: Final = (OUTSIDE, "stack", "verifier")
"""Callers that are no trust domains."""

_NOT_SERVED: Final[Mapping[str, tuple[str, ...]]] = {"webhook": ("/", "/bootAuth/app", "/bootAuth/kms")}
"""What the journal records of services outside the stack: a KMS's requests to a webhook that somebody else runs."""

_SHOWN: Final = 20
"""The number of names above which an error that has a suggestion does not list them all."""

BOOT: Final = "Boot"
"""The call that the journal records for the boot of a trust domain."""


class UnknownCallError(ValueError):
    """A name matches no service, call or caller of the stack; the text says what there is."""


class ServiceCalls:
    """The calls of each running service. `domains` returns the names of the trust domains, which call services."""

    def __init__(self) -> None:
        self.domains: Callable[[], Collection[str]] = tuple
        self._calls: dict[str, set[str]] = {}

    def add(self, service: str, paths: Iterable[str]) -> None:
        """Add the paths, or names of RPCs, that a service answers."""
        names = (call_name(path) for path in paths if path not in UNFAULTED_PATHS)
        self._calls.setdefault(service, set()).update(names)

    def drop(self, service: str) -> None:
        """Forget a service that has ended."""
        self._calls.pop(service, None)

    def names(self, service: str) -> Collection[str]:
        """Return the names under which the calls of a service are recorded, but for the boot of a trust domain."""
        return self._calls.get(service) or _NOT_SERVED.get(service, ())

    def require_target(self, fault: FaultRule) -> None:
        """Raise `UnknownCallError` if a fault can apply to no call of the present services."""
        services = _matching("service", fault.service, self._calls, "service of the stack")
        if fault.kind == "stale" or "stale" in fault.script:
            lagging = ", and a chain may lag behind" if CHAIN in self._calls else ""
            rule = f"stale: only the PCCS has documents that expire{lagging}"
            services = self._only(services, ("pccs", CHAIN), rule, fault)
        if fault.kind in KINDS_OF_CHAIN:
            services = self._only(services, CHAIN, f"{fault.kind}: only the chain of a stack (--auth eth)", fault)
        if fault.kind == "decision" or {"allow", "deny"} & set(fault.script):
            services = self._only(services, "auth-", "decision: only a webhook of the stack decides", fault)
        if services == {INGRESS} and not {fault.kind, *fault.script} - {None} <= INGRESS_KINDS:
            raise UnknownCallError("kind: delay, hang or reset expected for the ingress, which forwards bytes")
        calls = set().union(*(self._calls[service] for service in services))
        _matching("call", fault.call, calls, f"call of {_listed(services)}")
        _matching("caller", fault.caller, self._callers(), "caller")

    def require_recordable(
        self, recorded: Callable[[str], Collection[str]], *, call: str, service: str, caller: str, outcome: str
    ) -> None:
        """Raise `UnknownCallError` if the journal can hold no call of these names.

        `recorded` returns the values of a field in the journal: what has been recorded is known, even if its service
        has ended.
        """
        domains, callers = self.domains(), self._callers()
        services = {**_NOT_SERVED, **self._calls, **{name: {*self._calls.get(name, ()), BOOT} for name in domains}}
        calls = set().union(*services.values())
        for field, pattern, known in (
            ("service", service, services.keys()),
            ("call", recorded_name(call), calls),
            ("caller", caller, callers),
            ("outcome", outcome, OUTCOMES),
        ):
            if not _matches(pattern, known) and not _matches(pattern, recorded(field)):
                raise _unknown(field, pattern, known, f"{field} of the journal")

    def _callers(self) -> set[str]:
        """Return who calls services: trust domains, and webhooks if there is a chain."""
        webhooks = {name for name in self._calls if name.startswith("auth-")} if CHAIN in self._calls else set()
        return {*_CALLERS, *self.domains(), *webhooks}

    def _only(self, services: Collection[str], prefix: str | tuple[str, ...], rule: str, fault: FaultRule) -> set[str]:
        fitting = {service for service in services if service.startswith(prefix)}
        if not fitting:
            known = sorted(service for service in self._calls if service.startswith(prefix))
            raise UnknownCallError(f"{rule}; service: {', '.join(known)} expected, got {fault.service!r:.60}")
        return fitting


def _matches(pattern: str, known: Iterable[str]) -> set[str]:
    return {name for name in known if fnmatch.fnmatchcase(name, pattern)}


def _matching(field: str, pattern: str, known: Collection[str], what: str) -> set[str]:
    """Return the known names that a pattern matches; raise `UnknownCallError` if there are none."""
    found = _matches(pattern, known)
    if not found and pattern != "*":
        raise _unknown(field, pattern, known, what)
    return found


def _unknown(field: str, pattern: str, known: Collection[str], what: str) -> UnknownCallError:
    near = suggestion(pattern, known)
    shown = sorted(known) if len(known) <= _SHOWN or not near else ()
    there_is = f"; there is {', '.join(shown)}" if shown else ""
    return UnknownCallError(f"{field}: {pattern!r:.60} is no {what}{there_is}{near}")


def _listed(services: Collection[str]) -> str:
    return ", ".join(sorted(services)) if len(services) <= 3 else "any service"
