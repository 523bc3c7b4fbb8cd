"""The state of a whole stack as data: captured, kept, saved to a file, and restored.

It is composed of the states of the parts (`deployment.state`): the policy files, what the vendor says, the clock,
faults, each trust domain's log and keys, each KMS's phase and folder, the positions of every source of randomness and
of the journal. What grows from the seed alone, ports and connections are not in it. Capturing and restoring both empty
the caches of collateral, so that the requests that follow are the same.

Restoring changes only what differs. A KMS that gained, lost or changed its keys since is restarted, which costs some
ten milliseconds more; so does a trust domain or a KMS that has to be made again.
"""

import json
from typing import Any, Final, Literal, Self

from pydantic import ValidationError

from dstack_emu.attest.errors import FormatError
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.clock import ClockState
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.kms import PERMANENT
from dstack_emu.deployment.state import Count, GuestState, KmsState, StateModel
from dstack_emu.observability.fault_rules import FaultRulesState, FaultState
from dstack_emu.simulator.intel import IntelState, VendorState
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.transport.validation import describe

FORMAT: Final = "dstack-emu state"
VERSION: Final = 1


class StackState(StateModel):
    """The state of a whole stack."""

    format: Literal["dstack-emu state"] = FORMAT
    version: Literal[1] = VERSION
    seed: str
    release: str
    clock: ClockState
    vendor: VendorState
    platforms: dict[str, PlatformState]
    policies: dict[str, bytes | None]
    faults: tuple[FaultState, ...]
    fault_count: Count
    guests: dict[str, GuestState]
    kms: dict[str, KmsState]
    journal: Count

    @classmethod
    def read(cls, document: Any) -> Self:
        """Validate a document that `save` wrote; raise `ControlError`, which says what is wrong, for any other."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ControlError(f"a document of the format {FORMAT!r} expected: what `save` wrote")
        if document.get("version") != VERSION:
            raise ControlError(f"state: version {VERSION} expected, got {document.get('version')!r:.40}")
        try:
            return cls.model_validate_json(json.dumps(document))
        except ValidationError as error:
            raise ControlError(f"state: {describe(error)}") from error
        except (FormatError, ValueError, RecursionError) as error:
            raise ControlError(f"state: {error}") from error


def capture_state(deployment: Deployment) -> StackState:
    """Return the state of a stack as it is now; raise `StackError` if a KMS of it runs no more."""
    context, instrumentation = deployment.context, deployment.context.instrumentation
    intel, faults = context.intel.capture(), instrumentation.faults.capture()
    state = StackState.model_construct(
        seed=context.config.seed,
        release=context.config.release,
        clock=instrumentation.clock.capture(),
        vendor=intel.vendor,
        platforms=dict(intel.platforms),
        policies=context.policies.capture(),
        faults=faults.faults,
        fault_count=faults.count,
        guests={name: guest.capture() for name, guest in deployment.guests.items()},
        kms={name: kms.capture() for name, kms in deployment.kms.items()},
        journal=instrumentation.journal.capture(),
    )
    instrumentation.clear_caches()
    return state


async def apply_state(deployment: Deployment, state: StackState) -> None:
    """Make a stack what it was when its state was captured, in this process or another of the same seed and release."""
    context, instrumentation = deployment.context, deployment.context.instrumentation
    config = context.config
    for name, theirs, ours in (("seed", state.seed, config.seed), ("release", state.release, config.release)):
        if theirs != ours:
            raise ControlError(f"the state is of a stack with the {name} {theirs!r:.60}, not {ours!r:.60}")
    _require_whole(deployment, state)
    journal = instrumentation.journal
    enabled, journal.enabled = journal.enabled, False  # restoring is no call
    try:
        instrumentation.faults.clear()
        instrumentation.clock.restore(state.clock)
        await _apply_parts(deployment, state)
        context.intel.restore(IntelState(state.vendor, state.platforms))
        context.policies.restore(state.policies)
        for name, kms_state in state.kms.items():
            await deployment.kms[name].restore(kms_state)
        for name, guest_state in state.guests.items():
            await deployment.guests[name].restore(guest_state)
        instrumentation.faults.restore(FaultRulesState(state.fault_count, state.faults))
        instrumentation.clear_caches()
    finally:
        journal.enabled = enabled
    journal.restore(state.journal)


def _require_whole(deployment: Deployment, state: StackState) -> None:
    """Refuse a state that names too little or too much, before anything is changed."""
    permanent = {name for name in deployment.guests if name in ("app", "kms-src", "kms-dst")}
    missing = permanent - state.guests.keys() | {*PERMANENT} - state.kms.keys()
    missing |= {f"kms-{name}" for name in state.kms} - state.guests.keys()
    if missing:
        raise ControlError(f"state: {', '.join(sorted(missing))}: expected, and not there")
    for name, guest in state.guests.items():
        _require_fitting_guest(name, guest, state)
    for name, kms in state.kms.items():
        if kms.spec.name != name:
            raise ControlError(f"state: kms.{name}: fits no KMS")
    policies = {*PERMANENT, *(name for name, kms in state.kms.items() if kms.spec.webhook == "own")}
    if state.policies.keys() != policies:
        raise ControlError(f"state: policies: {', '.join(sorted(policies))} expected")


def _require_fitting_guest(name: str, guest: GuestState, state: StackState) -> None:
    is_of_kms = name.startswith("kms-")  # which makes its keys itself
    fits = guest.keys is None or (not is_of_kms and guest.keys.kms in state.kms)
    if guest.spec.name != name or not fits:
        raise ControlError(f"state: guests.{name}: fits no trust domain")
    if is_of_kms and name[4:] not in state.kms:
        raise ControlError(f"state: guests.{name}: the trust domain of no KMS")


async def _apply_parts(deployment: Deployment, state: StackState) -> None:
    """Stop the parts that are not in the state, or differ in their description, and start those that are missing."""
    for name, kms in list(deployment.kms.items()):
        if name not in state.kms or state.kms[name].spec != kms.spec:
            await deployment.stop_kms(kms)
    for name, guest in list(deployment.guests.items()):
        if name not in state.guests or state.guests[name].spec != guest.spec:
            await deployment.stop_guest(guest)
    for name, kms_state in state.kms.items():
        if name not in deployment.kms:
            await deployment.start_kms(kms_state.spec)
    for name, guest_state in state.guests.items():
        if name not in deployment.guests:
            await deployment.start_guest(guest_state.spec)
