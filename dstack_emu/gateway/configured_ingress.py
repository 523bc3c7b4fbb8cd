"""The ingress that gateway.toml describes, for one gateway that runs by itself."""

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from dstack_emu.attest.prpc import encode_json
from dstack_emu.attest.release import Release
from dstack_emu.gateway.agent import GuestAgent
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.gateway import Gateway
from dstack_emu.gateway.ingress.app_address import AppAddresses
from dstack_emu.gateway.ingress.dns_records import DnsRecords
from dstack_emu.gateway.ingress.server import Ingress
from dstack_emu.gateway.ingress.settings import IngressSettings, Timeouts
from dstack_emu.gateway.ingress.tls import TlsByDomain
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.listen import bind_tcp


def bind_ingress(config: GatewayConfig) -> Sequence[socket.socket]:
    """Bind every port of `core.proxy.listen_port`; raise `ListenError`, with none of them bound."""
    proxy, bound = config.core.proxy, list[socket.socket]()
    try:
        for port in proxy.listen_port:
            bound.append(bind_tcp(str(proxy.listen_addr), port, setting="core.proxy.listen_port"))
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    return bound


def configured_ingress(gateway: Gateway, agent: GuestAgent) -> Ingress:
    """Make the ingress of a gateway, which asks its agent what it tells about itself."""
    proxy = gateway.config.core.proxy
    _warn_of_what_has_no_effect(gateway.config, gateway.log)
    return Ingress(
        routes=gateway,
        reach=gateway.context.reach,
        find_tls=TlsByDomain(gateway.certificates.get, proxy.tls_versions),
        this_node=_Node(gateway, agent),
        app_addresses=AppAddresses(
            DnsRecords(proxy.app_address_dns_servers), proxy.app_address_ns_prefix, proxy.app_address_ns_compat
        ),
        settings=ingress_settings(gateway.config, gateway.release),
        connections=gateway.connections,
    )


def ingress_settings(config: GatewayConfig, release: Release) -> IngressSettings:
    """Return the limits that a configuration sets."""
    proxy, given = config.core.proxy, config.core.proxy.timeouts
    timeouts = Timeouts(
        proxy_header=given.pp_header,
        handshake=given.handshake,
        dns=given.dns_resolve,
        connect=given.connect,
        idle=given.idle if given.data_timeout_enabled else None,
        write=given.write if given.data_timeout_enabled and release.gateway_limits_writes else None,
        shutdown=given.shutdown if given.data_timeout_enabled else None,
        total=given.total,
    )
    return IngressSettings(
        timeouts=timeouts,
        max_connections_per_app=proxy.max_connections_per_app,
        buffer_size=proxy.buffer_size,
        reads_proxy_header=proxy.inbound_pp_enabled,
        insecure_localhost_backend=config.has_localhost_backend(release),
    )


def _warn_of_what_has_no_effect(config: GatewayConfig, log: EventLog) -> None:
    proxy = config.core.proxy
    if proxy.ktls is not None:
        log.warning("kTLS is configured but unavailable", setting="core.proxy.ktls")
    if proxy.connection_rebalance and not proxy.thread_per_core:
        log.warning("connection_rebalance is set but has no effect", without="core.proxy.thread_per_core")


class _Node:
    def __init__(self, gateway: Gateway, agent: GuestAgent) -> None:
        self._gateway, self._agent = gateway, agent

    async def app_info(self) -> Mapping[str, Any]:
        return _json(await self._agent.info())

    async def acme_info(self) -> Mapping[str, Any]:
        return _json(self._gateway.acme_info())


def _json(message: Message) -> Mapping[str, Any]:
    document: dict[str, Any] = json.loads(encode_json(message))
    return document
