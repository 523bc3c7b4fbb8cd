"""A KMS that is restarted or stopped at any moment between its phases ends that, and goes on at the same address."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.server import KmsServer, KmsServerState
from dstack_emu.transport.listen import bind_tcp
from tests.kms_files import copy_keys, write_kms_toml
from tests.ports import free_port
from tests.running import RunningStack

MOMENTS = 40
"""More turns of the event loop than a KMS needs from its new certificate on until it serves TLS."""


async def started(
    stack: RunningStack, folder: Path, grpc_socks: Mapping[str, socket.socket] = MappingProxyType({})
) -> KmsServer:
    """Start a KMS that has keys; with sockets for it, it serves gRPC, too."""
    copy_keys(folder, stack)
    config = write_kms_toml(folder, stack, webhook=stack.services["auth-src"], port=free_port())
    if grpc_socks:
        config.write_text(f"{config.read_text()}[emulator.grpc]\nenabled = true\n")
    kms = KmsServer(
        KmsConfig.load(config),
        stack.services["agent-src"],
        entropy=os.urandom,
        clock=lambda: int(time.time()),
        grpc_socks=grpc_socks,
    )
    await kms.start()
    return kms


async def test_ports_stay_those_of_the_kms_while_it_is_restarted(ready_stack: RunningStack, tmp_path: Path) -> None:
    grpc_socks = {key: bind_tcp("127.0.0.1", free_port()) for key in ("port", "mtls_port")}
    kms = await started(ready_stack, tmp_path, grpc_socks)
    addresses = [address.split(":") for address in (kms.runtime_address, *kms.grpc_targets.values())]
    assert len(addresses) == 3
    try:
        restart, rounds = asyncio.create_task(kms.restart()), 0
        while not restart.done():
            for host, port in addresses:
                _, writer = await asyncio.open_connection(host, int(port))  # refused if nobody holds the port
                writer.close()
            rounds += 1
        await restart
        assert rounds > 1
    finally:
        await kms.stop()
    for host, port in addresses:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("end", ["restart", "stop"])
async def test_kms_ends_at_each_moment_between_its_phases(end: str, ready_stack: RunningStack, tmp_path: Path) -> None:
    kms = await started(ready_stack, tmp_path)
    onboard = KmsServerState("onboard", kms.capture().files)
    address, phases = kms.runtime_address, []
    certificate = tmp_path / "certs/rpc.crt"
    try:
        for moment in range(MOMENTS):
            await kms.restore(onboard)
            before = certificate.stat().st_ino
            await _finish(address)
            while certificate.stat().st_ino == before:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0)
            for _ in range(moment):
                await asyncio.sleep(0)
            phases.append(kms.phase)
            if end == "stop":
                await kms.stop()
                assert kms.phase == "stopped"
            await kms.restart()
            assert kms.phase in ("onboard", "runtime")
            assert kms.runtime_address == address
            if phases[-1] == "runtime":
                break
    finally:
        await kms.stop()
    assert (phases[0], phases[-1]) == ("onboard", "runtime")


async def _finish(address: str) -> None:
    """Ask a KMS to end its onboard phase, and read its answer."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /finish HTTP/1.1\r\nHost: kms\r\n\r\n")
    assert (await reader.readline()).split()[1] == b"200"
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
