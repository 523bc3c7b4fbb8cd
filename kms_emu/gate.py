"""The gate: no key is released without a decision, and the types enforce that.

    evidence → admit → BootInfo → auth webhook → decision → OS image → release → grant → keys

`kms_emu.keys` demands a grant for each secret, and only this module creates grants: for this KMS itself (`SelfGrant`),
for an app (`AppGrant`), for another KMS (`KmsGrant`). The KMS's own boot info is kept as long as the process runs. A
success about the KMS itself is kept for a short time if that is configured; a decision about a caller never is.
Source: dstack `kms/src/main_service.rs` (`ensure_*`) and `main_service/upgrade_authority.rs` at 312dc605 and 0441b5ac.
"""

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dstack_emu.attest.app_info import APP_ID_SIZE, AppInfo, BootInfo, require_same_config
from dstack_emu.attest.cache import Memo
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.kms_emu.auth_api import AuthApi
from dstack_emu.kms_emu.auth_cache import ShortLived
from dstack_emu.kms_emu.errors import BootDeniedError, InvalidRequestError, KmsError, NotAttestedError, context
from dstack_emu.transport.aside import LARGE_EVIDENCE, run_aside
from dstack_emu.transport.image_store import ImageStore


@dataclass(frozen=True, slots=True)
class SelfGrant:
    """The webhook allows this KMS, by an answer to this call or by one that is still kept.

    `boot_info` is None if self authorization is switched off; no webhook was then requested.
    """

    boot_info: BootInfo | None


@dataclass(frozen=True, slots=True)
class AppGrant:
    """The webhook allows this app in this call, and allowed this KMS before it."""

    of_kms: SelfGrant
    boot_info: BootInfo
    gateway_app_id: str
    evidence: VerifiedAttestation
    vm_config: str
    """The config that replaces the one in the evidence; empty if there is none."""

    def app_info(self) -> AppInfo:
        """Return the verified identity and measurements, with the true device id and the authorized OS image."""
        return self.evidence.app_info(vm_config=self.vm_config)


@dataclass(frozen=True, slots=True)
class KmsGrant:
    """The webhook allows this other KMS in this call, and allowed this KMS before it."""

    of_kms: SelfGrant
    boot_info: BootInfo


def require_app_id(app_id: bytes, otherwise: type[KmsError] = InvalidRequestError) -> bytes:
    """Return the app id; raise `otherwise` if it does not have 20 bytes."""
    if len(app_id) != APP_ID_SIZE:
        raise otherwise("app_id must be 20 bytes")
    return app_id


def boot_info_of(evidence: VerifiedAttestation, *, vm_config: str = "", boot_time: bool = False) -> BootInfo:
    """Return the boot info of verified evidence: what the webhook is sent of identity, measurements and platform.

    Raises `NotAttestedError`, or `InvalidRequestError` if `vm_config`, which a request brought, is invalid.
    """
    try:
        info = evidence.boot_info(vm_config=vm_config, boot_time=boot_time)
    except AttestError as error:
        # The evidence was verified; the config of a request replaces its own.
        kind = InvalidRequestError if vm_config else NotAttestedError
        raise kind(str(error)) from error
    require_app_id(info.app_id, NotAttestedError)
    return info


_Admission = tuple[VerifiedAttestation, str, bool]
"""Evidence, the VM config of a request, and whether the measurements are those of boot time."""


def _boot_info_of(admission: _Admission) -> BootInfo:
    evidence, vm_config, boot_time = admission
    return boot_info_of(evidence, vm_config=vm_config, boot_time=boot_time)


def _size(admission: _Admission, _info: BootInfo | None = None) -> int:
    return admission[0].size + len(admission[1])


class Gate:
    """Requests decisions about this KMS and about callers that request keys.

    `own_evidence` attests the KMS with zero report_data; it is called once, at the first self check, and gives
    `own_boot_info`. `images` verifies the OS image of a caller that the webhook allowed; without it the os_image_hash
    that was sent to the webhook is accepted as claimed. `allowed` keeps the success of a self check; None keeps none.
    `release` determines whether a request's VM config may differ from the one in the evidence.
    """

    def __init__(
        self,
        auth: AuthApi,
        own_evidence: Callable[[], Awaitable[VerifiedAttestation]],
        *,
        enforce_self: bool = True,
        images: ImageStore | None = None,
        allowed: ShortLived[None] | None = None,
        release: Release = DEFAULT,
    ) -> None:
        self._auth, self._own_evidence, self._enforce_self = auth, own_evidence, enforce_self
        self._images, self._allowed = images, allowed
        self._config_must_match = release.vm_config_must_match
        self._boot_info = Memo(_boot_info_of, _size, max_entries=256, max_bytes=8 << 20)
        self.own_boot_info: BootInfo | None = None

    async def self_check(self) -> SelfGrant:
        """Request the decision whether this KMS may still run; every trusted RPC does this first."""
        if not self._enforce_self:
            return SelfGrant(None)
        with context("KMS self authorization failed"):
            if self.own_boot_info is None:
                with context("Failed to load cached self boot info"):
                    self.own_boot_info = boot_info_of(await self._own_evidence())
            check = functools.partial(self._require_self_allowed, self.own_boot_info)
            await (check() if self._allowed is None else self._allowed.get(check))
            return SelfGrant(self.own_boot_info)

    async def _require_self_allowed(self, own: BootInfo) -> None:
        with context("Failed to call self KMS auth check"):
            decision = await self._auth.decide(own, is_kms=True)
        if decision.is_allowed is not True:
            raise BootDeniedError(f"KMS is not allowed: {decision.reason}")

    async def admit_app(
        self, of_kms: SelfGrant, caller: VerifiedAttestation | None, *, vm_config: str, boot_time: bool = False
    ) -> AppGrant:
        """Request the decision whether a caller may have its app's keys, or a certificate (with `boot_time`)."""
        evidence = _require(caller)
        vm_config = self._config(evidence, vm_config)
        boot_info = await self._boot_info_of((evidence, vm_config, boot_time))
        decision = await self._auth.decide(boot_info, is_kms=False)
        if decision.is_allowed is not True:
            raise BootDeniedError(f"Boot denied: {decision.reason}")
        await self._require_image(evidence, vm_config)
        return AppGrant(of_kms, boot_info, decision.gateway_app_id, evidence, vm_config)

    async def admit_kms(self, of_kms: SelfGrant, caller: VerifiedAttestation | None, *, vm_config: str) -> KmsGrant:
        """Request the decision whether a caller may become a KMS with the same root keys."""
        evidence = _require(caller)
        vm_config = self._config(evidence, vm_config)
        boot_info = await self._boot_info_of((evidence, vm_config, False))
        decision = await self._auth.decide(boot_info, is_kms=True)
        if decision.is_allowed is not True:
            raise BootDeniedError(f"Boot denied: {decision.reason}")
        await self._require_image(evidence, vm_config)
        return KmsGrant(of_kms, boot_info)

    async def _boot_info_of(self, admission: _Admission) -> BootInfo:
        """Return the boot info of a caller: that of large evidence from a thread, any other one from a cache."""
        size = _size(admission)
        if size > LARGE_EVIDENCE:
            return await run_aside(size, functools.partial(_boot_info_of, admission), LARGE_EVIDENCE)
        return self._boot_info(admission)

    def _config(self, evidence: VerifiedAttestation, requested: str) -> str:
        """Return the VM config that replaces the one in the evidence, unless the release forbids another one."""
        if not self._config_must_match:
            return requested
        try:
            return require_same_config(requested, evidence.attestation.config)
        except FormatError as error:
            raise InvalidRequestError(str(error)) from error

    async def _require_image(self, evidence: VerifiedAttestation, vm_config: str) -> None:
        """Refuse a caller that did not boot the image whose hash was sent to the webhook."""
        if self._images is None:
            return
        text = "Failed to verify os image hash"
        with context(f"{text}: {text}"):  # upstream's text has it twice
            await self._images.verify(evidence, vm_config)


async def require_kms_allowed(auth: AuthApi, boot_info: BootInfo) -> None:
    """Require a KMS to be allowed: this one before it bootstraps, or the source before its keys are taken over."""
    with context("failed to call KMS auth check"):
        decision = await auth.decide(boot_info, is_kms=True)
    if decision.is_allowed is not True:
        raise BootDeniedError(f"boot denied: {decision.reason}")


def _require(caller: VerifiedAttestation | None) -> VerifiedAttestation:
    if caller is None:
        raise NotAttestedError("No attestation provided")
    return caller
