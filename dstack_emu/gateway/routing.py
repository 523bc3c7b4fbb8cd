"""What the ingress asks before it forwards a connection: which instances a name means, which ports they open, and where
they listen. The registry of the gateway answers the first two, and whoever runs the gateway the third: there is no
WireGuard tunnel here. Source: `gateway/src/proxy.rs` and `gateway/src/proxy/port_policy.rs` of dstack 312dc605.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Endpoint = tuple[str, int]
"""Host and TCP port of a listener that this process can reach."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A registered instance: its id and that of its app (lowercase hex), and its address in the pool."""

    id: str
    app_id: str
    ip: str


@dataclass(frozen=True, slots=True)
class PortPolicy:
    """Which ports of an instance may be reached.

    `ports` maps a port to whether a PROXY v2 header goes first. With `restrict_mode` no other port is open.
    """

    ports: Mapping[int, bool] = field(default_factory=dict)
    restrict_mode: bool = False

    def is_open(self, port: int) -> bool:
        """Return whether a port may be reached."""
        return not self.restrict_mode or port in self.ports

    def sends_proxy_header(self, port: int) -> bool:
        """Return whether a PROXY v2 header goes first to a port."""
        return self.ports.get(port, False)


class Routes(Protocol):
    """What the registry knows of instances."""

    def candidates(self, name: str) -> Sequence[Instance]:
        """Return the instance of an instance id, or those of an app id, the freshest handshake first.

        There are at most `connect_top_n`; empty if nobody of that name is registered.
        """
        ...

    async def port_policy(self, instance: Instance) -> PortPolicy | None:
        """Return the policy in force, asking the instance if it has not been told; None is unknown: nothing is open."""
        ...


class Reach(Protocol):
    """Where instances listen: what stands for the tunnel."""

    def endpoint(self, instance: Instance, port: int) -> Endpoint | None:
        """Return where a TCP port of an instance is reached from this process; None if it cannot be reached."""
        ...
