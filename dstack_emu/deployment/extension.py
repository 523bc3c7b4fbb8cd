"""What a service that is added to a deployment, such as the control API or a VMM, implements."""

import socket
from typing import Protocol

from dstack_emu.transport.listen import Server


class Extension(Protocol):
    """An additional service of a deployment, which binds the port `name` in `transport.ports.PORTS` for it."""

    name: str

    async def start(self, sock: socket.socket) -> Server:
        """Serve the extension on a bound socket, before the authorization flow; the deployment closes the server."""
        ...

    def became_ready(self) -> None:
        """Handle that the deployment is ready."""
        ...

    async def close(self) -> None:
        """Stop what it runs, after its server was closed."""
        ...
