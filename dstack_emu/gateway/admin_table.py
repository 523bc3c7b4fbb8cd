"""The table of the service Admin, by release."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from dstack_emu.attest.proto import gateway_pb2 as pb
from dstack_emu.attest.proto import gateway_v05_pb2 as old
from dstack_emu.attest.release import Release
from dstack_emu.gateway.admin import AdminService
from dstack_emu.gateway.admin_domains import DomainService
from dstack_emu.transport.service import Rpc, ServiceTable, in_messages_of, without_arguments, without_context

ROTATE: Final = "RotateAcmeCredentials"
EXIT: Final = "Exit"
ROTATION: Final = frozenset(("SetInstanceReady", "RemoveCvm", "ListRejectedInstances", "RemoveNode"))
"""What 0.6.0 added."""

_OLD: Final[Mapping[type[Message], type[Message]]] = {
    pb.StatusResponse: old.StatusResponse,
    pb.GetInfoResponse: old.GetInfoResponse,
    pb.WaveKvStatusResponse: old.WaveKvStatusResponse,
}


def admin_table(admin: AdminService, domains: DomainService, release: Release) -> ServiceTable[None]:
    """Return the RPCs of the admin listener."""
    handlers = _handlers(admin, domains)
    if not release.gateway_manages_acme_account:
        del handlers[ROTATE]
    if not release.gateway_rotates_instances:
        handlers = {name: handler for name, handler in handlers.items() if name not in ROTATION}
    methods: Mapping[str, MethodDescriptor] = pb.DESCRIPTOR.services_by_name["Admin"].methods_by_name
    rpcs = {name: _rpc(methods[name], handler, release) for name, handler in handlers.items()}
    table = ServiceTable("Admin.", rpcs)
    return in_messages_of(table, _OLD) if release.gateway_v05_messages else table


def _rpc(method: MethodDescriptor, handler: Callable[..., Awaitable[Any]], release: Release) -> Rpc[None, Any, Any]:
    request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    if request is Empty:
        return Rpc(method.name, request, answer, without_arguments(handler), reads_request=False)
    reads = method.name != EXIT or release.gateway_exit_reads_request
    return Rpc(method.name, request, answer, without_context(handler), reads_request=reads)


def _handlers(admin: AdminService, domains: DomainService) -> dict[str, Callable[..., Awaitable[Any]]]:
    return {
        "Status": admin.status,
        "GetInfo": admin.get_info,
        EXIT: admin.exit,
        "RenewCert": domains.renew_cert,
        "ReloadCert": domains.reload_cert,
        "SetCaa": domains.set_caa,
        "GetMeta": admin.get_meta,
        "SetNodeUrl": admin.set_node_url,
        "SetNodeStatus": admin.set_node_status,
        "WaveKvStatus": admin.wave_kv_status,
        "GetInstanceHandshakes": admin.get_instance_handshakes,
        "GetGlobalConnections": admin.get_global_connections,
        "GetNodeStatuses": admin.get_node_statuses,
        "ListDnsCredentials": domains.list_dns_credentials,
        "GetDnsCredential": domains.get_dns_credential,
        "CreateDnsCredential": domains.create_dns_credential,
        "UpdateDnsCredential": domains.update_dns_credential,
        "DeleteDnsCredential": domains.delete_dns_credential,
        "GetDefaultDnsCredential": domains.get_default_dns_credential,
        "SetDefaultDnsCredential": domains.set_default_dns_credential,
        "ListZtDomains": domains.list_zt_domains,
        "GetZtDomain": domains.get_zt_domain,
        "AddZtDomain": domains.add_zt_domain,
        "UpdateZtDomain": domains.update_zt_domain,
        "DeleteZtDomain": domains.delete_zt_domain,
        "RenewZtDomainCert": domains.renew_zt_domain_cert,
        "ForceReleaseCertLock": domains.force_release_cert_lock,
        "ListCertAttestations": domains.list_cert_attestations,
        "GetCertbotConfig": domains.get_certbot_config,
        "SetCertbotConfig": domains.set_certbot_config,
        ROTATE: domains.rotate_acme_credentials,
        "SetInstancePortPolicy": admin.set_instance_port_policy,
        "ClearInstancePortPolicy": admin.clear_instance_port_policy,
        "GetInstancePortPolicy": admin.get_instance_port_policy,
        "SetInstanceReady": admin.set_instance_ready,
        "RemoveCvm": admin.remove_cvm,
        "ListRejectedInstances": admin.list_rejected_instances,
        "RemoveNode": admin.remove_node,
    }
