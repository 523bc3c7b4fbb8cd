"""The RPCs of a gateway for instances and for other gateways, and those of its debug listener.

Order of checks and texts: dstack `gateway/src/{main_service,debug_service}.rs` at 312dc605 and 40eaf35e.
"""

from ipaddress import IPv4Address
from typing import Any

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import gateway_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.gateway.caller import Caller
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.gateway import Gateway
from dstack_emu.gateway.policy_messages import reported_policy
from dstack_emu.gateway.registry import Registration
from dstack_emu.gateway.state import PolicyEntry
from dstack_emu.gateway.webhook import Webhook
from dstack_emu.transport.service import Rpc, ServiceTable, without_arguments, without_context


class GatewayService:
    """The services Gateway and Debug."""

    def __init__(self, gateway: Gateway, webhook: Webhook) -> None:
        self._gateway, self._webhook = gateway, webhook

    async def register_cvm(self, caller: Caller, request: pb.RegisterCvmRequest) -> pb.RegisterCvmResponse:
        """Register the instance that the caller's certificate names."""
        info = caller.identity()
        await self._webhook.require_authorized(info)
        policy = _reported(request, self._gateway.release)
        return self._register(
            Registration(
                instance_id=info.instance_id.hex(),
                app_id=info.app_id.hex(),
                public_key=request.client_public_key,
                compose_hash=info.compose_hash.hex(),
                policy=policy,
                health_check=request.health_check,
            )
        )

    async def debug_register_cvm(self, request: pb.DebugRegisterCvmRequest) -> pb.RegisterCvmResponse:
        """Register the instance that the request names."""
        return self._register(
            Registration(
                instance_id=request.instance_id,
                app_id=request.app_id,
                public_key=request.client_public_key,
                compose_hash="",
                policy=None,
            )
        )

    def _register(self, new: Registration) -> pb.RegisterCvmResponse:
        gateway = self._gateway
        if gateway.is_down:
            raise GatewayError("this gateway node is marked as down and cannot accept new registrations")
        entry = gateway.registry.register(new)
        if entry.reported is None:
            gateway.policies.begin(new.instance_id)
        gateway.log.info("registered", instance=new.instance_id, app=new.app_id, ip=entry.ip)
        info, node = gateway.info(), gateway.node_info()
        return pb.RegisterCvmResponse(
            wg=pb.WireGuardConfig(
                client_ip=entry.ip,
                servers=[pb.WireGuardPeer(pk=node.wg_public_key, ip=node.wg_ip, endpoint=node.wg_endpoint)],
            ),
            agent=pb.GuestAgentConfig(
                external_port=info.external_port,
                internal_port=gateway.config.core.proxy.agent_port,
                domain=info.base_domain,
                app_address_ns_prefix=info.app_address_ns_prefix,
            ),
            gateways=[node],
        )

    async def acme_info(self) -> pb.AcmeInfoResponse:
        """Show the ACME account and the keys of every domain, with their quotes."""
        return self._gateway.acme_info()

    async def info(self) -> pb.InfoResponse:
        """Describe this gateway."""
        return self._gateway.info()

    async def get_peers(self, caller: Caller, _request: Empty) -> pb.GetPeersResponse:
        """List the nodes, for another gateway."""
        gateway = self._gateway
        if not gateway.config.core.debug.insecure_skip_attestation:
            if caller.app_id is None:
                raise GatewayError("Client authentication is required")
            if caller.app_id != gateway.context.app_id:
                raise GatewayError("Remote app id is not from dstack-gateway")
        peers = sorted(gateway.records.peer_urls.items())
        return pb.GetPeersResponse(
            my_id=gateway.node_id,
            my_url=gateway.config.core.sync.my_url,
            peers=[pb.PeerInfo(id=node, url=url) for node, url in peers],
        )

    # ---- the debug listener

    async def get_sync_data(self) -> pb.DebugSyncDataResponse:
        """Show what is stored."""
        gateway = self._gateway
        records, node = gateway.records, gateway.node_info()
        return pb.DebugSyncDataResponse(
            my_node_id=gateway.node_id,
            peer_addrs=[pb.PeerAddrEntry(node_id=id_, url=url) for id_, url in sorted(records.peer_urls.items())],
            nodes=[
                pb.NodeInfoEntry(
                    node_id=node.id,
                    url=node.url,
                    wg_public_key=node.wg_public_key,
                    wg_endpoint=node.wg_endpoint,
                    wg_ip=node.wg_ip,
                )
            ],
            instances=[
                pb.InstanceEntry(instance_id=id_, app_id=each.app_id, ip=each.ip, public_key=each.public_key)
                for id_, each in sorted(records.instances.items())
            ],
            persistent_keys=gateway.persistent_keys(),
            ephemeral_keys=gateway.ephemeral_keys(),
        )

    async def get_proxy_state(self) -> pb.DebugProxyStateResponse:
        """Show what is in memory."""
        instances = sorted(self._gateway.records.instances.items())
        return pb.DebugProxyStateResponse(
            instances=[
                pb.ProxyStateInstance(
                    instance_id=id_,
                    app_id=each.app_id,
                    ip=each.ip,
                    public_key=each.public_key,
                    reg_time=each.registered_at,
                )
                for id_, each in instances
            ],
            allocated_addresses=[str(ip) for ip in sorted(IPv4Address(each.ip) for _, each in instances)],
        )


def _reported(request: pb.RegisterCvmRequest, release: Release) -> PolicyEntry | None:
    """Return the policy in a registration, None if it has none; raise `GatewayError`."""
    if not request.HasField("port_policy"):
        return None
    return reported_policy(request.port_policy, refuses_ports=release.gateway_refuses_ports)


def gateway_table(service: GatewayService) -> ServiceTable[Caller]:
    """Return the RPCs of the RPC listener. Only the prefix `Tproxy.` is removed from names, as upstream does."""
    rpcs: list[Rpc[Caller, Any, Any]] = [
        Rpc("RegisterCvm", pb.RegisterCvmRequest, pb.RegisterCvmResponse, service.register_cvm),
        Rpc("AcmeInfo", Empty, pb.AcmeInfoResponse, without_arguments(service.acme_info), reads_request=False),
        Rpc("Info", Empty, pb.InfoResponse, without_arguments(service.info), reads_request=False),
        Rpc("GetPeers", Empty, pb.GetPeersResponse, service.get_peers, reads_request=False),
    ]
    return ServiceTable.of("Tproxy.", *rpcs)


def debug_table(service: GatewayService) -> ServiceTable[None]:
    """Return the RPCs of the debug listener."""
    rpcs: list[Rpc[None, Any, Any]] = [
        Rpc(
            "RegisterCvm",
            pb.DebugRegisterCvmRequest,
            pb.RegisterCvmResponse,
            without_context(service.debug_register_cvm),
        ),
        Rpc("Info", Empty, pb.InfoResponse, without_arguments(service.info), reads_request=False),
        Rpc(
            "GetSyncData",
            Empty,
            pb.DebugSyncDataResponse,
            without_arguments(service.get_sync_data),
            reads_request=False,
        ),
        Rpc(
            "GetProxyState",
            Empty,
            pb.DebugProxyStateResponse,
            without_arguments(service.get_proxy_state),
            reads_request=False,
        ),
    ]
    return ServiceTable.of("Debug.", *rpcs)
