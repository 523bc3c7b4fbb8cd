"""How a guest of `dstack-emu boot` gets its keys: from a KMS that runs elsewhere, and may not be there yet."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.deployment.clock import ISSUED_AT, wall_clock
from dstack_emu.deployment.guest import RETRY_PAUSE, KmsBoot
from dstack_emu.simulator.app_keys import AppKeys, CertificateIssuer
from dstack_emu.simulator.errors import GuestError, KmsUnreachableError
from dstack_emu.simulator.guest_boot import fetch_keys
from dstack_emu.simulator.seed import Entropy
from dstack_emu.transport.pccs_client import AttestationVerifier, PccsClient

if TYPE_CHECKING:
    from dstack_emu.deployment.guest import Guest

_OTHER_WORLD: Final = ("PCCS status 404", "InvalidCrlSignatureForPublicKey")
"""What verifiers say of evidence from another seed: a platform that no PCCS knows, collateral under another root."""


async def boot_through_kms(
    guest: "Guest", kms: KmsBoot, entropy: Entropy, closing: AsyncExitStack, progress: Callable[[str], None]
) -> tuple[AppKeys, CertificateIssuer]:
    """Fetch a guest's keys, as long as the KMS may be missing; what was opened is closed with `closing`.

    Raises `GuestError` with the refusal in the KMS's own words.
    """
    pccs = PccsClient(guest.pccs_url)
    closing.push_async_callback(pccs.close)
    verifier = AttestationVerifier(pccs, TrustAnchor(guest.intel.root_der), wall_clock)
    patient_until, said = time.monotonic() + kms.patience, ""
    while True:
        try:
            keys, issuer = await fetch_keys(
                guest.domain, kms.url, verifier, entropy, ISSUED_AT, measures_kms=kms.measures_kms
            )
            closing.push_async_callback(issuer.close)
            return keys, issuer
        except KmsUnreachableError as error:
            if time.monotonic() + RETRY_PAUSE > patient_until:
                raise
            if str(error) != said:
                said = str(error)
                progress(f"waiting up to {kms.patience:g} s for {kms.url}: {error}")
            await asyncio.sleep(RETRY_PAUSE)
        except GuestError as error:
            if any(sign in str(error) for sign in _OTHER_WORLD):
                raise GuestError(
                    f"{error} (the guest is of the seed {guest.config.seed!r}: it and the KMS must be of one seed, "
                    "and the PCCS of each a PCCS of that seed)"
                ) from error
            raise
