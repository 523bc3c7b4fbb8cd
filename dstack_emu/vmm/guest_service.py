"""The guest API of every machine, by the machine's id: the VMM passes each call on to the guest.

Source: dstack `vmm/src/guest_api_service.rs` at 312dc605.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.proto import guest_api_pb2 as pb
from dstack_emu.transport.service import Rpc, ServiceTable, without_context
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.fleet import Fleet

PATIENCE: Final = 10.0
"""Seconds that a guest has to answer."""


def guest_table(fleet: Fleet, patience: float = PATIENCE) -> ServiceTable[None]:
    """Return the RPCs of the service, whose names have no prefix; a guest has `patience` seconds to answer."""
    answers: dict[str, type[Message]] = {
        "Info": pb.GuestInfo,
        "SysInfo": pb.SystemInfo,
        "NetworkInfo": pb.NetworkInformation,
        "ListContainers": pb.ListContainersResponse,
    }
    rpcs: list[Rpc[None, Any, Any]] = [
        Rpc(name, pb.Id, answer, without_context(_passed_on(fleet, name, patience))) for name, answer in answers.items()
    ]

    async def shutdown(request: pb.Id) -> Empty:
        await fleet.shutdown(request.id)
        return Empty()

    rpcs.append(Rpc("Shutdown", pb.Id, Empty, without_context(shutdown)))
    return ServiceTable.of("ProxiedGuestApi.", *rpcs)


def _passed_on(fleet: Fleet, method: str, patience: float) -> Callable[[pb.Id], Awaitable[Message]]:
    async def call(request: pb.Id) -> Message:
        machine = fleet.find(request.id).machine()
        try:
            return await asyncio.wait_for(machine.guest_call(method), patience)
        except TimeoutError as error:
            raise VmmError(f"the guest of vm {request.id} did not answer within {patience:g} seconds") from error

    return call
