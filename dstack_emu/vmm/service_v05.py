"""The RPCs of a VMM with the messages of 0.5: what these lack is neither read nor answered.

A message of one release is that of the other on the wire, as far as both have its fields. Source: dstack
`vmm/rpc/proto/vmm_rpc.proto` and `vmm/src/main_service.rs` at 40eaf35e.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.proto import vmm_v05_pb2 as old
from dstack_emu.transport.service import Rpc, ServiceTable, without_context

_OLD: Final[Mapping[type[Message], type[Message]]] = {
    pb.VmConfiguration: old.VmConfiguration,
    pb.UpdateVmRequest: old.UpdateVmRequest,
    pb.StatusResponse: old.StatusResponse,
    pb.GetInfoResponse: old.GetInfoResponse,
    pb.GetMetaResponse: old.GetMetaResponse,
}


def v05_table(table: ServiceTable[None]) -> ServiceTable[None]:
    """Return the table of 0.5 with the handlers of `table`."""
    rpcs = {name: _with_old_messages(rpc) for name, rpc in table.rpcs.items()}
    leases: Rpc[None, Any, Any] = Rpc("ReportDhcpLease", old.DhcpLeaseRequest, Empty, without_context(_lease))
    return ServiceTable(table.prefix, {**rpcs, leases.name: leases})


def _with_old_messages(rpc: Rpc[None, Any, Any]) -> Rpc[None, Any, Any]:
    request_type, response_type = rpc.request_type, rpc.response_type
    old_request = _OLD.get(request_type, request_type)
    old_response = _OLD.get(response_type, response_type)

    async def handle(context: None, request: Message) -> Message:
        return _as(old_response, await rpc.handler(context, _as(request_type, request)))

    return replace(rpc, request_type=old_request, response_type=old_response, handler=handle)


def _as(kind: type[Message], message: Message) -> Message:
    """Return a message as one of another release; fields that its own release does not have are dropped."""
    if isinstance(message, kind):
        return message
    message.DiscardUnknownFields()
    converted = kind.FromString(message.SerializeToString())
    converted.DiscardUnknownFields()
    return converted


async def _lease(_request: old.DhcpLeaseRequest) -> Empty:
    """Ignore a lease, as upstream does that of a machine that it does not know: no machine has a network."""
    return Empty()
