"""How a guest of `dstack-emu boot` gets its keys: from a KMS that runs elsewhere, and may not be there yet.

A module of its own, because it needs verification, which an agent with keys of its own does not.
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
"""Seconds between two requests to a KMS that does not answer, or does not give keys, yet."""

_OF_ANOTHER_SEED: Final = ("PCCS status 404", "InvalidCrlSignatureForPublicKey")
"""What verifiers say of evidence of another seed: no PCCS knows the platform, or collateral is under another root."""


@dataclass(frozen=True, slots=True)
class CollateralSource:
    """Where collateral for the KMS's evidence comes from: a PCCS, under a root certificate (DER), of a seed."""

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
    """Fetch a booted domain's keys, and try again for as long as the KMS may be unreachable.

    The caller closes the issuer. Raises `GuestError` with the refusal in the KMS's own words.
    """
    pccs = PccsClient(collateral.pccs_url)
    verifier = AttestationVerifier(pccs, TrustAnchor(collateral.root_der), wall_clock)
    try:
        return await _fetch(domain, kms, verifier, entropy, progress)
    except KmsUnreachableError:
        raise
    except GuestError as error:
        if not any(sign in str(error) for sign in _OF_ANOTHER_SEED):
            raise
        raise GuestError(
            f"{error} (the guest is of the seed {collateral.seed!r}: it and the KMS must be of one seed, "
            "and the PCCS of each a PCCS of that seed)"
        ) from error
    finally:
        await pccs.close()


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
