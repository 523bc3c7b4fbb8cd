"""The RPCs of a VMM with the messages of 0.5: what these lack is neither read nor answered.

Source: dstack `vmm/rpc/proto/vmm_rpc.proto` and `vmm/src/main_service.rs` at 40eaf35e.
"""

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.proto import vmm_v05_pb2 as old
from dstack_emu.transport.service import Rpc, ServiceTable, in_messages_of, without_context

_OLD: Final[Mapping[type[Message], type[Message]]] = {
    pb.VmConfiguration: old.VmConfiguration,
    pb.UpdateVmRequest: old.UpdateVmRequest,
    pb.StatusRequest: old.StatusRequest,
    pb.StatusResponse: old.StatusResponse,
    pb.GetInfoResponse: old.GetInfoResponse,
    pb.GetMetaResponse: old.GetMetaResponse,
}


def v05_table(table: ServiceTable[None]) -> ServiceTable[None]:
    """Return the table of 0.5 with the handlers of `table`."""
    leases: Rpc[None, Any, Any] = Rpc("ReportDhcpLease", old.DhcpLeaseRequest, Empty, without_context(_lease))
    return ServiceTable(table.prefix, {**in_messages_of(table, _OLD).rpcs, leases.name: leases})


async def _lease(_request: old.DhcpLeaseRequest) -> Empty:
    """Ignore a lease, as upstream does that of a machine that it does not know: no machine has a network."""
    return Empty()
