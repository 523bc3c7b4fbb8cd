"""The services of a guest agent before v1, as tables of RPCs: which methods of an agent each has, and by which names.

Source: dstack `guest-agent/src/rpc_service.rs` at 312dc605; `attest/release.py` has the methods of each release.
"""

from typing import Any

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import dstack_guest_pb2 as pb
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.transport.service import Rpc, ServiceTable, without_arguments, without_context


def dstack_table(agent: GuestAgent) -> ServiceTable[None]:
    """Return the service DstackGuest, as on dstack.sock."""
    return _table(
        agent,
        "DstackGuest.",
        Rpc("GetTlsKey", pb.GetTlsKeyArgs, pb.GetTlsKeyResponse, without_context(agent.get_tls_key)),
        Rpc("GetKey", pb.GetKeyArgs, pb.GetKeyResponse, without_context(agent.get_key)),
        Rpc("GetQuote", pb.RawQuoteArgs, pb.GetQuoteResponse, without_context(agent.get_quote)),
        Rpc("Attest", pb.RawQuoteArgs, pb.AttestResponse, without_context(agent.attest)),
        Rpc("EmitEvent", pb.EmitEventArgs, Empty, without_context(agent.emit_event)),
        Rpc("Info", Empty, pb.AppInfo, without_arguments(agent.info)),
        Rpc("GpuInfo", Empty, pb.GpuInfoResponse, without_arguments(agent.gpu_info)),
        Rpc("Sign", pb.SignRequest, pb.SignResponse, without_context(agent.sign)),
        Rpc("Verify", pb.VerifyRequest, pb.VerifyResponse, without_context(agent.verify)),
        Rpc("Version", Empty, pb.WorkerVersion, without_arguments(agent.version)),
    )


def tappd_table(agent: GuestAgent) -> ServiceTable[None]:
    """Return the service Tappd, as on tappd.sock."""
    return _table(
        agent,
        "Tappd.",
        Rpc("DeriveKey", pb.DeriveKeyArgs, pb.GetTlsKeyResponse, without_context(agent.derive_tls_key)),
        Rpc("DeriveK256Key", pb.GetKeyArgs, pb.DeriveK256KeyResponse, without_context(agent.derive_k256_key)),
        Rpc("TdxQuote", pb.TdxQuoteArgs, pb.TdxQuoteResponse, without_context(agent.tdx_quote)),
        Rpc("RawQuote", pb.RawQuoteArgs, pb.TdxQuoteResponse, without_context(agent.raw_quote)),
        Rpc("Info", Empty, pb.AppInfo, without_arguments(agent.info)),
        Rpc("Version", Empty, pb.WorkerVersion, without_arguments(agent.version)),
    )


def worker_table(agent: GuestAgent) -> ServiceTable[None]:
    """Return the service Worker."""
    attestation = without_context(agent.get_attestation_for_app_key)
    return _table(
        agent,
        "Worker.",
        Rpc("Info", Empty, pb.AppInfo, without_arguments(agent.public_info)),
        Rpc("Version", Empty, pb.WorkerVersion, without_arguments(agent.version)),
        Rpc("GetAttestationForAppKey", pb.GetAttestationForAppKeyRequest, pb.GetQuoteResponse, attestation),
    )


def combined_table(agent: GuestAgent) -> ServiceTable[None]:
    """Return Tappd and Worker for one mount; a name without prefix that both have is Worker's, as outside a CVM."""
    worker, tappd = worker_table(agent).rpcs, tappd_table(agent).rpcs
    prefixed = {f"Tappd.{name}": rpc for name, rpc in tappd.items()}
    return ServiceTable("Worker.", {**tappd, **worker, **prefixed})


def _table(agent: GuestAgent, prefix: str, *rpcs: Rpc[Any, Any, Any]) -> ServiceTable[None]:
    """Make a table of the methods that the service has in the agent's release."""
    methods = agent.domain.release.v0_methods[prefix.removesuffix(".")]
    return ServiceTable(prefix, {rpc.name: rpc for rpc in rpcs if rpc.name in methods})
