"""Asks the agent of an instance for its port policy, if its registration did not say: old guests do not.

Until it is known, no port of the instance is open. Source: dstack `gateway/src/proxy/port_policy.rs` at 312dc605.
"""

import asyncio

from google.protobuf.empty_pb2 import Empty
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.proto import dstack_guest_pb2 as guest
from dstack_emu.gateway.config import ProxySection
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.registry import Registry, instance_of
from dstack_emu.gateway.routing import Reach
from dstack_emu.gateway.state import PolicyEntry, PortNumber
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError
from dstack_emu.transport.events import EventLog


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Port(_Lenient):
    port: PortNumber
    pp: bool = False


class _Policy(_Lenient):
    ports: list[_Port] = Field(default_factory=list)
    restrict_mode: bool = False


class _AppCompose(_Lenient):
    port_policy: _Policy = _Policy()


class _TcbInfo(_Lenient):
    app_compose: str


class PolicyFetcher:
    """At most one request for each instance at a time; a failed one is repeated with growing pauses."""

    def __init__(self, registry: Registry, proxy: ProxySection, reach: Reach, log: EventLog) -> None:
        self._registry, self._proxy, self._reach, self._log = registry, proxy, reach, log
        self._running: dict[str, asyncio.Task[None]] = {}

    def begin(self, instance_id: str) -> None:
        """Begin to ask an instance, unless that is under way."""
        if instance_id in self._running:
            return
        task = begin_in_background(self._fetch(instance_id), f"port policy of {instance_id}")
        self._running[instance_id] = task
        task.add_done_callback(lambda done: self._ended(instance_id, done))

    def _ended(self, instance_id: str, task: asyncio.Task[None]) -> None:
        if self._running.get(instance_id) is task:
            del self._running[instance_id]

    def abandon(self) -> None:
        """End all requests."""
        for task in self._running.values():
            task.cancel()
        self._running = {}

    async def close(self) -> None:
        """End all requests, and wait for their end."""
        running = tuple(self._running.values())
        self.abandon()
        await asyncio.gather(*running, return_exceptions=True)

    async def _fetch(self, instance_id: str) -> None:
        settings = self._proxy.port_policy_fetch
        pause = settings.backoff_initial
        for attempt in range(settings.max_retries + 1):
            try:
                await self._ask(instance_id)
                return
            except (TransportError, RpcError, AttestError) as error:
                self._log.warning("port policy not fetched", instance=instance_id, attempt=attempt, reason=error)
            except GatewayError as error:  # to ask again would not help
                self._log.warning("port policy not known", instance=instance_id, reason=error)
                return
            if attempt < settings.max_retries:
                await asyncio.sleep(pause)
                pause = min(2 * pause, settings.backoff_max)

    async def _ask(self, instance_id: str) -> None:
        entry = self._registry.entry(instance_id)
        port = self._proxy.agent_port
        endpoint = self._reach.endpoint(instance_of(instance_id, entry), port)
        if endpoint is None:
            raise TransportError(f"http://{entry.ip}:{port}", "the instance cannot be reached")
        host, number = endpoint
        where = f"[{host}]" if ":" in host else host
        async with PrpcClient(f"http://{where}:{number}/prpc", timeout=self._proxy.port_policy_fetch.timeout) as agent:
            answer = await agent.call("Info", Empty(), guest.AppInfo)
        self._registry.set_reported(instance_id, policy_of(answer.tcb_info), entry.compose_hash)


def policy_of(tcb_info: str) -> PolicyEntry:
    """Read the policy in an agent's answer; an agent that does not show its compose file has an open one.

    Raises `GatewayError` if there is a text that cannot be read.
    """
    if not tcb_info:
        return PolicyEntry()
    try:
        compose = _TcbInfo.model_validate_json(tcb_info).app_compose
        policy = _AppCompose.model_validate_json(compose).port_policy
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise GatewayError(f"tcb_info of the agent has no app_compose that can be read: {reason}") from error
    return PolicyEntry(ports={each.port: each.pp for each in policy.ports}, restrict_mode=policy.restrict_mode)
