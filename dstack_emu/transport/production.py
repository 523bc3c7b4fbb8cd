"""Whether a program of this emulator is about to believe real hardware: Intel's root certificate, a real PCCS.

An emulated KMS that trusts Intel's root would give its keys, which protect nothing, to real machines, whose owners
believe that they are safe. Docs: docs/security.md.
"""

import hashlib
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

if TYPE_CHECKING:  # commands that verify nothing start without dcap-qvl
    from dstack_emu.attest.verify import TrustAnchor

INTEL_ROOT_KEY: Final = "a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e"
"""The SHA-256 of the public key (SubjectPublicKeyInfo in DER) of Intel's SGX Root CA, in hexadecimal."""
REAL_HOSTS: Final = ("intel.com", "phala.network", "azure.net", "azure.com", "googleapis.com", "alibabacloud.com")
"""Domains with a PCCS, or a service like one, for real hardware: Intel's PCS, dstack's default, and those of clouds."""


def reality_of(anchor: "TrustAnchor", pccs_url: str) -> str:
    """Say what of it belongs to real hardware: the empty text if nothing does."""
    if anchor.root_ca is None or _key(anchor.root_ca) == INTEL_ROOT_KEY:
        return "the root certificate is Intel's own"
    return pccs_of_reality(pccs_url)


def pccs_of_reality(pccs_url: str) -> str:
    """Say that a PCCS serves real hardware: the empty text if it is not known to."""
    host = (urlsplit(pccs_url).hostname or "").rstrip(".")
    if any(host == domain or host.endswith(f".{domain}") for domain in REAL_HOSTS):
        return f"the PCCS at {host} serves real hardware"
    return ""


def _key(certificate: bytes) -> str:
    key = x509.load_der_x509_certificate(certificate).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
