"""What the ingress of a stack is given: instances, certificates, and who is told of its connections."""

import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import Message

from dstack_emu.attest.issuing import CertificateAuthority
from dstack_emu.attest.prpc import encode_json
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.deployment.gateway_names import INGRESS
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.instrumentation import Instrumentation
from dstack_emu.gateway.certificates import issue_wildcard
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.gateway import Gateway
from dstack_emu.gateway.ingress.connection import Interrupt
from dstack_emu.gateway.ingress.errors import RefusedConnectionError
from dstack_emu.gateway.ingress.record import COMPLETE, ConnectionRecord
from dstack_emu.gateway.routing import Instance
from dstack_emu.gateway.state import CertificateEntry, PolicyEntry
from dstack_emu.observability.fault_effects import until_lifted
from dstack_emu.observability.fault_rules import FaultRule, InstalledRule
from dstack_emu.observability.spans import OUTSIDE

CALL: Final = "Connect"
"""What faults and the journal call a connection."""

FindGateway = Callable[[], Gateway | None]
"""Returns the gateway, None before it has keys."""


class StackRoutes:
    """The instances of a stack: its KMS, which need no registration, and those that the gateway has registered.

    It implements `routing.Routes`.
    """

    def __init__(self, gateway: FindGateway, kms: Callable[[], Sequence[RunningGuest]]) -> None:
        self._gateway, self._kms = gateway, kms

    def candidates(self, name: str) -> Sequence[Instance]:
        """Return the KMS of an instance id or app id, or what is registered under that."""
        own = [each for each in map(_instance_of, self._kms()) if name in (each.id, each.app_id)]
        gateway = self._gateway()
        return own or (() if gateway is None else gateway.candidates(name))

    async def port_policy(self, instance: Instance) -> PolicyEntry | None:
        """Return the policy in force; of a KMS every port is open."""
        gateway = self._gateway()
        if gateway is None or not instance.ip:
            return PolicyEntry()
        return await gateway.port_policy(instance)


def interruptions(instrumentation: Instrumentation) -> Interrupt:
    """Return what applies the faults of the ingress to connections."""
    faults = instrumentation.faults
    instrumentation.calls.add(INGRESS, (CALL,))

    def interrupt() -> Awaitable[None] | None:
        met = faults.meet(INGRESS, CALL, OUTSIDE)
        return None if met is None else _interrupted(*met)

    return interrupt


async def _interrupted(rule: InstalledRule, fault: FaultRule) -> None:
    if fault.kind == "delay":
        await until_lifted(rule, fault.seconds)
        return
    if fault.kind == "hang":
        await rule.lifted.wait()
    raise RefusedConnectionError(f"made by fault {rule.id}")


def _instance_of(guest: RunningGuest) -> Instance:
    """Return a KMS as an instance; it has no address in the pool."""
    return Instance(guest.domain.instance_id.hex(), guest.domain.app_id.hex(), "")


class IngressCertificates:
    """The wildcard certificates of the ingress: those that the gateway has, and one of the base domain, which is there
    before the gateway has keys.
    """

    def __init__(self, base_domain: str, authority: CertificateAuthority, gateway: FindGateway) -> None:
        self._base_domain, self._gateway = base_domain, gateway
        self._base = issue_wildcard(authority, base_domain, os.urandom, now=wall_clock(), node=0).entry

    def find(self, domain: str) -> CertificateEntry | None:
        """Return the certificate of a domain, None if there is none."""
        name, gateway = domain.lower(), self._gateway()
        found = None if gateway is None else gateway.certificates.get(name)
        return found or (self._base if name == self._base_domain else None)


class GatewayPages:
    """What the gateway tells about itself at its special id, as `ThisNode`."""

    def __init__(self, guest: RunningGuest, gateway: FindGateway) -> None:
        self._guest, self._gateway = guest, gateway

    async def app_info(self) -> Mapping[str, Any]:
        """Return what its guest agent's `Info` says."""
        return _as_json(await self._guest.agent.public_info())

    async def acme_info(self) -> Mapping[str, Any]:
        """Return what its RPC `AcmeInfo` says; raise `GatewayError` before it has keys."""
        gateway = self._gateway()
        if gateway is None:
            raise GatewayError("the gateway has no keys yet")
        return _as_json(gateway.acme_info())


def _as_json(answer: Message) -> Mapping[str, Any]:
    document: dict[str, Any] = json.loads(encode_json(answer))
    return document


def recorder(instrumentation: Instrumentation) -> Callable[[ConnectionRecord], None]:
    """Return what records each connection in the journal when it has ended."""
    journal = instrumentation.journal

    def record(connection: ConnectionRecord) -> None:
        if not journal.enabled:
            return
        span = journal.begin(INGRESS, CALL, None, 0, OUTSIDE)
        span.time -= connection.seconds
        span.annotate(
            "connection",
            {
                "client": connection.client,
                "server_name": connection.server_name,
                "id": connection.id,
                "port": connection.port,
                "treatment": connection.treatment,
                "app_id": connection.app_id,
                "instance_id": connection.instance_id,
                "received": connection.received,
                "sent": connection.sent,
                "ended": connection.ended,
            },
        )
        is_complete = connection.ended == COMPLETE
        journal.end(span, 200 if connection.is_forwarded else None, "" if is_complete else connection.ended)

    return record
