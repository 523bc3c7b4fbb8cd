"""The gateway of a test's stack."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstack_emu.testing.access import StackAccess


@dataclass(frozen=True, slots=True)
class LiveGateway:
    """The gateway: where it is, how apps are reached, and which instances are registered."""

    _access: StackAccess

    @property
    def _description(self) -> dict[str, Any]:
        found: dict[str, Any] = self._access.in_thread(lambda stack: stack.description())
        return found

    @property
    def url(self) -> str:
        """The URL of its RPCs."""
        url: str = self._description["services"]["gateway"]
        return url

    @property
    def admin_url(self) -> str:
        """The URL of its admin listener."""
        url: str = self._description["services"]["gateway-admin"]
        return url

    @property
    def ingress(self) -> tuple[str, int]:
        """Host and port of the ingress."""
        host, _, port = self._description["services"]["ingress"].rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def ca(self) -> Path:
        """The root certificate (PEM) of what the ingress shows."""
        return Path(self._description["gateway"]["ca"])

    @property
    def instances(self) -> dict[str, dict[str, Any]]:
        """The registered instances by instance id."""
        found: dict[str, dict[str, Any]] = self._access.control.gateway()["instances"]
        return found

    def name_of(self, app: str, port: int | None = None, suffix: str = "") -> str:
        """Return the server name of a port of an app id or instance id; `suffix` is `s`, `g` or empty."""
        label = app if port is None and not suffix else f"{app}-{port or ''}{suffix}"
        return f"{label}.{self._description['gateway']['base_domain']}"

    def url_of(self, app: str, port: int | None = None, suffix: str = "") -> str:
        """Return the URL of a port of an app id or instance id, without a path."""
        return f"https://{self.name_of(app, port, suffix)}:{self.ingress[1]}"

    def end_handshake(self, instance_id: str) -> None:
        """Let it have heard nothing of an instance until that registers again."""
        self._access.control.end_handshake(instance_id)
