"""Which instances are healthy, as their agents say it, if their apps ask for that (`requirements.health_check`).

An app id leads to no instance that is not healthy, as long as it leads to another one. What this node has seen is not
stored: after a start nothing is known. Source: dstack docs/app-health-checks.md at 1f7c6cda, and
`gateway/src/{main_service,models}.rs` and `gateway/src/proxy/health_check.rs` as stored shortly before 0.6.0.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.proto import dstack_guest_v1_pb2 as v1
from dstack_emu.gateway.config import ProxySection
from dstack_emu.gateway.routing import Instance, Reach
from dstack_emu.gateway.state import InstanceEntry
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError
from dstack_emu.transport.events import EventLog

HEALTHY: Final = "healthy"
UNHEALTHY: Final = "unhealthy"
UNKNOWN: Final = "unknown"
UNGATED: Final = "ungated"


class HealthStates:
    """What was seen of each instance; it counts for the WireGuard key that it had, since a new key is a new boot."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, str]] = {}

    def state(self, instance_id: str, entry: InstanceEntry) -> str:
        """Return healthy, unhealthy, unknown (not asked yet), or ungated (the app does not ask for it)."""
        if not entry.health_check:
            return UNGATED
        key, state = self._seen.get(instance_id, ("", UNKNOWN))
        return state if key == entry.public_key else UNKNOWN

    def admits(self, instance_id: str, entry: InstanceEntry) -> bool:
        """Return whether an instance may get connections."""
        return self.state(instance_id, entry) in (HEALTHY, UNGATED)

    def saw(self, instance_id: str, entry: InstanceEntry, state: str) -> None:
        """Record what was seen of an instance."""
        self._seen[instance_id] = (entry.public_key, state)

    def forget(self, instance_id: str) -> None:
        """Forget what was seen of an instance."""
        self._seen.pop(instance_id, None)

    def forget_all(self) -> None:
        """Forget everything."""
        self._seen = {}


class HealthPoller:
    """Asks the agents of some instances, which `asked` returns by their ids, again and again."""

    def __init__(
        self,
        asked: Callable[[], Mapping[str, InstanceEntry]],
        states: HealthStates,
        proxy: ProxySection,
        reach: Reach,
        log: EventLog,
    ) -> None:
        self._asked, self._states, self._reach, self._log = asked, states, reach, log
        self._settings, self._port = proxy.health_check, proxy.agent_port
        self._failures: dict[tuple[str, str], int] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, unless it has begun, or is switched off."""
        if self._settings.enabled and self._task is None:
            self._task = begin_in_background(self._run(), "health of instances")

    async def close(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            await self.poll()
            await asyncio.sleep(self._settings.interval)

    async def poll(self) -> None:
        """Ask each agent once."""
        turns = asyncio.Semaphore(self._settings.concurrency)
        asked = self._asked()
        known = {(id_, each.public_key) for id_, each in asked.items()}
        self._failures = {key: count for key, count in self._failures.items() if key in known}
        await asyncio.gather(*(self._look(turns, id_, entry) for id_, entry in asked.items()))

    async def _look(self, turns: asyncio.Semaphore, instance_id: str, entry: InstanceEntry) -> None:
        key = (instance_id, entry.public_key)
        try:
            async with turns:
                answer = await self._ask(instance_id, entry)
        except (TransportError, RpcError, AttestError) as error:
            self._failures[key] = self._failures.get(key, 0) + 1
            if self._failures[key] >= self._settings.failure_threshold:
                self._record(instance_id, entry, UNHEALTHY, f"health poll failed: {error}")
            return
        self._failures.pop(key, None)
        if answer.healthy:
            self._record(instance_id, entry, HEALTHY, "")
        else:
            said = [answer.error] if answer.error else [f"{each.name} is {each.status}" for each in answer.unhealthy]
            self._record(instance_id, entry, UNHEALTHY, ", ".join(said))

    async def _ask(self, instance_id: str, entry: InstanceEntry) -> v1.HealthResponse:
        endpoint = self._reach.endpoint(Instance(instance_id, entry.app_id, entry.ip), self._port)
        if endpoint is None:
            raise TransportError(f"http://{entry.ip}:{self._port}", "the instance cannot be reached")
        host, port = endpoint
        where = f"[{host}]" if ":" in host else host
        async with PrpcClient(f"http://{where}:{port}/prpc/v1", timeout=self._settings.timeout) as agent:
            return await agent.call("Health", v1.HealthRequest(), v1.HealthResponse)

    def _record(self, instance_id: str, entry: InstanceEntry, state: str, reason: str) -> None:
        before = self._states.state(instance_id, entry)
        self._states.saw(instance_id, entry, state)
        if state != before:
            self._log.info("health", instance=instance_id, state=state, before=before, reason=reason or None)
