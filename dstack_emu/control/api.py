"""The calls of the control API in Python; `control.server` serves them over HTTP.

Each call has taken effect when it returns. A call that is refused changes nothing.
"""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.control.policies import PolicyControl
from dstack_emu.control.schemas import ClockChange, ControlError, Dates, PlatformChange, VendorChange
from dstack_emu.control.snapshots import StackState, apply_state, capture_state
from dstack_emu.deployment.clock import ClockError, StackClock
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.health import check_grpc, check_services
from dstack_emu.deployment.instrumentation import Instrumentation
from dstack_emu.deployment.kms import PERMANENT, RunningKms
from dstack_emu.deployment.specs import EventSpec, GuestSpec, KmsSpec
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.observability.fault_rules import FaultRule, InstalledRule
from dstack_emu.observability.journal import Journal
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.intel import VendorState
from dstack_emu.simulator.platform import Platform, PlatformState
from dstack_emu.transport.urls import shown_url
from dstack_emu.transport.validation import describe

B = TypeVar("B", bound=BaseModel)

READY = "ready"
"""The name of the snapshot that is taken when a stack is ready; `reset` restores it."""


class Control(PolicyControl):
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
            "kms_phases": {name: kms.server.phase for name, kms in deployment.kms.items()},
            "snapshots": sorted(self._snapshots),
        }

    async def health(self) -> dict[str, str]:
        """Return the health of each service: `ok`, or what is wrong with it."""
        found = await check_services({k: v for k, v in self._deployment.services.items() if k != "control"})
        found |= await check_grpc(self._deployment.grpc)
        return {name: problem or "ok" for name, problem in found.items()}

    @property
    def journal(self) -> Journal:
        """The journal, which records every call."""
        return self._instrumentation.journal

    @property
    def _instrumentation(self) -> Instrumentation:
        return self._deployment.context.instrumentation

    # ---- platforms and their vendor

    def platforms(self) -> dict[str, dict[str, Any]]:
        """Return every platform, by name."""
        return {name: _platform(platform) for name, platform in self._deployment.intel.platforms.items()}

    def platform(self, name: str) -> dict[str, Any]:
        """Return one platform."""
        return _platform(self._known_platform(name))

    def add_platform(self, name: str) -> dict[str, Any]:
        """Return the platform of that name; add it if there is none."""
        if not 1 <= len(name) <= 200 or not name.isprintable():
            raise ControlError(f"platform: a name of 1 to 200 characters expected, got {name!r:.60}")
        return _platform(self._deployment.intel.platform(name))

    def set_platform(self, name: str, **changes: Any) -> dict[str, Any]:
        """Change the state of one platform; its next quotes and collateral have the new state."""
        platform = self._known_platform(name)
        given = _checked(PlatformChange, changes)
        platform.state = dataclasses.replace(platform.state, **given.model_dump(exclude_none=True))
        return _platform(platform)

    def vendor(self) -> dict[str, Any]:
        """Return the vendor's state, which applies to all platforms."""
        return dataclasses.asdict(self._deployment.intel.state)

    def set_vendor(self, **changes: Any) -> dict[str, Any]:
        """Change the vendor's state for all platforms; its next documents have the new state."""
        given = _checked(VendorChange, changes)
        fields = {name: getattr(given, name) for name in given.model_fields_set if getattr(given, name) is not None}
        for_all = fields.pop("collateral", None)
        until = fields.pop("collateral_until", None)
        if until is not None:
            for_all = Dates(next_update=until)
        if for_all is not None:
            fields = {f.name: for_all for f in dataclasses.fields(VendorState) if f.name.endswith("_dating")} | fields
        try:
            fields = {n: value.validity() if isinstance(value, Dates) else value for n, value in fields.items()}
            self._deployment.intel.state = dataclasses.replace(self._deployment.intel.state, **fields)
        except FormatError as error:
            raise ControlError(str(error)) from error
        return self.vendor()

    def _known_platform(self, name: str) -> Platform:
        platform = self._deployment.intel.platforms.get(name)
        if platform is None:
            raise ControlError(f"there is no platform {name!r:.60}: {', '.join(self._deployment.intel.platforms)}", 404)
        return platform

    # ---- time

    @property
    def time(self) -> StackClock:
        """The stack's clock."""
        return self._instrumentation.clock

    def clock(self) -> dict[str, Any]:
        """Return the clock's time, and whether it is frozen or was ever changed."""
        return {"now": self.time(), "frozen": self.time.is_frozen, "touched": self.time.is_touched}

    def set_clock(self, **change: Any) -> dict[str, Any]:
        """Change the clock in one way: `set`, `advance`, `freeze`, `resume` or `follow_the_wall`."""
        given, clock = _checked(ClockChange, change), self.time
        try:
            if given.set is not None:
                clock.set(given.set)
            elif given.advance is not None:
                clock.advance(given.advance)
            elif given.freeze is not None:
                clock.freeze(None if given.freeze is True else given.freeze)
            elif given.resume:
                clock.resume()
            else:
                clock.follow_the_wall()
        except ClockError as error:
            raise ControlError(str(error)) from error
        return self.clock()

    # ---- snapshots

    def became_ready(self) -> None:
        """Take the snapshot that `reset` restores."""
        self.snapshot(READY)

    def snapshots(self) -> list[str]:
        """Return the names of all snapshots."""
        return sorted(self._snapshots)

    def snapshot(self, name: str = "snapshot") -> str:
        """Take a snapshot under a name; replace an existing one of that name."""
        self._snapshots[name] = self._capture()
        return name

    async def revert(self, name: str = "snapshot") -> None:
        """Restore the state of a snapshot."""
        if name not in self._snapshots:
            raise ControlError(f"there is no snapshot {name!r:.60}: {', '.join(self.snapshots())}", 404)
        await self._apply(self._snapshots[name])

    async def reset(self) -> None:
        """Restore the state in which the stack became ready."""
        await self.revert(READY)

    def forget_snapshot(self, name: str) -> None:
        """Delete a snapshot."""
        if name == READY:
            raise ControlError("the snapshot `ready` cannot be deleted: `reset` restores it", 409)
        if self._snapshots.pop(name, None) is None:
            raise ControlError(f"there is no snapshot {name!r:.60}: {', '.join(self.snapshots())}", 404)

    def save(self) -> dict[str, Any]:
        """Return the state of the stack as JSON; it contains the keys of the emulated KMS."""
        return self._capture().model_dump(mode="json")

    async def load(self, document: Any) -> None:
        """Restore the state that `save` returned; an invalid document changes nothing."""
        await self._apply(StackState.read(document))

    def _capture(self) -> StackState:
        try:
            return capture_state(self._deployment)
        except StackError as error:
            raise ControlError(str(error), 409) from error

    async def _apply(self, state: StackState) -> None:
        try:
            async with self._restoring:
                await apply_state(self._deployment, state)
        except (StackError, GuestError, KmsError, FormatError) as error:
            raise ControlError(f"the state cannot be restored: {error}", 409) from error

    # ---- trust domains

    def guest(self, name: str) -> dict[str, Any]:
        """Return one trust domain: what it measures, and where its agent answers."""
        guest = self._known_guest(name)
        info = guest.agent.app_info()
        return {
            "name": name,
            "app_id": info.app_id.hex(),
            "instance_id": info.instance_id.hex(),
            "compose_hash": info.compose_hash.hex(),
            "device_id": info.device_id.hex(),
            "mr_aggregated": info.mr_aggregated.hex(),
            "os_image_hash": info.os_image_hash.hex(),
            "platform": guest.domain.platform.name,
            "has_keys": guest.agent.has_keys,
            "url": guest.url,
            "dstack_sock": str(guest.dstack_sock),
            "tappd_sock": str(guest.tappd_sock),
            "decrypted_env": None if guest.decrypted_env is None else str(guest.decrypted_env),
        }

    async def add_guest(self, name: str, **spec: Any) -> dict[str, Any]:
        """Add a trust domain (fields of `GuestSpec`); it is powered on, has no keys yet, and its agent runs."""
        given = _checked(GuestSpec, {"name": name, **spec})
        if name.startswith("kms-"):
            raise ControlError("a trust domain named kms-… belongs to a KMS: add the KMS, which creates it")
        if name in self._deployment.services or name in self._deployment.guests:
            raise ControlError(f"there is a service {name} already: choose another name", 409)
        try:
            await self._deployment.start_guest(given)
        except (GuestError, FormatError) as error:
            raise ControlError(str(error)) from error
        return self.guest(name)

    async def boot_guest(self, name: str, kms: str | Sequence[str] = "src") -> dict[str, Any]:
        """Let a trust domain fetch its keys from a KMS, or from the first of several that releases them.

        If it has keys already, it is power-cycled first. A refusal by the KMS has status 403 and the KMS's text.
        """
        guest = self._known_guest(name)
        if guest.name.startswith("kms-"):
            raise ControlError(f"{name} is the trust domain of a KMS, which gets its keys by onboarding, not by boot")
        names = (kms,) if isinstance(kms, str) else tuple(kms)
        phases = [self._known_kms(each).server.phase for each in names]
        if "runtime" not in phases:
            raise ControlError(f"kms-{names[0]} has no keys: it is in its {phases[0]} phase, onboard it first", 409)
        before = guest.domain.capture()
        if guest.agent.has_keys:
            guest.power_cycle()
        try:
            await self._deployment.boot(guest, names)
        except (GuestError, FormatError) as error:
            guest.domain.restore(before)
            raise ControlError(str(error), 403) from error
        return self.guest(name)

    def emit_event(self, name: str, event: str, payload: str = "", *, measured: bool = True) -> dict[str, Any]:
        """Extend a trust domain's RTMR3 with an event; with `measured` false, add it to the log only."""
        given, domain = _checked(EventSpec, {"event": event, "payload": payload}), self._known_guest(name).domain
        (domain.measure if measured else domain.claim)(given.event, decode_hex(given.payload))
        return self.guest(name)

    async def remove_guest(self, name: str) -> None:
        """Stop a trust domain that was added while the stack ran."""
        guest = self._known_guest(name)
        if name == "app" or name.startswith("kms-"):
            raise ControlError(f"{name} is part of every stack and cannot be removed", 409)
        await self._deployment.stop_guest(guest)

    # ---- KMS

    async def add_kms(self, name: str, **spec: Any) -> dict[str, Any]:
        """Add a KMS without keys (fields of `KmsSpec`); `onboard_kms` gives it keys."""
        given, deployment = _checked(KmsSpec, {"name": name, **spec}), self._deployment
        if name in deployment.kms:
            raise ControlError(f"there is a KMS {name} already: choose another name", 409)
        try:
            kms = await deployment.start_kms(given)
        except (StackError, KmsError, FormatError) as error:
            raise ControlError(str(error)) from error
        try:
            kms.measured = await kms.onboarding.measure()
        except StackError as error:
            await deployment.stop_kms(kms)
            raise ControlError(str(error)) from error
        return self.kms(name)

    async def onboard_kms(self, name: str, source: str | None = "src") -> dict[str, Any]:
        """Onboard a KMS without keys from another KMS, or with `source` None bootstrap it; end its onboard phase.

        A refusal by a KMS has status 403 and the KMS's text.
        """
        kms = self._known_kms(name)
        source_url = None if source is None else self._known_kms(source).url
        if kms.server.phase != "onboard":
            raise ControlError(f"kms-{name} has keys already: it is in its {kms.server.phase} phase", 409)
        try:
            if source_url is None:
                await kms.onboarding.bootstrap()
            else:
                await kms.onboarding.onboard(source_url)
        except StackError as error:
            raise ControlError(str(error), 403) from error
        return self.kms(name)

    def all_kms(self) -> dict[str, dict[str, Any]]:
        """Return every KMS, by name."""
        return {name: self.kms(name) for name in self._deployment.kms}

    def kms(self, name: str) -> dict[str, Any]:
        """Return one KMS: its phase, its URL, its webhook and its trust domain."""
        kms, policies = self._known_kms(name), self._deployment.policies
        return {
            "name": name,
            "phase": kms.server.phase,
            "url": kms.url,
            "webhook": shown_url(kms.spec.webhook),
            "policy": str(policies[name]) if name in policies else None,
            "certs": str(kms.cert_dir),
            "guest": self.guest(kms.guest.name),
        }

    async def remove_kms(self, name: str) -> None:
        """Stop a KMS that was added while the stack ran."""
        kms = self._known_kms(name)
        if name in PERMANENT:
            raise ControlError(f"kms-{name} is part of every stack and cannot be removed", 409)
        await self._deployment.stop_kms(kms)

    def _known_kms(self, name: str) -> RunningKms:
        kms = self._deployment.kms.get(name)
        if kms is None:
            raise ControlError(f"there is no KMS {name!r:.60}: {', '.join(self._deployment.kms)}", 404)
        return kms

    # ---- faults

    def faults(self) -> list[dict[str, Any]]:
        """Return the faults in force, and the number of calls that each has applied to."""
        return [rule.to_json() for rule in self._instrumentation.faults.rules]

    def add_fault(self, **fault: Any) -> InstalledRule:
        """Put a fault in force (fields of `FaultRule`)."""
        return self._instrumentation.faults.add(_checked(FaultRule, fault))

    def lift_fault(self, fault_id: str) -> None:
        """Lift one fault."""
        faults = self._instrumentation.faults
        if not faults.lift(fault_id):
            in_force = ", ".join(rule.id for rule in faults.rules) or "none is in force"
            raise ControlError(f"there is no fault {fault_id!r:.60}: {in_force}", 404)

    def clear_faults(self) -> None:
        """Lift all faults."""
        self._instrumentation.faults.clear()


def _platform(platform: Platform) -> dict[str, Any]:
    state: PlatformState = platform.state
    return {
        "name": platform.name,
        "device_id": platform.device_id.hex(),
        "fmspc": platform.fmspc.hex(),
        **dataclasses.asdict(state),
    }


def _checked(model: type[B], fields: Mapping[str, Any]) -> B:
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        raise ControlError(describe(error)) from error
