"""Ports for tests of what does not answer."""

import contextlib
import fcntl
import functools
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESERVATIONS = Path(tempfile.gettempdir(), f"dstack-emu-test-ports-{os.getuid()}")
"""A file of which each process of tests locks the bytes whose numbers are its ports, until it ends."""
_own: set[int] = set()


@contextmanager
def refusing_port() -> Iterator[int]:
    """Hold a port on which nobody listens: connections are refused, and no other process can take it meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def free_port() -> int:
    """Return a port for a program that binds it by itself.

    It is below those that the system gives to connections and to listeners on any free port, so none of them takes it,
    and it is returned to no other caller, in this process or in another one.
    """
    while True:
        port = random.randrange(20_000, 32_768)
        if port in _own:
            continue
        with contextlib.suppress(OSError), socket.socket() as sock:
            fcntl.lockf(_reservations(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            sock.bind(("127.0.0.1", port))
            _own.add(port)
            return port


@functools.cache
def _reservations() -> int:
    return os.open(RESERVATIONS, os.O_RDWR | os.O_CREAT, 0o600)
