"""What the trust domains of a test's stack run on: platforms, their vendor, OS images."""

from dataclasses import dataclass
from typing import Any, Self

from dstack_emu.testing.access import StackAccess


@dataclass(frozen=True, slots=True)
class LiveImage:
    """An OS image: name and version, of which the seed makes it, and its hash (hex). No name: the stack's own."""

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
        """Its id as webhooks get it (hex)."""
        return str(self.state["device_id"])

    def set(self, **changes: Any) -> Self:
        """Change its state (docs/control.md has the fields); its collateral and quotes follow at once."""
        self._access.control.set_platform(self.name, **changes)
        return self


class LiveVendor:
    """What the emulated Intel says for all platforms."""

    def __init__(self, access: StackAccess) -> None:
        self._access = access

    @property
    def state(self) -> dict[str, Any]:
        """What it says."""
        state: dict[str, Any] = self._access.control.vendor()
        return state

    def set(self, **changes: Any) -> None:
        """Change what it says (docs/control.md has the fields), such as `collateral_until="2026-06-01"`."""
        self._access.control.set_vendor(**changes)
