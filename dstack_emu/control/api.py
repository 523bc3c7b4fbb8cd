"""What a person, or a test, does to a running stack. `control.server` has the same calls over HTTP.

Each call takes effect before it returns, and what it refuses it leaves as it was.
"""

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from dstack_emu.attest.errors import FormatError
from dstack_emu.control.policies import PolicyControl
from dstack_emu.control.schemas import ClockChange, ControlError, Dates, PlatformChange, VendorChange
from dstack_emu.control.snapshots import StackState, apply_state, capture_state
from dstack_emu.deployment.clock import ClockError, StackClock
from dstack_emu.deployment.config import StackError
from dstack_emu.deployment.guests import EventSpec, GuestSpec, RunningGuest, octets, start_guest
from dstack_emu.deployment.health import ask_grpc, ask_services
from dstack_emu.deployment.kms import KmsSpec, RunningKms, remove_kms, start_kms
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.observability.fault_rules import FaultRule, InstalledRule
from dstack_emu.observability.journal import Journal
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.intel import VendorState
from dstack_emu.simulator.platform import Platform, PlatformState
from dstack_emu.transport.validation import describe

if TYPE_CHECKING:
    from dstack_emu.deployment.stack import Stack

B = TypeVar("B", bound=BaseModel)

READY = "ready"
"""The snapshot that a stack makes of itself when it is ready; `reset` goes back to it."""


class Control(PolicyControl):
    """One stack, in the hands of a person."""

    def __init__(self, stack: "Stack") -> None:
        super().__init__(stack)
        self._snapshots: dict[str, StackState] = {}
        self._going_back = asyncio.Lock()

    # ---- what there is

    def describe(self) -> dict[str, Any]:
        """The stack's description, as `up --json` printed it, and what was made since."""
        stack = self._stack
        return {
            **stack.description(),
            "guests": {name: self.guest(name) for name in stack.guests},
            "kms_phases": {side: kms.phase for side, kms in stack.kms.items()},
            "snapshots": sorted(self._snapshots),
        }

    async def health(self) -> dict[str, str]:
        """What each service answers: `ok`, or what is wrong with it."""
        found = await ask_services({k: v for k, v in self._stack.services.items() if k != "control"})
        found |= await ask_grpc(self._stack.grpc)
        return {name: problem or "ok" for name, problem in found.items()}

    @property
    def journal(self) -> Journal:
        """The record of every call."""
        return self._stack.world.journal

    # ---- machines, and what their vendor says

    def platforms(self) -> dict[str, dict[str, Any]]:
        """Every machine there is, by name."""
        return {name: _platform(platform) for name, platform in self._stack.intel.platforms.items()}

    def platform(self, name: str) -> dict[str, Any]:
        """One machine."""
        return _platform(self._known_platform(name))

    def add_platform(self, name: str) -> dict[str, Any]:
        """Make a machine (or find it: a name is always the same machine)."""
        if not 1 <= len(name) <= 200 or not name.isprintable():
            raise ControlError(f"platform: a name of 1 to 200 characters expected, got {name!r:.60}")
        return _platform(self._stack.intel.platform(name))

    def set_platform(self, name: str, **changes: Any) -> dict[str, Any]:
        """Change what holds for one machine; its collateral and quotes follow at once."""
        platform = self._known_platform(name)
        given = _checked(PlatformChange, changes)
        platform.state = dataclasses.replace(platform.state, **given.model_dump(exclude_none=True))
        return _platform(platform)

    def vendor(self) -> dict[str, Any]:
        """What the vendor says for all machines."""
        return dataclasses.asdict(self._stack.intel.state)

    def set_vendor(self, **changes: Any) -> dict[str, Any]:
        """Change what the vendor says for all machines; its documents follow at once."""
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
            self._stack.intel.state = dataclasses.replace(self._stack.intel.state, **fields)
        except FormatError as error:
            raise ControlError(str(error)) from error
        return self.vendor()

    def _known_platform(self, name: str) -> Platform:
        platform = self._stack.intel.platforms.get(name)
        if platform is None:
            raise ControlError(f"there is no platform {name!r:.60}: {', '.join(self._stack.intel.platforms)}", 404)
        return platform

    # ---- time

    @property
    def time(self) -> StackClock:
        """The clock itself."""
        return self._stack.world.clock

    def clock(self) -> dict[str, Any]:
        """What the clock shows."""
        return {"now": self.time(), "frozen": self.time.is_frozen, "touched": self.time.is_touched}

    def set_clock(self, **change: Any) -> dict[str, Any]:
        """Do one thing to the clock: `set`, `advance`, `freeze`, `resume` or `follow_the_wall`."""
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

    # ---- going back

    def became_ready(self) -> None:
        """Keep what the stack is now, for `reset`."""
        self.snapshot(READY)

    def snapshots(self) -> list[str]:
        """The names of what there is to go back to."""
        return sorted(self._snapshots)

    def snapshot(self, name: str = "snapshot") -> str:
        """Keep what the stack is now under a name."""
        self._snapshots[name] = capture_state(self._stack)
        return name

    async def revert(self, name: str = "snapshot") -> None:
        """Make the stack what it was when that snapshot was made."""
        if name not in self._snapshots:
            raise ControlError(f"there is no snapshot {name!r:.60}: {', '.join(self.snapshots())}", 404)
        await self._apply(self._snapshots[name])

    async def reset(self) -> None:
        """Make the stack what it was when it became ready."""
        await self.revert(READY)

    def forget_snapshot(self, name: str) -> None:
        """Let a snapshot go."""
        if name == READY:
            raise ControlError("the snapshot `ready` is what reset goes back to: it stays", 409)
        if self._snapshots.pop(name, None) is None:
            raise ControlError(f"there is no snapshot {name!r:.60}: {', '.join(self.snapshots())}", 404)

    def save(self) -> dict[str, Any]:
        """What the stack is now, as JSON; it holds the emulated KMS's keys."""
        return capture_state(self._stack).model_dump(mode="json")

    async def load(self, document: Any) -> None:
        """Make the stack what it was when `save` gave that; a document that is none changes nothing."""
        await self._apply(StackState.read(document))

    async def _apply(self, state: StackState) -> None:
        try:
            async with self._going_back:
                await apply_state(self._stack, state)
        except (StackError, GuestError, KmsError, FormatError) as error:
            raise ControlError(f"the state cannot be restored: {error}", 409) from error

    # ---- who there is

    def guest(self, name: str) -> dict[str, Any]:
        """One trust domain: what it measures, and where its agent answers."""
        guest = self._known_guest(name)
        info, folder = guest.agent.app_info(), guest.folder
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
            "dstack_sock": str(folder / "dstack.sock"),
            "tappd_sock": str(folder / "tappd.sock"),
        }

    async def add_guest(self, name: str, **spec: Any) -> dict[str, Any]:
        """Make a trust domain (fields of `GuestSpec`), powered on and without keys, with an agent that answers."""
        given = _checked(GuestSpec, {"name": name, **spec})
        if name.startswith("kms-"):
            raise ControlError("a trust domain kms-… belongs to a KMS: make a KMS")
        if name in self._stack.services or name in self._stack.guests:
            raise ControlError(f"there is a service {name} already", 409)
        try:
            await start_guest(self._stack, given, name)
        except (GuestError, FormatError) as error:
            raise ControlError(str(error)) from error
        return self.guest(name)

    async def boot_guest(self, name: str, kms: str = "src") -> dict[str, Any]:
        """Let a trust domain fetch its keys from a KMS; a refusal has the status 403 and the KMS's own words.

        One that has keys already is powered on anew first.
        """
        guest = self._known_guest(name)
        server = self._stack.kms.get(kms)
        if guest.name.startswith("kms-"):
            raise ControlError(f"{name} is a KMS's trust domain: it makes its keys itself")
        if server is None:
            raise ControlError(f"there is no KMS {kms!r:.60}: {', '.join(self._stack.kms)}", 404)
        if server.phase != "runtime":
            raise ControlError(f"kms-{kms} has no keys to give: it is in its {server.phase} phase", 409)
        before = guest.domain.capture()
        if guest.agent.has_keys:
            guest.domain.restore(guest.spec.power_on(self._stack).capture())
        try:
            await guest.boot(self._stack, kms)
        except (GuestError, FormatError) as error:
            guest.domain.restore(before)
            raise ControlError(str(error), 403) from error
        return self.guest(name)

    def emit_event(self, name: str, event: str, payload: str = "", *, measured: bool = True) -> dict[str, Any]:
        """Extend a trust domain's RTMR3 with an event; with `measured` false its log claims it falsely."""
        given, domain = _checked(EventSpec, {"event": event, "payload": payload}), self._known_guest(name).domain
        (domain.measure if measured else domain.claim)(given.event, octets(given.payload))
        return self.guest(name)

    async def remove_guest(self, name: str) -> None:
        """Switch a trust domain off that was made while the stack ran."""
        guest = self._known_guest(name)
        if name == "app" or name.startswith("kms-"):
            raise ControlError(f"{name} is part of the stack: it stays", 409)
        await self.end_guest(guest)

    async def end_guest(self, guest: RunningGuest) -> None:
        """Stop a trust domain and forget it."""
        await guest.close()
        self._stack.guests.pop(guest.name, None)
        self._stack.services.pop(guest.service, None)

    async def add_kms(self, name: str, **spec: Any) -> dict[str, Any]:
        """Make a KMS without keys (fields of `KmsSpec`); `onboard_kms` gives it some."""
        given = _checked(KmsSpec, {"name": name, **spec})
        if name in self._stack.kms:
            raise ControlError(f"there is a KMS {name} already", 409)
        try:
            await start_kms(self._stack, given)
            self._stack.kms_info[name] = await self._stack.measure(name)
        except (StackError, KmsError, FormatError) as error:
            if (kms := self._stack.kms_parts.get(name)) is not None:
                await remove_kms(self._stack, kms)
            raise ControlError(str(error)) from error
        return self.kms(name)

    async def onboard_kms(self, name: str, source: str | None = "src") -> dict[str, Any]:
        """Let a fresh KMS take another's keys over, or (`source` None) make new ones, and end its onboard phase.

        A refusal has the status 403 and the KMS's own words.
        """
        self._known_kms(name)
        if source is not None:
            self._known_kms(source)
        if self._stack.kms[name].phase != "onboard":
            raise ControlError(f"kms-{name} has keys already: it is in its {self._stack.kms[name].phase} phase", 409)
        try:
            await self._stack.give_keys(name, source)
        except StackError as error:
            raise ControlError(str(error), 403) from error
        return self.kms(name)

    def all_kms(self) -> dict[str, dict[str, Any]]:
        """Every KMS, by name."""
        return {name: self.kms(name) for name in self._stack.kms_parts}

    def kms(self, name: str) -> dict[str, Any]:
        """One KMS: its phase, where it answers and what it measures."""
        part, stack = self._known_kms(name), self._stack
        return {
            "name": name,
            "phase": stack.kms[name].phase,
            "url": stack.services[f"kms-{name}"],
            "webhook": part.spec.webhook,
            "policy": str(stack.policies[name]) if name in stack.policies else None,
            "certs": str(part.certs),
            "guest": self.guest(part.guest.name),
        }

    async def remove_kms(self, name: str) -> None:
        """Stop a KMS that was made while the stack ran."""
        part = self._known_kms(name)
        if name in ("src", "dst"):
            raise ControlError(f"kms-{name} is part of the stack: it stays", 409)
        await remove_kms(self._stack, part)

    def _known_kms(self, name: str) -> RunningKms:
        part = self._stack.kms_parts.get(name)
        if part is None:
            raise ControlError(f"there is no KMS {name!r:.60}: {', '.join(self._stack.kms_parts)}", 404)
        return part

    # ---- what goes wrong

    def faults(self) -> list[dict[str, Any]]:
        """The faults in force, and what they have met."""
        return [rule.to_json() for rule in self._stack.world.faults.rules]

    def add_fault(self, **fault: Any) -> InstalledRule:
        """Put a fault in force (fields of `FaultRule`)."""
        return self._stack.world.faults.add(_checked(FaultRule, fault))

    def lift_fault(self, fault_id: str) -> None:
        """Take one out of force."""
        if not self._stack.world.faults.lift(fault_id):
            raise ControlError(f"there is no fault {fault_id!r:.60}", 404)

    def clear_faults(self) -> None:
        """Take all out of force."""
        self._stack.world.faults.clear()


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
