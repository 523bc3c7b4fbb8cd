"""A guest agent over gRPC: DstackGuest, Tappd and Worker, each under its own name, on one listener.

Import it only if gRPC is enabled: grpcio costs time and memory. Upstream has no gRPC; this is an addition.
"""

import socket
import time
from collections.abc import Sequence
from typing import Any, Final

import grpc

from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.agent_services import dstack_table, tappd_table, worker_table
from dstack_emu.simulator.agent_v1 import GuestApiV1, guest_v1_table, worker_v1_table
from dstack_emu.simulator.errors import GpuUnavailableError, GuestError, KmsRefusedError, KmsUnreachableError
from dstack_emu.transport.grpc_server import GrpcServer, GrpcService, Listener, Statuses, anyone, serve_grpc

STATUSES: Final[Statuses] = {
    KmsRefusedError: grpc.StatusCode.PERMISSION_DENIED,
    KmsUnreachableError: grpc.StatusCode.UNAVAILABLE,
    GpuUnavailableError: grpc.StatusCode.UNIMPLEMENTED,
    GuestError: grpc.StatusCode.FAILED_PRECONDITION,
}
"""The gRPC status of each error class; docs/grpc.md has the same table."""


async def serve_agent(
    agent: GuestAgent, sock: socket.socket | None, path: str | None, *, interceptors: Sequence[Any] = ()
) -> GrpcServer:
    """Serve on a bound TCP socket, a reserved socket file, or both. `interceptors` are grpc.aio's."""
    services = [
        GrpcService("dstack_guest.DstackGuest", dstack_table(agent), anyone),
        GrpcService("dstack_guest.Tappd", tappd_table(agent), anyone),
        GrpcService("dstack_guest.Worker", worker_table(agent), anyone),
    ]
    if agent.domain.release.guest_api_v1:
        api = GuestApiV1(agent, time.time)
        services.append(GrpcService("dstack.guest.v1.DstackGuest", guest_v1_table(api), anyone))
        services.append(GrpcService("dstack.guest.v1.Worker", worker_v1_table(api), anyone))
    listeners = () if sock is None else (Listener(sock),)
    return await serve_grpc(services, *listeners, path=path, statuses=STATUSES, interceptors=interceptors)
