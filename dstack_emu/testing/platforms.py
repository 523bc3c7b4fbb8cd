"""The platforms of a test's stack, their vendor, and OS images."""

from dataclasses import dataclass
from typing import Any, Self

from dstack_emu.testing.access import StackAccess


@dataclass(frozen=True, slots=True)
class LiveImage:
    """An OS image: the name and version that it is generated from, and its hash (hex). No name: the stack's own."""

    name: str | None
    version: str
    os_image_hash: str


class LivePlatform:
    """A platform."""

    def __init__(self, access: StackAccess, name: str) -> None:
        self._access, self.name = access, name

    @property
    def state(self) -> dict[str, Any]:
        """Its state: the fields that `set` takes, and its `device_id` and `fmspc`."""
        state: dict[str, Any] = self._access.control.platform(self.name)
        return state

    @property
    def device_id(self) -> str:
        """The device id that webhooks receive (hex)."""
        return str(self.state["device_id"])

    def set(self, **changes: Any) -> Self:
        """Change its state (docs/control.md has the fields); its next quotes and collateral have the new state."""
        self._access.control.set_platform(self.name, **changes)
        return self


class LiveVendor:
    """The state of the emulated Intel, which applies to all platforms."""

    def __init__(self, access: StackAccess) -> None:
        self._access = access

    @property
    def state(self) -> dict[str, Any]:
        """The state: the fields that `set` takes."""
        state: dict[str, Any] = self._access.control.vendor()
        return state

    def set(self, **changes: Any) -> None:
        """Change the state (docs/control.md has the fields), for example `collateral_until="2026-06-01"`."""
        self._access.control.set_vendor(**changes)
