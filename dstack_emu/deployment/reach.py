"""Where the instances of a stack listen: what stands for the tunnel between a gateway and its instances."""

from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from dstack_emu.gateway.routing import Endpoint, Instance

AGENT_PORT: Final = 8090
"""The port of a guest's agent, in the guest."""
KMS_PORT: Final = 8000
"""The port of a KMS, in the guest."""

FindEndpoint = Callable[[int], Endpoint | None]
"""Returns where a TCP port of an instance is reached from this process now, None if nothing listens there."""


class InstanceReach:
    """The running instances by instance id (hex), each with its ports. It implements `routing.Reach`."""

    def __init__(self) -> None:
        self._instances: dict[str, FindEndpoint] = {}

    def add(self, instance_id: bytes, find: FindEndpoint) -> None:
        """Let an instance be reached."""
        self._instances[instance_id.hex()] = find

    def remove(self, instance_id: bytes, find: FindEndpoint) -> None:
        """Let it be reached no more, unless another one of that id has taken its place."""
        if self._instances.get(instance_id.hex()) == find:
            del self._instances[instance_id.hex()]

    def endpoint(self, instance: Instance, port: int) -> Endpoint | None:
        """Return where a TCP port of an instance is reached; None if it does not run, or nothing listens there."""
        find = self._instances.get(instance.id)
        return None if find is None else find(port)


def endpoint_of(url: str) -> Endpoint | None:
    """Return the host and the port in a URL, None if it has none."""
    parts = urlsplit(url)
    return None if parts.hostname is None or parts.port is None else (parts.hostname, parts.port)
