"""Trust domains of a test's stack."""

from typing import Any, Self

from dstack_emu.testing.access import Named, StackAccess, name_of, raise_refusals
from dstack_emu.testing.platforms import LivePlatform


class LiveTrustDomain:
    """A trust domain: of an app, or of a KMS."""

    def __init__(self, access: StackAccess, name: str) -> None:
        self._access, self.name = access, name

    @property
    def info(self) -> dict[str, Any]:
        """What it measures, as hex, and where its agent answers."""
        info: dict[str, Any] = self._access.control.guest(self.name)
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
        """The platform it runs on."""
        return LivePlatform(self._access, self.info["platform"])

    @property
    def has_keys(self) -> bool:
        """Whether it has keys."""
        return bool(self.info["has_keys"])

    @property
    def url(self) -> str:
        """Where its agent answers; `info` has its sockets."""
        return str(self.info["url"])

    def boot(self, kms: Named | str = "src") -> Self:
        """Fetch keys from a KMS; raise `Refused` with the KMS's words. If it has keys, it is powered on anew first."""
        __tracebackhide__ = True
        raise_refusals(lambda: self._access.control.boot_guest(self.name, name_of(kms)))
        return self

    def emit_event(self, event: str, payload: str = "", *, measured: bool = True) -> None:
        """Extend RTMR3 with an event (`payload` is hex); with `measured` false its log claims it falsely."""
        self._access.control.emit_event(self.name, event, payload, measured=measured)

    def rpc(self, method: str, **fields: Any) -> dict[str, Any]:
        """Call its agent in JSON: `GetKey`, or `Tappd.DeriveKey`; raise `Refused` with its words."""
        path = f"prpc/{method}" if "." in method else method
        return self._access.post(f"{self.url}/{path}?json", fields)

    def remove(self) -> None:
        """Stop it, if it was made in the test."""
        self._access.control.remove_guest(self.name)
