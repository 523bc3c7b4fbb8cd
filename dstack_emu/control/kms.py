"""The calls of the control API that read and change the KMS of a running stack."""

from dataclasses import replace
from typing import Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.control.certificates import decoded_certificates
from dstack_emu.control.guests import GuestControl, refused
from dstack_emu.control.schemas import ControlError, checked
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.running_kms import PERMANENT
from dstack_emu.deployment.specs import KmsSpec
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT, RPC_CERT, TMP_CA_CERT
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.transport.urls import shown_url

CERTIFICATES: Final = (ROOT_CA_CERT, RPC_CERT, TMP_CA_CERT)
"""The files of a KMS's folder that have certificates."""

_OF_THE_SOURCE: Final = "Source KMS is not allowed"
"""The words of a KMS whose webhook denied the source of its root keys."""


class KmsControl(GuestControl):
    """The calls about KMS. They raise `ControlError` if they are refused."""

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
            raise refused(error, f"{judged.guest.name} has the mr_aggregated {measured}") from error
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

    def kms_certificates(self, name: str) -> dict[str, Any]:
        """Return the certificates in a KMS's folder, decoded, by file; none before it has keys."""
        return decoded_certificates(self._known_kms(name).cert_dir / file for file in CERTIFICATES)

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
