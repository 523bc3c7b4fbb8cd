"""Trust domains of a test's stack, and what they run on: machines, their vendor, OS images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dstack_emu.control.schemas import ControlError
from dstack_emu.testing.refusals import Refused

if TYPE_CHECKING:
    from dstack_emu.testing.kms import LiveKms
    from dstack_emu.testing.live import LiveStack


@dataclass(frozen=True, slots=True)
class LiveImage:
    """An OS image: name and version, of which the seed makes it, and its hash (hex). No name: the stack's own."""

    name: str | None
    version: str
    os_image_hash: str


class LivePlatform:
    """A machine."""

    def __init__(self, live: "LiveStack", name: str) -> None:
        self._live, self.name = live, name

    @property
    def state(self) -> dict[str, Any]:
        """What holds for it: the fields that `set` takes, and its `device_id` and `fmspc`."""
        state: dict[str, Any] = self._live.control.platform(self.name)
        return state

    @property
    def device_id(self) -> str:
        """Its id as a webhook is told it (hex)."""
        return str(self.state["device_id"])

    def set(self, **changes: Any) -> Self:
        """Change what holds for it (docs/control.md has the fields); its collateral and quotes follow at once."""
        self._live.control.set_platform(self.name, **changes)
        return self


class LiveVendor:
    """What the emulated Intel says for all machines."""

    def __init__(self, live: "LiveStack") -> None:
        self._live = live

    @property
    def state(self) -> dict[str, Any]:
        """What it says."""
        state: dict[str, Any] = self._live.control.vendor()
        return state

    def set(self, **changes: Any) -> None:
        """Change what it says (docs/control.md has the fields), such as `collateral_until="2026-06-01"`."""
        self._live.control.set_vendor(**changes)


class LiveTrustDomain:
    """A trust domain: of an app, or of a KMS."""

    def __init__(self, live: "LiveStack", name: str) -> None:
        self._live, self.name = live, name

    @property
    def info(self) -> dict[str, Any]:
        """What it measures, as hex, and where its agent answers."""
        info: dict[str, Any] = self._live.control.guest(self.name)
        return info

    @property
    def app_id(self) -> str:
        """The id of its app (hex)."""
        return str(self.info["app_id"])

    @property
    def compose_hash(self) -> str:
        """The hash of its app-compose.json (hex)."""
        return str(self.info["compose_hash"])

    @property
    def mr_aggregated(self) -> str:
        """All its measurements in one (hex)."""
        return str(self.info["mr_aggregated"])

    @property
    def platform(self) -> LivePlatform:
        """The machine it runs on."""
        return LivePlatform(self._live, self.info["platform"])

    @property
    def has_keys(self) -> bool:
        """Whether it has keys."""
        return bool(self.info["has_keys"])

    @property
    def url(self) -> str:
        """Where its agent answers; `info` has its sockets."""
        return str(self.info["url"])

    def boot(self, kms: "LiveKms | str" = "src") -> Self:
        """Fetch keys from a KMS; raise `Refused` with the KMS's words. One that has keys is powered on anew first."""
        __tracebackhide__ = True
        side = kms if isinstance(kms, str) else kms.name
        with_refusals(lambda: self._live.control.boot_guest(self.name, side))
        return self

    def emit_event(self, event: str, payload: str = "", *, measured: bool = True) -> None:
        """Extend RTMR3 with an event (`payload` is hex); with `measured` false its log claims it falsely."""
        self._live.control.emit_event(self.name, event, payload, measured=measured)

    def rpc(self, method: str, **fields: Any) -> dict[str, Any]:
        """Ask its agent, in JSON: `GetKey`, or `Tappd.DeriveKey`; raise `Refused` with its words."""
        path = f"prpc/{method}" if "." in method else method
        return self._live.post(f"{self.url}/{path}?json", fields)

    def remove(self) -> None:
        """Switch it off, where it was made in the test."""
        self._live.control.remove_guest(self.name)


def with_refusals(call: Any) -> Any:
    """Make a call of the control, whose refusals by a KMS become `Refused`."""
    __tracebackhide__ = True
    try:
        return call()
    except ControlError as error:
        if error.status != 403:
            raise
        raise Refused(str(error)) from None  # a test's report is about the refusal, not about who passed it on
