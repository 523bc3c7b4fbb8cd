"""GetQuote over the agent's socket and GetAppKey over mTLS, alternately by gRPC and by pRPC from the same process.

The gRPC client is that of grpcio, which costs more than the bare sockets that measure pRPC; it has the other core. So
the calls per second of the server's processor time are more meaningful than the rates.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc

from bench.figure import Effort, Figure, alternate, median, ratio
from bench.kms import measured_kms
from bench.load import Connection, closed_loop, connect_unix, post
from bench.processes import OTHER_CORE, SERVER_CORE, CpuMeter, command, on_core, running
from dstack_emu.attest.proto import dstack_guest_pb2, kms_pb2
from dstack_emu.transport.tls import Identity, client_context

CONNECTIONS = 8
TIMEOUT = 30.0
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


def measure(effort: Effort) -> Iterator[Figure]:
    """Measure calls per second by gRPC and pRPC in the same rounds, and per second of the server's processor time."""
    yield from _getquote(effort)
    yield from _getappkey(effort)


def _getquote(effort: Effort) -> Iterator[Figure]:
    with ExitStack() as stack:
        process, line = stack.enter_context(
            running(command("up", effort.release, "--free-ports", "--grpc"), SERVER_CORE)
        )
        app = json.loads(line)["app"]
        stack.enter_context(on_core(OTHER_CORE))
        data = os.urandom(64)
        request = dstack_guest_pb2.RawQuoteArgs(report_data=data).SerializeToString()
        channels = [grpc.insecure_channel(f"unix:{app['grpc_sock']}", _OPTIONS) for _ in range(CONNECTIONS)]
        by_grpc = _grpc_loop(stack, channels, "/dstack_guest.DstackGuest/GetQuote", request)
        http = post("/GetQuote", json.dumps({"report_data": data.hex()}).encode())
        connections = [Connection(connect_unix(app["dstack_sock"]), http) for _ in range(CONNECTIONS)]
        yield from _compare(effort, stack, "getquote", process.pid, by_grpc, connections)


def _getappkey(effort: Effort) -> Iterator[Figure]:
    with ExitStack() as stack:
        port = stack.enter_context(_grpc_switched_on())
        kms = stack.enter_context(measured_kms(effort.release))
        body, identities = kms.app_key_request(), kms.identities(CONNECTIONS)
        request = kms_pb2.GetAppKeyRequest(**json.loads(body)).SerializeToString()
        # The certificate has the name localhost.
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", "localhost"))
        root = kms.temp_ca.ca_cert.encode()
        channels = [
            grpc.secure_channel(f"127.0.0.1:{port}", _credentials(root, identity), options) for identity in identities
        ]
        by_grpc = _grpc_loop(stack, channels, "/kms.KMS/GetAppKey", request)
        connections = [kms.connect(client_context(identity), "GetAppKey", body) for identity in identities]
        yield from _compare(effort, stack, "getappkey", kms.pid, by_grpc, connections)


def _compare(
    effort: Effort,
    stack: ExitStack,
    name: str,
    pid: int,
    by_grpc: Callable[[float], float],
    connections: Sequence[Connection],
) -> Iterator[Figure]:
    for connection in connections:
        stack.callback(connection.close)
    meters = [CpuMeter(pid, by_grpc), CpuMeter(pid, closed_loop(connections))]
    rates, prpc_rates = alternate(effort, *meters)
    yield Figure(f"{name}_grpc", median(rates), "calls/s")
    yield Figure(f"{name}_grpc_to_prpc", ratio(rates, prpc_rates), "x pRPC in the same rounds")
    for meter, transport in zip(meters, ("grpc", "prpc"), strict=True):
        yield Figure(f"{name}_{transport}_per_cpu_second", median(meter.calls_per_cpu_second), "calls/CPU s")


def _grpc_loop(stack: ExitStack, channels: Sequence[Any], method: str, request: bytes) -> Callable[[float], float]:
    for channel in channels:
        stack.callback(channel.close)
    calls = [channel.unary_unary(method) for channel in channels]

    def measure(seconds: float) -> float:
        count, began = 0, time.perf_counter()
        under_way = [call.future(request, timeout=TIMEOUT) for call in calls]
        while time.perf_counter() - began < seconds:
            for at, call in enumerate(calls):
                under_way[at].result()
                under_way[at] = call.future(request, timeout=TIMEOUT)
            count += len(calls)
        for answer in under_way:
            answer.result()
        return (count + len(calls)) / (time.perf_counter() - began)

    return measure


def _credentials(root_ca: bytes, identity: Identity) -> Any:
    return grpc.ssl_channel_credentials(root_ca, identity.key.encode(), identity.certificate.encode())


@contextmanager
def _grpc_switched_on() -> Iterator[int]:
    """Let the KMS that is started in the block serve gRPC; yield the port that demands a certificate."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    settings = {"ENABLED": "true", "PORT": "0", "MTLS_PORT": str(port)}
    variables = {f"DSTACK_EMU_KMS_EMULATOR__GRPC__{name}": value for name, value in settings.items()}
    os.environ.update(variables)
    try:
        yield port
    finally:
        for name in variables:
            del os.environ[name]
