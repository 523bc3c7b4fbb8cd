"""The servers of this process, and how many connections each has open: for metrics alone."""

import weakref
from typing import Final, Protocol


class _Server(Protocol):
    @property
    def url(self) -> str: ...

    @property
    def connections(self) -> int: ...


_servers: Final[weakref.WeakSet[_Server]] = weakref.WeakSet()


def note_server(server: _Server) -> None:
    """Let a server be among those whose connections are counted, for as long as it is in use."""
    _servers.add(server)


def open_connections() -> list[tuple[str, int]]:
    """Return the URL of each server, and the number of its open connections."""
    return [(server.url, server.connections) for server in _servers]
