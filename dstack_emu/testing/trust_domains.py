"""The trust domains of a test's stack."""

from collections.abc import Sequence
from typing import Any, Self

from dstack_emu.testing.access import NamedPart, StackAccess, name_of, raise_refusals
from dstack_emu.testing.platforms import LivePlatform


class LiveTrustDomain:
    """A trust domain: of an app, or of a KMS."""

    def __init__(self, access: StackAccess, name: str) -> None:
        self._access, self.name = access, name

    @property
    def info(self) -> dict[str, Any]:
        """Its measurements (hex), and the URL and sockets of its agent."""
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
        """The hash of all its measurements (hex)."""
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
        """The URL of its agent; `info` has the sockets."""
        return str(self.info["url"])

    def boot(self, kms: NamedPart | str | Sequence[NamedPart | str] = "src") -> Self:
        """Fetch keys from a KMS, or from the first of several that releases them.

        Raises `Refused` with the KMS's text. If it has keys, it is power-cycled first.
        """
        __tracebackhide__ = True
        names = [name_of(each) for each in (kms if isinstance(kms, Sequence) and not isinstance(kms, str) else (kms,))]
        raise_refusals(lambda: self._access.control.boot_guest(self.name, names))
        return self

    def emit_event(self, event: str, payload: str = "", *, measured: bool = True) -> None:
        """Extend RTMR3 with an event (`payload` is hex); with `measured` false, add the event to the log only."""
        self._access.control.emit_event(self.name, event, payload, measured=measured)

    def rpc(self, method: str, **fields: Any) -> dict[str, Any]:
        """Call an RPC of its agent in JSON, such as `GetKey` or `Tappd.DeriveKey`; raise `Refused` with its text."""
        path = f"prpc/{method}" if "." in method else method
        return self._access.post(f"{self.url}/{path}?json", fields)

    def remove(self) -> None:
        """Stop the trust domain; raise `ControlError` if it is part of every stack."""
        self._access.control.remove_guest(self.name)
