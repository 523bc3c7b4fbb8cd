"""The calls of the control API in Python; `control.server` serves them over HTTP.

Each call has taken effect when it returns. A call that is refused changes nothing.
"""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.strict_json import read_json
from dstack_emu.control.chain import ChainControl
from dstack_emu.control.differences import differences
from dstack_emu.control.evidence import EvidenceControl
from dstack_emu.control.gateway import GatewayControl
from dstack_emu.control.schemas import ControlError, checked, unknown
from dstack_emu.control.snapshots import StackState, apply_state, capture_state
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.health import check_grpc, check_services
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.observability.fault_rules import FaultRule, InstalledRule
from dstack_emu.observability.service_calls import UnknownCallError
from dstack_emu.simulator.errors import GuestError
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.state import MachineState

B = TypeVar("B", bound=BaseModel)

READY = "ready"
"""The name of the snapshot that is taken when a stack is ready; `reset` restores it."""


class Control(ChainControl, EvidenceControl, GatewayControl):
    """The calls that read and change a running deployment. They raise `ControlError` if they are refused."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment)
        self._snapshots: dict[str, StackState] = {}
        self._restoring = asyncio.Lock()

    # ---- the stack

    def describe(self) -> dict[str, Any]:
        """Return the stack's description, as `up --json` printed it, and the parts that were added since."""
        deployment = self._deployment
        return {
            **deployment.description(),
            "guests": {name: self.guest(name) for name in deployment.guests},
            "kms_phases": {name: kms.phase for name, kms in deployment.kms.items()},
            "snapshots": sorted(self._snapshots),
        }

    async def health(self) -> dict[str, str]:
        """Return the health of each service: `ok`, or what is wrong with it."""
        found = await check_services({k: v for k, v in self._deployment.services.items() if k != "control"})
        found |= await check_grpc(self._deployment.grpc)
        return {name: problem or "ok" for name, problem in found.items()}

    def machines(self) -> dict[str, dict[str, Any]]:
        """Return the machines of the VMM by id: what was deployed, and whether it runs; none without a VMM."""
        fleet = self._deployment.machines
        return {} if fleet is None else {name: _machine(each) for name, each in fleet.capture().machines.items()}

    def require_recordable(self, *, call: str = "*", service: str = "*", caller: str = "*", outcome: str = "*") -> None:
        """Refuse names of which the journal can hold no call; a pattern with a wildcard is a name, too."""
        try:
            self._instrumentation.calls.require_recordable(
                self.journal.values, call=call, service=service, caller=caller, outcome=outcome
            )
        except UnknownCallError as error:
            raise ControlError(str(error)) from error

    # ---- snapshots

    def became_ready(self) -> None:
        """Take the snapshot that `reset` restores."""
        self.snapshot(READY)

    def snapshots(self) -> list[str]:
        """Return the names of all snapshots."""
        return sorted(self._snapshots)

    def differences(self, name: str, other: str | None = None) -> list[dict[str, str]]:
        """Return what differs between a snapshot and another one, or the present state; secrets are not shown."""
        one = self._snapshot(name)
        return differences(one, self._capture() if other is None else self._snapshot(other))

    def comparison(self, name: str, other: str | None = None) -> dict[str, Any]:
        """Return the same part by part, for people: policies as diffs, certificates by their fingerprints."""
        # Imported here, because a stack of which nobody compares snapshots starts sooner without it.
        from dstack_emu.control.comparison import comparison

        one = self._snapshot(name)
        return comparison(one, self._capture() if other is None else self._snapshot(other))

    def snapshot_policy(self, name: str, kms: str) -> Any:
        """Return the content of a KMS's policy in a snapshot."""
        policies = self._snapshot(name).policies
        if kms not in policies:
            raise unknown(f"policy in the snapshot {name}:", kms, policies)
        try:
            return read_json(policies[kms] or b"")
        except ValueError as error:
            raise ControlError(f"the policy of {kms} in the snapshot {name} is no JSON: {error}", 409) from error

    def snapshot(self, name: str = "snapshot") -> str:
        """Take a snapshot under a name; replace an existing one of that name."""
        self._snapshots[name] = self._capture()
        return name

    async def revert(self, name: str = "snapshot") -> None:
        """Restore the state of a snapshot."""
        await self._apply(self._snapshot(name))

    async def reset(self) -> None:
        """Restore the state in which the stack became ready."""
        await self.revert(READY)

    def forget_snapshot(self, name: str) -> None:
        """Delete a snapshot."""
        if name == READY:
            raise ControlError("the snapshot `ready` cannot be deleted: `reset` restores it", 409)
        if self._snapshots.pop(name, None) is None:
            raise unknown("snapshot", name, self.snapshots())

    def save(self) -> dict[str, Any]:
        """Return the state of the stack as JSON; it contains the keys of the emulated KMS."""
        return self._capture().model_dump(mode="json")

    async def load(self, document: Any) -> None:
        """Restore the state that `save` returned; an invalid document changes nothing."""
        await self._apply(StackState.read(document))

    def _snapshot(self, name: str) -> StackState:
        if name not in self._snapshots:
            raise unknown("snapshot", name, self.snapshots())
        return self._snapshots[name]

    def _capture(self) -> StackState:
        try:
            return capture_state(self._deployment)
        except StackError as error:
            raise ControlError(str(error), 409) from error

    async def _apply(self, state: StackState) -> None:
        try:
            async with self._restoring:
                await apply_state(self._deployment, state)
        except (StackError, GuestError, KmsError, FormatError, VmmError) as error:
            raise ControlError(f"the state cannot be restored: {error}", 409) from error

    # ---- faults

    def faults(self) -> list[dict[str, Any]]:
        """Return the faults in force, and the number of calls that each has applied to."""
        return [rule.to_json() for rule in self._instrumentation.faults.rules]

    def add_fault(self, **fault: Any) -> InstalledRule:
        """Put a fault in force (fields of `FaultRule`); refuse one that applies to no call of the present services."""
        rule = checked(FaultRule, fault)
        if not rule.later:
            try:
                self._instrumentation.calls.require_target(rule)
            except UnknownCallError as error:
                raise ControlError(f"{error} (with `later` the rule is accepted all the same)") from error
        return self._instrumentation.faults.add(rule)

    def lift_fault(self, fault_id: str) -> None:
        """Lift one fault."""
        faults = self._instrumentation.faults
        if not faults.lift(fault_id):
            raise unknown("fault", fault_id, [rule.id for rule in faults.rules] or ["none is in force"])

    def clear_faults(self) -> None:
        """Lift all faults."""
        self._instrumentation.faults.clear()


def _machine(machine: MachineState) -> dict[str, Any]:
    states = {(True, True): "running", (True, False): "exited", (False, True): "stopping", (False, False): "stopped"}
    manifest = machine.manifest.model_dump(mode="json", by_alias=True)
    return {"status": states[machine.is_started, machine.is_alive], **manifest}
