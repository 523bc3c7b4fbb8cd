"""The calls of the control API that read and change platforms, their vendor, and the clock of a running stack."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.moment import iso
from dstack_emu.control.certificates import decoded_certificates
from dstack_emu.control.policies import PolicyControl
from dstack_emu.control.schemas import ClockChange, ControlError, Dates, PlatformChange, VendorChange, checked, unknown
from dstack_emu.deployment.clock import ClockError, StackClock
from dstack_emu.deployment.instrumentation import Instrumentation
from dstack_emu.simulator.platform import Platform, PlatformState
from dstack_emu.simulator.vendor_state import Validity, VendorState


class VendorControl(PolicyControl):
    """The calls about platforms, the vendor and the clock. They raise `ControlError` if they are refused."""

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
        given = checked(PlatformChange, changes)
        platform.state = dataclasses.replace(platform.state, **given.model_dump(exclude_none=True))
        return {**_platform(platform), **self._settled((platform,))}

    def vendor(self) -> dict[str, Any]:
        """Return the vendor's state, which applies to all platforms."""
        state = self._deployment.intel.state
        return {f.name: _shown(getattr(state, f.name)) for f in dataclasses.fields(state)}

    def certificates(self) -> dict[str, Any]:
        """Return the root certificate of the emulated Intel, decoded, by file."""
        return decoded_certificates([self._deployment.root_ca])

    def set_vendor(self, **changes: Any) -> dict[str, Any]:
        """Change the vendor's state for all platforms; its next documents have the new state."""
        given = checked(VendorChange, changes)
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
        return {**self.vendor(), **self._settled(self._deployment.intel.platforms.values())}

    def _settled(self, changed: Iterable[Platform]) -> dict[str, str]:
        """Return a note about the KMS whose judgement of themselves a change of their platforms does not reach."""
        kms = [each for each in self._deployment.kms.values() if each.guest.domain.platform in set(changed)]
        names = [each.name for each in kms if each.has_judged_itself]
        if not names:
            return {}
        services, restarts = (
            ", ".join(f"kms-{name}" for name in names),
            ", ".join(f"`ctl kms restart {n}`" for n in names),
        )
        return {
            "note": f"{services}: a KMS verifies its own evidence once in the life of its process, as upstream's does, "
            f"and has done so; {restarts} makes it verify the present state"
        }

    def _known_platform(self, name: str) -> Platform:
        platform = self._deployment.intel.platforms.get(name)
        if platform is None:
            raise unknown("platform", name, self._deployment.intel.platforms)
        return platform

    # ---- time

    @property
    def time(self) -> StackClock:
        """The stack's clock."""
        return self._instrumentation.clock

    def clock(self) -> dict[str, Any]:
        """Return the clock's time, and whether it is frozen or was ever changed."""
        return {
            "now": self.time(),
            "time": iso(self.time()),
            "frozen": self.time.is_frozen,
            "touched": self.time.is_touched,
        }

    def set_clock(self, **change: Any) -> dict[str, Any]:
        """Change the clock in one way: `set`, `advance`, `freeze`, `resume` or `follow_the_wall`."""
        given, clock = checked(ClockChange, change), self.time
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


def _platform(platform: Platform) -> dict[str, Any]:
    state: PlatformState = platform.state
    return {
        "name": platform.name,
        "device_id": platform.device_id.hex(),
        "fmspc": platform.fmspc.hex(),
        **dataclasses.asdict(state),
    }


def _shown(value: Any) -> Any:
    """Return a field of the vendor's state as JSON, with dates as ISO 8601."""
    if isinstance(value, Validity):
        return {"issued": iso(value.issued), "next_update": iso(value.next_update)}
    return value
