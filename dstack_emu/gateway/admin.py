"""The RPCs of an operator about the gateway and its instances. Domains are in `admin_domains`.

Source: dstack `gateway/src/admin_service.rs` at 312dc605 and 40eaf35e; what 0.6.0 added is that of sources shortly
before it.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable
from typing import Final

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import gateway_pb2 as pb
from dstack_emu.gateway.domains import require_peer_url
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.gateway import Gateway
from dstack_emu.gateway.policy_messages import admin_policy, policy_view
from dstack_emu.gateway.state import InstanceEntry

MAX_ID: Final = 128
"""The maximum length of an instance id in a request to remove it, in bytes."""


class AdminService:
    """State, nodes and port policies; `end` is called if an operator ends the gateway."""

    def __init__(self, gateway: Gateway, end: Callable[[], None]) -> None:
        self._gateway, self._end = gateway, end

    # ---- state

    async def status(self) -> pb.StatusResponse:
        """Describe this node and every instance, and publish when each was heard of."""
        gateway, sync = self._gateway, self._gateway.config.core.sync
        gateway.publish()
        node = gateway.node_info()
        hosts = [
            self._host(id_, each, gateway.published.get(id_, 0))
            for id_, each in sorted(gateway.records.instances.items())
        ]
        return pb.StatusResponse(
            id=gateway.node_id,
            url=sync.my_url,
            bootnode_url=sync.bootnode,
            num_connections=gateway.connections.total,
            hosts=hosts,
            nodes=[node],
            uuid=node.uuid,
            health_gating=gateway.config.core.proxy.health_check.enabled,
        )

    async def get_info(self, request: pb.GetInfoRequest) -> pb.GetInfoResponse:
        """Describe one instance; an unknown id is no error."""
        entry = self._gateway.records.instances.get(request.id)
        if entry is None:
            return pb.GetInfoResponse(found=False)
        return pb.GetInfoResponse(found=True, info=self._host(request.id, entry, entry.handshake_at or 0))

    def _host(self, instance_id: str, entry: InstanceEntry, handshake_at: int) -> pb.HostInfo:
        return pb.HostInfo(
            instance_id=instance_id,
            ip=entry.ip,
            app_id=entry.app_id,
            base_domain=self._gateway.base_domain()[0],
            latest_handshake=handshake_at,
            num_connections=self._gateway.connections.of(instance_id),
            ready=entry.ready,
            health=self._gateway.health.state(instance_id, entry),
        )

    async def get_meta(self) -> pb.GetMetaResponse:
        """Count the instances, and those that were heard of lately."""
        gateway = self._gateway
        return pb.GetMetaResponse(registered=len(gateway.records.instances), online=gateway.registry.online())

    async def get_instance_handshakes(
        self, request: pb.GetInstanceHandshakesRequest
    ) -> pb.GetInstanceHandshakesResponse:
        """List the published handshakes of an instance; an unknown id has none."""
        at = self._gateway.published.get(request.instance_id)
        seen = [] if at is None else [pb.HandshakeEntry(observer_node_id=self._gateway.node_id, timestamp=at)]
        return pb.GetInstanceHandshakesResponse(handshakes=seen)

    async def get_global_connections(self) -> pb.GlobalConnectionsStats:
        """Count the connections to instances that are registered."""
        gateway = self._gateway
        total = sum(map(gateway.connections.of, gateway.records.instances))
        nodes = {gateway.node_id: total} if gateway.records.instances else {}
        return pb.GlobalConnectionsStats(total_connections=total, node_connections=nodes)

    async def exit(self, _request: pb.ExitRequest) -> Empty:
        """End the gateway, after this answer."""
        self._gateway.log.info("exit", reason="an operator ended it")
        self._end()
        return Empty()

    # ---- nodes

    async def set_node_url(self, request: pb.SetNodeUrlRequest) -> Empty:
        """Record where a node is."""
        gateway = self._gateway
        if gateway.release.gateway_checks_peer_urls:
            require_peer_url(request.url)
        gateway.change("peer_urls", request.id, request.url)
        return Empty()

    async def set_node_status(self, request: pb.SetNodeStatusRequest) -> Empty:
        """Record whether a node takes registrations."""
        if request.status not in ("up", "down"):
            raise GatewayError("invalid status: expected 'up' or 'down'")
        self._gateway.change("node_statuses", request.id, request.status)
        return Empty()

    async def get_node_statuses(self) -> pb.GetNodeStatusesResponse:
        """List the nodes whose status was set."""
        statuses = sorted(self._gateway.records.node_statuses.items())
        entries = [pb.NodeStatusEntry(node_id=node, status=status) for node, status in statuses]
        return pb.GetNodeStatusesResponse(statuses=entries)

    async def wave_kv_status(self) -> pb.WaveKvStatusResponse:
        """Describe the stores, which are replicated nowhere."""
        gateway = self._gateway
        others = sorted(gateway.records.peer_urls.keys() - {gateway.node_id})
        peers = [pb.PeerSyncStatus(id=node) for node in others]
        return pb.WaveKvStatusResponse(
            enabled=gateway.config.core.sync.enabled,
            persistent=pb.StoreSyncStatus(
                name="persistent",
                node_id=gateway.node_id,
                n_keys=gateway.persistent_keys(),
                next_seq=gateway.writes + 1,
                wal_enabled=True,
                peers=peers,
                digest=_digest(gateway.records.capture().model_dump_json()),
            ),
            ephemeral=pb.StoreSyncStatus(
                name="ephemeral",
                node_id=gateway.node_id,
                n_keys=gateway.ephemeral_keys(),
                next_seq=gateway.publications + 1,
                peers=peers,
                digest=_digest(json.dumps(gateway.published, sort_keys=True)),
            ),
        )

    # ---- rotation and removal

    async def set_instance_ready(self, request: pb.SetInstanceReadyRequest) -> Empty:
        """Let the app id of an instance lead to it, or not; its instance id always does."""
        if not request.HasField("ready"):
            raise GatewayError("ready is required")
        self._gateway.registry.set_ready(request.instance_id, request.ready)
        self._gateway.log.info("rotation", instance=request.instance_id, ready=request.ready)
        return Empty()

    async def remove_cvm(self, request: pb.RemoveCvmRequest) -> pb.RemoveCvmResponse:
        """Forget an instance, and say whether there was one."""
        require_id("instance_id", request.instance_id)
        known = self._gateway.registry.remove(request.instance_id)
        return pb.RemoveCvmResponse(record_existed=known, removed_locally=known)

    async def list_rejected_instances(self) -> pb.ListRejectedInstancesResponse:
        """List no instance: a record that cannot be used ends the start of this gateway."""
        return pb.ListRejectedInstancesResponse()

    async def remove_node(self, request: pb.RemoveNodeRequest) -> pb.RemoveNodeResponse:
        """Forget another node, and say whether it was known."""
        gateway, node = self._gateway, request.node_id
        if node == gateway.node_id:
            raise GatewayError("a node cannot remove itself")
        has_url, has_status = node in gateway.records.peer_urls, node in gateway.records.node_statuses
        gateway.change("peer_urls", node, None)
        gateway.change("node_statuses", node, None)
        return pb.RemoveNodeResponse(record_existed=has_url or has_status, removed_from_peer_set=has_url)

    # ---- port policies

    async def set_instance_port_policy(self, request: pb.SetInstancePortPolicyRequest) -> Empty:
        """Set a policy that counts more than the instance's own."""
        if not request.HasField("policy"):
            raise GatewayError("port policy is required")
        self._gateway.registry.set_override(request.instance_id, admin_policy(request.policy))
        return Empty()

    async def clear_instance_port_policy(self, request: pb.ClearInstancePortPolicyRequest) -> Empty:
        """Let the instance's own policy count again."""
        self._gateway.registry.set_override(request.instance_id, None)
        return Empty()

    async def get_instance_port_policy(
        self, request: pb.GetInstancePortPolicyRequest
    ) -> pb.GetInstancePortPolicyResponse:
        """Show both policies, and which of them is in force."""
        return policy_view(self._gateway.registry.entry(request.instance_id))


def require_id(field: str, value: str) -> None:
    """Raise `GatewayError` for a text that no instance can be called, with the text of upstream's `validate_id`."""
    if not value:
        raise GatewayError(f"{field} is empty")
    if (size := len(value.encode())) > MAX_ID:
        raise GatewayError(f"{field} is {size} bytes, limit is {MAX_ID}")
    if any(character.isspace() or unicodedata.category(character) == "Cc" for character in value):
        raise GatewayError(f"{field} contains whitespace or control characters")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
