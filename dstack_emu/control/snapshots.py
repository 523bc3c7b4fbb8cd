"""Snapshots: the state of a whole stack as data, which can be saved to a file and restored.

It consists of the states of the parts (`deployment.state`): the policy files, the vendor's state, the clock, faults,
each trust domain's log and keys, each KMS's phase and folder, the machines of the VMM, what the gateway has
registered, the transactions of the stack's own chain, and the positions of every
random stream and of the journal. It does not contain what the seed determines, ports, or connections. Capturing and
restoring both empty the caches of collateral, so that the requests that follow are the same.

Restoring changes only what differs. A KMS whose keys have changed since is restarted, which takes about ten
milliseconds more; so does a trust domain or a KMS that has to be started again.
"""

import json
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError

from dstack_emu.attest.errors import FormatError
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.clock import ClockState
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.gateway_names import GATEWAY
from dstack_emu.deployment.running_kms import PERMANENT
from dstack_emu.deployment.state import Count, GuestState, KmsState, StateModel
from dstack_emu.gateway.state import GatewayState
from dstack_emu.observability.fault_rules import FaultRulesState, FaultState
from dstack_emu.simulator.intel import IntelState
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.vendor_state import VendorState
from dstack_emu.transport.urls import shown_url
from dstack_emu.transport.validation import describe
from dstack_emu.vmm.state import FleetState

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
    machines: FleetState | None = None
    gateway: GatewayState | None = None
    txt_records: dict[str, str] = Field(default_factory=dict)
    chain: tuple[dict[str, Any], ...] | None = None

    @classmethod
    def read(cls, document: Any) -> Self:
        """Validate a document that `save` returned; raise `ControlError`, which says what is wrong, for any other."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ControlError(f"a document of the format {FORMAT!r} expected, as `ctl save` writes it")
        if document.get("version") != VERSION:
            raise ControlError(f"state: version {VERSION} expected, got {document.get('version')!r:.40}")
        try:
            return cls.model_validate_json(json.dumps(document))
        except ValidationError as error:
            raise ControlError(f"state: {describe(error)}") from error
        except (FormatError, ValueError, RecursionError) as error:
            raise ControlError(f"state: {error}") from error


def capture_state(deployment: Deployment) -> StackState:
    """Return the present state of a stack; raise `StackError` if one of its KMS does not run."""
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
        machines=None if deployment.machines is None else deployment.machines.capture(),
        gateway=None if deployment.gateway is None else deployment.gateway.capture(),
        chain=None if context.chain is None else context.chain.capture(),
        txt_records={} if deployment.gateway is None else dict(deployment.gateway.txt_records),
    )
    instrumentation.clear_caches()
    return state


async def apply_state(deployment: Deployment, state: StackState) -> None:
    """Restore a captured state, which may be of another process with the same seed and release.

    Raises `ControlError` if the state does not fit this stack; then nothing has changed.
    """
    context, instrumentation = deployment.context, deployment.context.instrumentation
    config = context.config
    for name, theirs, ours in (("seed", state.seed, config.seed), ("release", state.release, config.release)):
        if theirs != ours:
            raise ControlError(f"the state is of a stack with the {name} {theirs!r:.60}, not {ours!r:.60}")
    _require_whole(deployment, state)
    for name, kms_state in state.kms.items():
        if (running := deployment.kms.get(name)) is not None:
            await running.require_restorable(kms_state)
    if context.chain is not None:
        context.chain.read_state(state.chain or ())
    journal = instrumentation.journal
    enabled, journal.enabled = journal.enabled, False  # the calls of restoring are not recorded
    try:
        instrumentation.faults.clear()
        instrumentation.clock.restore(state.clock)
        await _apply_parts(deployment, state)
        context.intel.restore(IntelState(state.vendor, state.platforms))
        context.policies.restore(state.policies)
        if context.chain is not None:
            context.chain.restore(state.chain or ())
        of_kms = [f"kms-{name}" for name in state.kms]
        for name in of_kms:  # a KMS that starts anew quotes from its trust domain
            await deployment.guests[name].restore(state.guests[name])
        for name, kms_state in state.kms.items():
            await deployment.kms[name].restore(kms_state)
        for name, guest_state in state.guests.items():
            if name not in of_kms:
                await deployment.guests[name].restore(guest_state)
        if deployment.gateway is not None:
            await deployment.gateway.restore(state.gateway)
            deployment.gateway.txt_records.clear()
            deployment.gateway.txt_records.update(state.txt_records)
        if deployment.machines is not None:
            await deployment.machines.restore(state.machines or FleetState())
        instrumentation.faults.restore(FaultRulesState(state.fault_count, state.faults))
        instrumentation.clear_caches()
        deployment.remember_added()
    finally:
        journal.enabled = enabled
    journal.restore(state.journal)


def _require_whole(deployment: Deployment, state: StackState) -> None:
    """Raise `ControlError` if a part is missing from a state, or a part in it belongs to nothing."""
    permanent = {name for name in deployment.guests if name in ("app", "kms-src", "kms-dst")}
    missing = permanent - state.guests.keys() | {*PERMANENT} - state.kms.keys()
    missing |= {f"kms-{name}" for name in state.kms} - state.guests.keys()
    if missing:
        raise ControlError(f"state: {', '.join(sorted(missing))}: missing")
    own = deployment.app
    if own.name in state.guests and state.guests[own.name].spec != own.spec:
        raise ControlError(
            "the state is of a stack with another app: start this one with its app-compose and user-config"
        )
    for name, guest in state.guests.items():
        _require_fitting_guest(name, guest, state)
    for name, kms in state.kms.items():
        if kms.spec.name != name:
            raise ControlError(f"state: kms.{name}: describes the KMS {kms.spec.name!r:.60}")
    for name in PERMANENT:
        theirs, ours = state.kms[name].spec.webhook, deployment.kms[name].spec.webhook
        if theirs != ours:
            asked = f"{shown_url(theirs)!r:.200}, not {shown_url(ours)!r:.200}"
            raise ControlError(f"the state is of a stack in which the webhook of kms-{name} is {asked}")
    if state.machines is not None and state.machines.machines and deployment.machines is None:
        raise ControlError("the state has machines of a VMM: start this stack with --vmm")
    if (GATEWAY in state.guests) != (deployment.gateway is not None):
        has, option = ("a", "with") if GATEWAY in state.guests else ("no", "without")
        raise ControlError(f"the state is of a stack with {has} gateway: start this one {option} --gateway")
    chain_of = deployment.context.chain_of
    if (state.chain is None) != (deployment.context.chain is None):
        has, option = ("no", "without") if state.chain is None else ("a", "with")
        raise ControlError(f"the state is of a stack with {has} chain of its own: start this one {option} --auth eth")
    policies = {name for name, kms in state.kms.items() if kms.spec.webhook == "own" and chain_of(name) is None}
    if state.policies.keys() != policies:
        raise ControlError(f"state: policies: {', '.join(sorted(policies))} expected")


def _require_fitting_guest(name: str, guest: GuestState, state: StackState) -> None:
    is_of_kms = name.startswith("kms-")  # a KMS generates its own keys
    fits = guest.keys is None or (not is_of_kms and guest.keys.kms in state.kms)
    if guest.spec.name != name or not fits:
        raise ControlError(f"state: guests.{name}: its name or the KMS of its keys does not fit")
    if is_of_kms and name[4:] not in state.kms:
        raise ControlError(f"state: guests.{name}: there is no KMS {name[4:]!r:.60} in the state")


async def _apply_parts(deployment: Deployment, state: StackState) -> None:
    """Stop the parts that are not in the state or have another specification there; start those that are missing."""
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
