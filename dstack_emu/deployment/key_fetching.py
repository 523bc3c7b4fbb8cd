"""Fetches the keys of a guest of `dstack-emu boot` from a KMS that runs elsewhere, and may not run yet.

It is a separate module because it imports verification, which an agent with generated keys does not need.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.deployment.clock import ISSUED_AT, wall_clock
from dstack_emu.deployment.guest_config import KmsBoot
from dstack_emu.simulator.app_keys import AppKeys
from dstack_emu.simulator.errors import GuestError, KmsUnreachableError
from dstack_emu.simulator.guest_boot import KmsIssuer, fetch_keys
from dstack_emu.simulator.seed import Entropy
from dstack_emu.simulator.trust_domain import TrustDomain
from dstack_emu.transport.pccs_client import AttestationVerifier, PccsClient
from dstack_emu.transport.urls import shown_url

RETRY_PAUSE: Final = 0.5
"""Seconds between two requests to a KMS that does not answer yet."""

_OF_ANOTHER_SEED: Final = ("HTTP 404", "InvalidCrlSignatureForPublicKey")
"""Parts of verifiers' errors for evidence of another seed: an unknown platform, or collateral under another root."""

_OF_ANOTHER_IMAGE: Final = "OS image is not allowed"
"""The reason of auth-simple, and of the contracts, for an OS image that a policy does not have."""


@dataclass(frozen=True, slots=True)
class CollateralSource:
    """The source of collateral for the KMS's evidence: a PCCS, its root certificate (DER), and its seed."""

    pccs_url: str
    root_der: bytes
    seed: str


async def fetch_keys_patiently(
    domain: TrustDomain,
    kms: KmsBoot,
    collateral: CollateralSource,
    entropy: Entropy,
    progress: Callable[[str], None],
) -> tuple[AppKeys, KmsIssuer]:
    """Fetch the keys of a booted domain; repeat this for as long as the KMS may be unreachable.

    The caller closes the issuer. Raises `GuestError` with the text of the KMS's refusal.
    """
    pccs = PccsClient(collateral.pccs_url)
    verifier = AttestationVerifier(pccs, TrustAnchor(collateral.root_der), wall_clock)
    try:
        return await _fetch(domain, kms, verifier, entropy, progress)
    except KmsUnreachableError:
        raise
    except GuestError as error:
        if not (advice := _advice(str(error), domain, collateral)):
            raise
        raise GuestError(f"{error} ({advice})") from error
    finally:
        await pccs.close()


def _advice(refusal: str, domain: TrustDomain, collateral: CollateralSource) -> str:
    """Return what this command adds to a refusal that an option of it may have caused; nothing if none may have."""
    if any(sign in refusal for sign in _OF_ANOTHER_SEED):
        return (
            f"the guest is of the seed {collateral.seed!r}: guest, KMS and PCCS must have the same seed; "
            "set it by --seed"
        )
    if _OF_ANOTHER_IMAGE in refusal:
        return (
            f"the guest is of the release {domain.release.name}, with an OS image of version {domain.image.version}: "
            "the policy may be for that of another release; set it by --release"
        )
    return ""


async def _fetch(
    domain: TrustDomain,
    kms: KmsBoot,
    verifier: AttestationVerifier,
    entropy: Entropy,
    progress: Callable[[str], None],
) -> tuple[AppKeys, KmsIssuer]:
    deadline, reported = time.monotonic() + kms.patience, ""
    while True:
        try:
            return await fetch_keys(domain, kms.urls, verifier, entropy, ISSUED_AT)
        except KmsUnreachableError as error:
            if time.monotonic() + RETRY_PAUSE > deadline:
                raise
            if str(error) != reported:
                reported = str(error)
                progress(f"waiting up to {kms.patience:g} s for {', '.join(map(shown_url, kms.urls))}: {error}")
            await asyncio.sleep(RETRY_PAUSE)
