"""The calls of the control API in Python; `control.server` serves them over HTTP.

Each call has taken effect when it returns. A call that is refused changes nothing.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.control.schemas import ControlError, checked, unknown
from dstack_emu.control.snapshots import StackState, apply_state, capture_state
from dstack_emu.control.vendor import VendorControl
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.health import check_grpc, check_services
from dstack_emu.deployment.running_kms import PERMANENT, RunningKms
from dstack_emu.deployment.specs import EventSpec, GuestSpec, KmsSpec
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.observability.fault_rules import FaultRule, InstalledRule
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.service_calls import UnknownCallError
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.urls import shown_url
from dstack_emu.vmm.errors import VmmError

B = TypeVar("B", bound=BaseModel)

READY = "ready"
"""The name of the snapshot that is taken when a stack is ready; `reset` restores it."""

_DENIED: Final = "boot denied: "
"""The words of a KMS before the reason of a webhook."""
_OF_THE_SOURCE: Final = "Source KMS is not allowed"
"""The words of a KMS whose webhook denied the source of its root keys."""


class Control(VendorControl):
    """The calls that read and change a running deployment. They raise `ControlError` if they are refused."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment)
        self._snapshots: dict[str, StackState] = {}
        self._restoring = asyncio.Lock()

    # ---- the stack

    def describe(self) -> dict[str, Any]:
        """Return the stack's description, as `up --json` printed it, and the parts that were added since."""
        deployment = self._deployment
        return {
            **deployment.description(),
            "guests": {name: self.guest(name) for name in deployment.guests},
            "kms_phases": {name: kms.phase for name, kms in deployment.kms.items()},
            "snapshots": sorted(self._snapshots),
        }

    async def health(self) -> dict[str, str]:
        """Return the health of each service: `ok`, or what is wrong with it."""
        found = await check_services({k: v for k, v in self._deployment.services.items() if k != "control"})
        found |= await check_grpc(self._deployment.grpc)
        return {name: problem or "ok" for name, problem in found.items()}

    def require_recordable(self, *, call: str = "*", service: str = "*", caller: str = "*", outcome: str = "*") -> None:
        """Refuse names of which the journal can hold no call; a pattern with a wildcard is a name, too."""
        try:
            self._instrumentation.calls.require_recordable(
                self.journal.values, call=call, service=service, caller=caller, outcome=outcome
            )
        except UnknownCallError as error:
            raise ControlError(str(error)) from error

    @property
    def journal(self) -> Journal:
        """The journal, which records every call."""
        return self._instrumentation.journal

    # ---- snapshots

    def became_ready(self) -> None:
        """Take the snapshot that `reset` restores."""
        self.snapshot(READY)

    def snapshots(self) -> list[str]:
        """Return the names of all snapshots."""
        return sorted(self._snapshots)

    def snapshot(self, name: str = "snapshot") -> str:
        """Take a snapshot under a name; replace an existing one of that name."""
        self._snapshots[name] = self._capture()
        return name

    async def revert(self, name: str = "snapshot") -> None:
        """Restore the state of a snapshot."""
        if name not in self._snapshots:
            raise unknown("snapshot", name, self.snapshots())
        await self._apply(self._snapshots[name])

    async def reset(self) -> None:
        """Restore the state in which the stack became ready."""
        await self.revert(READY)

    def forget_snapshot(self, name: str) -> None:
        """Delete a snapshot."""
        if name == READY:
            raise ControlError("the snapshot `ready` cannot be deleted: `reset` restores it", 409)
        if self._snapshots.pop(name, None) is None:
            raise unknown("snapshot", name, self.snapshots())

    def save(self) -> dict[str, Any]:
        """Return the state of the stack as JSON; it contains the keys of the emulated KMS."""
        return self._capture().model_dump(mode="json")

    async def load(self, document: Any) -> None:
        """Restore the state that `save` returned; an invalid document changes nothing."""
        await self._apply(StackState.read(document))

    def _capture(self) -> StackState:
        try:
            return capture_state(self._deployment)
        except StackError as error:
            raise ControlError(str(error), 409) from error

    async def _apply(self, state: StackState) -> None:
        try:
            async with self._restoring:
                await apply_state(self._deployment, state)
        except (StackError, GuestError, KmsError, FormatError, VmmError) as error:
            raise ControlError(f"the state cannot be restored: {error}", 409) from error

    # ---- trust domains

    def guest(self, name: str) -> dict[str, Any]:
        """Return one trust domain: what it measures, and where its agent answers."""
        guest = self._known_guest(name)
        info = guest.agent.app_info()
        return {
            "name": name,
            "app_id": info.app_id.hex(),
            "instance_id": info.instance_id.hex(),
            "compose_hash": info.compose_hash.hex(),
            "device_id": info.device_id.hex(),
            "mr_aggregated": info.mr_aggregated.hex(),
            "os_image_hash": info.os_image_hash.hex(),
            "platform": guest.domain.platform.name,
            "has_keys": guest.agent.has_keys,
            "url": guest.url,
            "dstack_sock": str(guest.dstack_sock),
            "tappd_sock": str(guest.tappd_sock),
            "decrypted_env": None if guest.decrypted_env is None else str(guest.decrypted_env),
        }

    async def add_guest(self, name: str, **spec: Any) -> dict[str, Any]:
        """Add a trust domain (fields of `GuestSpec`); it is powered on, has no keys yet, and its agent runs."""
        given = checked(GuestSpec, {"name": name, **spec})
        if name.startswith("kms-"):
            raise ControlError("a trust domain named kms-… belongs to a KMS: add the KMS, which creates it")
        if name in self._deployment.services or name in self._deployment.guests:
            raise ControlError(f"there is a service {name} already: choose another name", 409)
        try:
            await self._deployment.start_guest(given)
        except (GuestError, FormatError) as error:
            raise ControlError(str(error)) from error
        return self.guest(name)

    async def boot_guest(self, name: str, kms: str | Sequence[str] = "src") -> dict[str, Any]:
        """Let a trust domain fetch its keys from a KMS, or from the first of several that releases them.

        If it has keys already, it is power-cycled first. A refusal by the KMS has status 403 and the KMS's text; the
        denial of a webhook also names whom it denied.
        """
        guest = self._known_guest(name)
        if guest.name.startswith("kms-"):
            raise ControlError(f"{name} is the trust domain of a KMS, which gets its keys by onboarding, not by boot")
        names = (kms,) if isinstance(kms, str) else tuple(kms)
        phases = [(await self._asked_kms(each)).phase for each in names]
        if "runtime" not in phases:
            raise ControlError(f"kms-{names[0]} has no keys: it is in its {phases[0]} phase, onboard it first", 409)
        before = guest.domain.capture()
        if guest.agent.has_keys:
            guest.power_cycle()
        try:
            await self._deployment.boot(guest, names)
        except (GuestError, FormatError) as error:
            guest.domain.restore(before)
            domain = guest.domain
            raise _refused(error, f"app id {domain.app_id.hex()}, compose hash {domain.compose_hash.hex()}") from error
        return self.guest(name)

    def emit_event(self, name: str, event: str, payload: str = "", *, measured: bool = True) -> dict[str, Any]:
        """Extend a trust domain's RTMR3 with an event; with `measured` false, add it to the log only."""
        given, domain = checked(EventSpec, {"event": event, "payload": payload}), self._known_guest(name).domain
        (domain.measure if measured else domain.claim)(given.event, decode_hex(given.payload))
        return self.guest(name)

    async def remove_guest(self, name: str) -> None:
        """Stop a trust domain that was added while the stack ran."""
        guest = self._known_guest(name)
        if name == "app" or name.startswith("kms-"):
            raise ControlError(f"{name} is part of every stack and cannot be removed", 409)
        await self._deployment.stop_guest(guest)

    # ---- KMS

    async def add_kms(self, name: str, **spec: Any) -> dict[str, Any]:
        """Add a KMS without keys (fields of `KmsSpec`); `onboard_kms` gives it keys."""
        given, deployment = checked(KmsSpec, {"name": name, **spec}), self._deployment
        if name in deployment.kms:
            raise ControlError(f"there is a KMS {name} already: choose another name", 409)
        try:
            kms = await deployment.start_kms(given)
        except (StackError, KmsError, FormatError) as error:
            raise ControlError(str(error)) from error
        try:
            kms.measured = await kms.onboarding.measure()
        except StackError as error:
            await deployment.stop_kms(kms)
            raise ControlError(str(error)) from error
        return self.kms(name)

    async def onboard_kms(
        self, name: str, source: str | None = "src", source_token: str = "", onboard_token: str | None = None
    ) -> dict[str, Any]:
        """Onboard a KMS without keys from another KMS, or with `source` None bootstrap it; end its onboard phase.

        With a `source_token` the keys are requested from the admin listener of the source. `onboard_token` is sent in
        place of the token in the KMS's own configuration. A refusal by a KMS has status 403 and the KMS's text;
        the denial of a webhook also names the measurement that it denied.
        """
        kms = await self._asked_kms(name)
        source_url = None if source is None else await self._source_url(source, by_admin=bool(source_token))
        onboarding = kms.onboarding if onboard_token is None else replace(kms.onboarding, token=onboard_token)
        if kms.phase != "onboard":
            raise ControlError(f"kms-{name} has keys already: it is in its {kms.phase} phase", 409)
        try:
            if source_url is None:
                await onboarding.bootstrap()
            else:
                await onboarding.onboard(source_url, source_token)
        except StackError as error:
            judged = self._known_kms(source) if source is not None and _OF_THE_SOURCE in str(error) else kms
            measured = judged.guest.agent.app_info().mr_aggregated.hex()
            raise _refused(error, f"{judged.guest.name} has the mr_aggregated {measured}") from error
        return self.kms(name)

    async def _source_url(self, name: str, *, by_admin: bool) -> str:
        """Return the URL of the listener of a source that hands its keys over."""
        kms = await self._asked_kms(name)
        if not by_admin:
            return kms.url
        url = kms.admin_url
        if url is None:
            raise ControlError(
                f"source_token: kms-{name} has no admin listener: add a KMS with settings.admin, or leave the token out"
            )
        return url

    async def refresh_kms(self) -> None:
        """Ask the KMS that are other programs for their phases, which `kms`, `all_kms` and `describe` return."""
        for kms in self._deployment.kms.values():
            await kms.refresh()

    def all_kms(self) -> dict[str, dict[str, Any]]:
        """Return every KMS, by name."""
        return {name: self.kms(name) for name in self._deployment.kms}

    def kms(self, name: str) -> dict[str, Any]:
        """Return one KMS: its phase, its URL, its webhook and its trust domain."""
        kms, policies = self._known_kms(name), self._deployment.policies
        return {
            "name": name,
            "phase": kms.phase,
            "url": kms.url,
            "webhook": shown_url(kms.spec.webhook),
            "policy": str(policies[name]) if name in policies else None,
            "certs": str(kms.cert_dir),
            "guest": self.guest(kms.guest.name),
        }

    async def restart_kms(self, name: str) -> dict[str, Any]:
        """Start a KMS anew at the same address with its keys, as a new process that has judged nothing yet."""
        try:
            await self._known_kms(name).restart()
        except StackError as error:
            raise ControlError(str(error), 409) from error
        return self.kms(name)

    async def remove_kms(self, name: str) -> None:
        """Stop a KMS that was added while the stack ran."""
        kms = self._known_kms(name)
        if name in PERMANENT:
            raise ControlError(f"kms-{name} is part of every stack and cannot be removed", 409)
        await self._deployment.stop_kms(kms)

    async def _asked_kms(self, name: str) -> RunningKms:
        """Return a KMS whose phase is that of now."""
        kms = self._known_kms(name)
        await kms.refresh()
        return kms

    def _known_kms(self, name: str) -> RunningKms:
        kms = self._deployment.kms.get(name)
        if kms is None:
            raise unknown("KMS", name, self._deployment.kms)
        return kms

    # ---- faults

    def faults(self) -> list[dict[str, Any]]:
        """Return the faults in force, and the number of calls that each has applied to."""
        return [rule.to_json() for rule in self._instrumentation.faults.rules]

    def add_fault(self, **fault: Any) -> InstalledRule:
        """Put a fault in force (fields of `FaultRule`); refuse one that applies to no call of the present services."""
        rule = checked(FaultRule, fault)
        if not rule.later:
            try:
                self._instrumentation.calls.require_target(rule)
            except UnknownCallError as error:
                raise ControlError(f"{error} (with `later` the rule is accepted all the same)") from error
        return self._instrumentation.faults.add(rule)

    def lift_fault(self, fault_id: str) -> None:
        """Lift one fault."""
        faults = self._instrumentation.faults
        if not faults.lift(fault_id):
            raise unknown("fault", fault_id, [rule.id for rule in faults.rules] or ["none is in force"])

    def clear_faults(self) -> None:
        """Lift all faults."""
        self._instrumentation.faults.clear()


def _refused(error: Exception, who: str) -> ControlError:
    """Return a refusal in its own words; to a webhook's denial, add what the webhook compares with its policy."""
    return ControlError(f"{error} ({who})" if _DENIED in str(error).lower() else str(error), 403)
