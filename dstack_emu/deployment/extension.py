"""What a service that is added to a deployment, such as the control API or a VMM, implements."""

import socket
from typing import Protocol


class Listeners(Protocol):
    """The open listeners of a service."""

    async def close(self) -> None:
        """Close them."""
        ...


class Extension(Protocol):
    """An additional service of a deployment."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its ports in `transport.ports.PORTS`, which the deployment binds: the first is that of the service."""
        ...

    async def start(self, sock: socket.socket) -> Listeners:
        """Serve the extension on a bound socket, before the authorization flow, and publish its URL.

        The deployment closes the listeners.
        """
        ...

    async def keys_are_released(self) -> None:
        """Handle that both KMS release keys, before the app of the stack asks for its own; raise `StackError`."""
        ...

    def became_ready(self) -> None:
        """Handle that the deployment is ready."""
        ...

    async def close(self) -> None:
        """Stop what it runs, after its server was closed."""
        ...
