"""Which instances are registered, where each is in the pool, and when each was last heard of.

No WireGuard runs here. A registration stands for the handshake that a real instance makes, and so does a refresh,
which is the same call; `end_handshake` stands for an instance that is gone. Source: dstack
`gateway/src/main_service.rs` at 312dc605, and of the rotation `gateway/src/{main_service,models}.rs` as stored shortly
before 0.6.0.
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from dstack_emu.attest.release import Release
from dstack_emu.gateway.config import Core
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.health import HealthStates
from dstack_emu.gateway.pool import is_usable, lowest_free
from dstack_emu.gateway.routing import Instance
from dstack_emu.gateway.state import InstanceEntry, PolicyEntry, Records

KEY_SIZE: Final = 32
"""Bytes of a WireGuard public key, which is base64 in requests."""
ONLINE_SECONDS: Final = 300
"""GetMeta counts an instance as online if its handshake is younger."""

Entropy = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Registration:
    """Who registers: hex ids, the key as it was sent, and policy and health check, None if the caller did not say."""

    instance_id: str
    app_id: str
    public_key: str
    compose_hash: str
    policy: PolicyEntry | None
    health_check: bool | None = None


class Registry:
    """The instances of `records`; `changed` is called after each change, before it is answered.

    It stores them, or raises `GatewayError` and undoes the change.
    """

    def __init__(
        self,
        records: Records,
        core: Core,
        release: Release,
        *,
        clock: Callable[[], int],
        entropy: Entropy,
        health: HealthStates,
        changed: Callable[[], None],
    ) -> None:
        self._records, self._core, self._release = records, core, release
        self._health = health
        self._clock, self._entropy, self._changed = clock, entropy, changed

    # ---- registration

    def register(self, new: Registration) -> InstanceEntry:
        """Register an instance, or refresh it; raise `GatewayError` without a trace of the attempt."""
        self._require_identity(new)
        try:
            entry = self._entry(new)
        except GatewayError as error:
            raise GatewayError(f"failed to allocate IP address for client: {error}") from error
        self._records.instances[new.instance_id] = entry
        self._changed()
        return entry

    def _require_identity(self, new: Registration) -> None:
        prefix = f"[{new.instance_id}]"
        if not new.app_id:
            raise GatewayError(f"{prefix} app id is empty")
        if not new.instance_id:
            raise GatewayError(f"{prefix} instance id is empty")
        if self._release.gateway_checks_keys:
            _require_key(new.public_key, f"{prefix} invalid client public key")
        elif not new.public_key:
            raise GatewayError(f"{prefix} client public key is empty")

    def _entry(self, new: Registration) -> InstanceEntry:
        known = self._records.instances
        old, now = known.get(new.instance_id), self._clock()
        if self._release.gateway_checks_keys:
            if any(each.public_key == new.public_key for id_, each in known.items() if id_ != new.instance_id):
                raise GatewayError("WireGuard public key is already registered to another instance")
            if old is not None and old.app_id != new.app_id:
                raise GatewayError("instance_id is already registered to a different app")
        if old is not None and new.health_check not in (None, old.health_check):
            self._health.forget(new.instance_id)
        if old is not None and is_usable(IPv4Address(old.ip), self._core.wg):
            return self._refreshed(old, new, now)
        taken = {each.ip for id_, each in known.items() if id_ != new.instance_id}
        entry = InstanceEntry(
            app_id=new.app_id,
            ip=lowest_free(self._core.wg, taken),
            public_key=new.public_key,
            registered_at=now,
            handshake_at=now,
            compose_hash=new.compose_hash,
            reported=new.policy,
            health_check=bool(new.health_check),
        )
        if old is not None and self._release.gateway_rotates_instances:
            entry = entry.model_copy(update={"override": old.override, "ready": old.ready})
        return entry

    @staticmethod
    def _refreshed(old: InstanceEntry, new: Registration, now: int) -> InstanceEntry:
        """Return the entry of an instance that registers again: another compose hash forgets the policy it had."""
        reported = old.reported if old.compose_hash == new.compose_hash else None
        return old.model_copy(
            update={
                "public_key": new.public_key,
                "registered_at": old.registered_at if old.public_key == new.public_key else now,
                "handshake_at": now,
                "compose_hash": new.compose_hash,
                "reported": reported if new.policy is None else new.policy,
                "health_check": old.health_check if new.health_check is None else new.health_check,
            }
        )

    def recycle(self) -> list[str]:
        """Remove the instances that were registered and heard of too long ago; return their ids."""
        limit = self._clock() - self._core.recycle.timeout
        stale = [
            id_
            for id_, each in self._records.instances.items()
            if each.registered_at < limit and (each.handshake_at or each.registered_at) < limit
        ]
        for id_ in stale:
            del self._records.instances[id_]
            self._health.forget(id_)
        if stale:
            self._changed()
        return stale

    # ---- handshakes

    def end_handshake(self, instance_id: str) -> None:
        """Make an instance one that was never heard of; raise `GatewayError` if there is none of that id."""
        self._set(instance_id, handshake_at=None)

    def online(self) -> int:
        """Return how many instances were heard of in the last 300 seconds."""
        now = self._clock()
        times = (each.handshake_at for each in self._records.instances.values())
        return sum(at is not None and now - at < ONLINE_SECONDS for at in times)

    # ---- rotation

    def set_ready(self, instance_id: str, ready: bool) -> None:
        """Put an instance in the rotation of its app, or take it out; raise `GatewayError` if there is none."""
        self._set(instance_id, ready=ready)

    def remove(self, instance_id: str) -> bool:
        """Forget an instance; return whether there was one of that id."""
        if self._records.instances.pop(instance_id, None) is None:
            return False
        self._health.forget(instance_id)
        self._changed()
        return True

    # ---- policies

    def set_override(self, instance_id: str, policy: PolicyEntry | None) -> None:
        """Set or clear the policy of an operator; raise `GatewayError` if there is no such instance."""
        self._set(instance_id, override=policy)

    def set_reported(self, instance_id: str, policy: PolicyEntry, compose_hash: str) -> None:
        """Record what an instance's agent said of its policy, if the instance is still that of the compose hash."""
        entry = self._records.instances.get(instance_id)
        if entry is not None and entry.compose_hash == compose_hash:
            self._set(instance_id, reported=policy)

    # ---- what there is

    def entry(self, instance_id: str) -> InstanceEntry:
        """Return an instance; raise `GatewayError` if there is none of that id."""
        found = self._records.instances.get(instance_id)
        if found is None:
            raise GatewayError(f"instance {instance_id} not found")
        return found

    def candidates(self, name: str) -> Sequence[Instance]:
        """Return the instance of an instance id, or those of an app id, the freshest handshake first."""
        if name in self._records.instances:
            return (instance_of(name, self._records.instances[name]),)
        fresh = [(id_, each) for id_, each in self._records.instances.items() if each.app_id == name]
        if self._release.gateway_leaves_out_stale_instances:
            fresh = [(id_, each) for id_, each in fresh if self._is_fresh(each)]
        if self._release.gateway_rotates_instances:
            fresh = self._in_rotation(fresh)
        fresh.sort(key=lambda pair: (-(pair[1].handshake_at or 0), pair[0]))
        count = self._core.proxy.connect_top_n
        if count == 0 and fresh:
            fresh = [fresh[int.from_bytes(self._entropy(4), "big") % len(fresh)]]
        return tuple(instance_of(id_, each) for id_, each in fresh[: count or 1])

    def asked_for_health(self) -> Mapping[str, InstanceEntry]:
        """Return the instances whose app asks for a look at its health, without those that no app id leads to."""
        known = self._records.instances.items()
        return {id_: each for id_, each in known if each.health_check and self._is_fresh(each)}

    def _is_fresh(self, entry: InstanceEntry) -> bool:
        oldest = self._clock() - self._core.proxy.timeouts.handshake_stale
        return entry.handshake_at is not None and entry.handshake_at > oldest

    def _in_rotation(self, found: list[tuple[str, InstanceEntry]]) -> list[tuple[str, InstanceEntry]]:
        """Leave out what an operator took out, and what is not healthy, unless nothing else would remain."""
        ready = [(id_, each) for id_, each in found if each.ready]
        if not self._core.proxy.health_check.enabled:
            return ready
        return [(id_, each) for id_, each in ready if self._health.admits(id_, each)] or ready

    def _set(self, instance_id: str, **changed: object) -> None:
        self._records.instances[instance_id] = self.entry(instance_id).model_copy(update=changed)
        self._changed()


def instance_of(instance_id: str, entry: InstanceEntry) -> Instance:
    """Return what the ingress knows of an instance."""
    return Instance(instance_id, entry.app_id, entry.ip)


def _require_key(public_key: str, what: str) -> None:
    try:
        size = len(base64.b64decode(public_key, validate=True))
    except (binascii.Error, ValueError) as error:
        raise GatewayError(f"{what}: invalid WireGuard public key encoding: {error}") from error
    if size != KEY_SIZE:
        raise GatewayError(f"{what}: WireGuard public key must decode to {KEY_SIZE} bytes")
