"""Connects to one of the instances that a name means: all are tried at once, and the first that answers is taken."""

import asyncio
import os
import socket
from collections.abc import Sequence

from dstack_emu.gateway.ingress.errors import RefusedConnectionError
from dstack_emu.gateway.routing import Endpoint, Instance

Candidate = tuple[Instance, Endpoint]


async def connect_first(candidates: Sequence[Candidate], app: str) -> tuple[Instance, socket.socket]:
    """Return the first socket that is connected, and its instance; raise `RefusedConnectionError` if none is."""
    attempts = {asyncio.create_task(_connect(endpoint)): instance for instance, endpoint in candidates}
    failures: list[str] = []
    try:
        pending = set(attempts)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                if attempt.exception() is None:
                    instance = attempts.pop(attempt)
                    return instance, attempt.result()
                failures.append(str(attempt.exception()))
    finally:
        for attempt in attempts:
            _abandon(attempt)
    raise RefusedConnectionError(f"failed to connect to app {app}: {'; '.join(failures) or 'nobody listens'}")


async def _connect(endpoint: Endpoint) -> socket.socket:
    host, port = endpoint
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, endpoint)
    except OSError as error:
        sock.close()
        raise RefusedConnectionError(f"{host}:{port}: {_reason(error)}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _reason(error: OSError) -> str:
    """Return what the system calls an error; the numbers of a name that cannot be resolved are others."""
    if isinstance(error, socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno)


def _abandon(attempt: asyncio.Task[socket.socket]) -> None:
    attempt.cancel()
    attempt.add_done_callback(_close_result)


def _close_result(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
