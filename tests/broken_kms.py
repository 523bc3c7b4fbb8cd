"""The emulator's KMS with one of its checks switched off: `python -m tests.broken_kms DEFECT -c kms.toml …`.

Each defect is a patch of this process alone, of the place where the check is made. `none` is the KMS as it is.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dstack_emu.attest import verify
from dstack_emu.attest.app_info import BootInfo
from dstack_emu.cli.main import main as dstack_emu
from dstack_emu.kms_emu import gate, keys
from dstack_emu.kms_emu.auth_api import Decision, WebhookAuth
from dstack_emu.kms_emu.errors import UnavailableError
from dstack_emu.transport.pccs_client import AttestationVerifier

_decide = WebhookAuth.decide
_derive = keys._derive_app_secrets


def skips_self_check() -> None:
    async def self_check(self: gate.Gate) -> gate.SelfGrant:
        return gate.SelfGrant(None)

    gate.Gate.self_check = self_check  # type: ignore[method-assign]


def trusts_claimed_image() -> None:
    async def require_image(self: gate.Gate, evidence: object, vm_config: str) -> None: ...

    gate.Gate._require_image = require_image  # type: ignore[method-assign]


def caches_decisions() -> None:
    allowed: dict[tuple[BootInfo, bool], Decision] = {}

    async def decide(self: WebhookAuth, boot_info: BootInfo, *, is_kms: bool) -> Decision:
        about = boot_info, is_kms
        if about not in allowed:
            decision = await _decide(self, boot_info, is_kms=is_kms)
            if not decision.is_allowed:
                return decision
            allowed[about] = decision
        return allowed[about]

    WebhookAuth.decide = decide  # type: ignore[method-assign]


def fails_open_on_500() -> None:
    async def decide(self: WebhookAuth, boot_info: BootInfo, *, is_kms: bool) -> Decision:
        try:
            return await _decide(self, boot_info, is_kms=is_kms)
        except UnavailableError as error:
            if "returned 500 " not in str(error):
                raise
            return Decision(True, "", "any")

    WebhookAuth.decide = decide  # type: ignore[method-assign]


def ignores_tcb_status() -> None:
    def boot_info(self: verify.VerifiedAttestation, **options: Any) -> BootInfo:
        return replace(_boot_info(self, **options), tcb_status="UpToDate")

    _boot_info = verify.VerifiedAttestation.boot_info
    verify.VerifiedAttestation.boot_info = boot_info  # type: ignore[method-assign]


def binds_no_key() -> None:
    async def verify_bound(self: AttestationVerifier, attestation: Any, spki: bytes) -> Any:
        return await self.verify(attestation)

    AttestationVerifier.verify_bound = verify_bound  # type: ignore[method-assign]


def has_one_key_for_all() -> None:
    keys._derive_app_secrets = lambda roots, app_id, instance_id: _derive(roots, bytes(20), bytes(20))


DEFECTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "skips_self_check": skips_self_check,
    "trusts_claimed_image": trusts_claimed_image,
    "caches_decisions": caches_decisions,
    "fails_open_on_500": fails_open_on_500,
    "ignores_tcb_status": ignores_tcb_status,
    "binds_no_key": binds_no_key,
    "has_one_key_for_all": has_one_key_for_all,
}


def main(arguments: list[str]) -> None:
    """Switch off the check that the first argument names, and run the KMS with the others."""
    DEFECTS[arguments[0]]()
    dstack_emu(["kms", *arguments[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
