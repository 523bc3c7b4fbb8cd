"""Health of a stack's gRPC listeners: the part of `deployment.health` that needs grpcio."""

from collections.abc import Mapping
from typing import Final

from grpc_health.v1 import health_pb2

from dstack_emu.transport.errors import TransportError
from dstack_emu.transport.grpc_client import StatusError, call, certificate_of, is_demanded

METHOD: Final = "grpc.health.v1.Health/Check"
MTLS: Final = "-mtls"


async def check_listener(name: str, targets: Mapping[str, str], seconds: float) -> str | None:
    """Return the problem of a listener: empty if it serves, None if it does not serve yet, as expected."""
    target = targets[name]
    try:
        if name.endswith(MTLS):
            if not await _speaks_tls(targets[name.removesuffix(MTLS)], seconds):
                return None
            # Without a client certificate, one can only check that the listener demands one.
            demanded = await is_demanded(target, seconds=seconds)
            return "" if demanded else f"{name} at {target} demands no client certificate"
        return await _check(name, target, await _speaks_tls(target, seconds), seconds)
    except TransportError as error:
        return f"{name} at {target}: {error.cause}"


async def _check(name: str, target: str, secure: bool, seconds: float) -> str:
    request = health_pb2.HealthCheckRequest()
    try:
        answer = await call(target, METHOD, request, health_pb2.HealthCheckResponse, seconds=seconds, secure=secure)
    except StatusError as error:
        return f"{name} at {target} answered {error.code}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"{name} at {target} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


async def _speaks_tls(target: str, seconds: float) -> bool:
    try:
        await certificate_of(target, seconds=seconds)
    except TransportError:
        return False
    return True
