"""What the ingress asks before it forwards a connection: which instances a name means, which ports they open, and where
they listen. The registry of the gateway answers the first two, and whoever runs the gateway the third: there is no
WireGuard tunnel here. Source: `gateway/src/proxy.rs` and `gateway/src/proxy/port_policy.rs` of dstack 312dc605.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dstack_emu.gateway.state import PolicyEntry

Endpoint = tuple[str, int]
"""Host and TCP port of a listener that this process can reach."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A registered instance: its id and that of its app (lowercase hex), and its address in the pool."""

    id: str
    app_id: str
    ip: str


class Routes(Protocol):
    """What the registry knows of instances."""

    def candidates(self, name: str) -> Sequence[Instance]:
        """Return the instance of an instance id, or those of an app id, the freshest handshake first.

        There are at most `connect_top_n`; empty if nobody of that name is registered.
        """
        ...

    async def port_policy(self, instance: Instance) -> PolicyEntry | None:
        """Return the policy in force, asking the instance if it has not been told; None is unknown: nothing is open."""
        ...


class Reach(Protocol):
    """Where instances listen: what stands for the tunnel."""

    def endpoint(self, instance: Instance, port: int) -> Endpoint | None:
        """Return where a TCP port of an instance is reached from this process; None if it cannot be reached."""
        ...
