"""The calls of the control API that read and change the trust domains of a running stack."""

from collections.abc import Sequence
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.control.schemas import ControlError, checked, unknown
from dstack_emu.control.vendor import VendorControl
from dstack_emu.deployment.running_kms import RunningKms
from dstack_emu.deployment.specs import EventSpec, GuestSpec
from dstack_emu.simulator.errors import GuestError

_DENIED: Final = "boot denied: "
"""The words of a KMS before the reason of a webhook."""


class GuestControl(VendorControl):
    """The calls about trust domains. They raise `ControlError` if they are refused."""

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
            "boot_error": guest.boot_error,
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

        If it has keys already, it is power-cycled first; a boot that is in progress is awaited. A refusal by the KMS
        has status 403 and the KMS's text; the denial of a webhook also names whom it denied.
        """
        guest = self._known_guest(name)
        if guest.name.startswith("kms-"):
            raise ControlError(f"{name} is the trust domain of a KMS, which gets its keys by onboarding, not by boot")
        names = (kms,) if isinstance(kms, str) else tuple(kms)
        phases = [(await self._asked_kms(each)).phase for each in names]
        if phases[0] == "stopped" and "runtime" not in phases:
            text = f"kms-{names[0]} does not run: `ctl kms restart {names[0]}` starts it with its keys"
            raise ControlError(text, 409)
        if "runtime" not in phases:
            raise ControlError(f"kms-{names[0]} has no keys: it is in its {phases[0]} phase, onboard it first", 409)
        async with guest.booting:
            before = guest.domain.capture()
            if guest.agent.has_keys:
                guest.power_cycle()
            try:
                await self._deployment.boot(guest, names)
            except (GuestError, FormatError) as error:
                guest.domain.restore(before)
                domain = guest.domain
                whom = f"app id {domain.app_id.hex()}, compose hash {domain.compose_hash.hex()}"
                raise refused(error, whom) from error
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


def refused(error: Exception, who: str) -> ControlError:
    """Return a refusal in its own words; to a webhook's denial, add what the webhook compares with its policy."""
    return ControlError(f"{error} ({who})" if _DENIED in str(error).lower() else str(error), 403)
