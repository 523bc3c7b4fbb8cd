"""Wildcard certificates of domains, from a CA of this emulator in the place of Let's Encrypt, and which are loaded.

A certificate of `example.com` is for `*.example.com`: one label more, neither the name itself nor two labels more.
"""

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dstack_emu.attest.certificate import pem, spki_der
from dstack_emu.attest.issuing import CertificateAuthority, CertificateRequest, self_signed
from dstack_emu.attest.kdf import p256_from_uniform, pkcs8_pem
from dstack_emu.gateway.ingress.tls import domain_tls
from dstack_emu.gateway.state import CertificateEntry
from dstack_emu.transport.events import EventLog

LIFETIME: Final = 90 * 86400
"""Seconds that a certificate is valid, as Let's Encrypt's."""
_BACKDATED: Final = 3600
_KEY_MATERIAL: Final = 48
"""Random bytes of a key: so many make the private scalar uniform."""
ORGANIZATION: Final = "dstack-emu (EMULATED, protects nothing)"
AUTHORITY: Final = "dstack-emu gateway CA (EMULATED)"

Entropy = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A certificate and its public key (SPKI DER)."""

    entry: CertificateEntry
    public_key: bytes


def make_authority(entropy: Entropy, now: int) -> CertificateAuthority:
    """Make a CA for wildcard certificates."""
    key = p256_from_uniform(entropy(_KEY_MATERIAL))
    request = CertificateRequest(
        public_key=key.public_key(), subject=AUTHORITY, organization=ORGANIZATION, ca_path_length=0
    )
    return self_signed(request, key, now)


def issue_wildcard(
    authority: CertificateAuthority, domain: str, entropy: Entropy, *, now: int, node: int
) -> IssuedCertificate:
    """Make a key and a certificate for the names one label below a domain."""
    key, name = p256_from_uniform(entropy(_KEY_MATERIAL)), f"*.{domain}"
    request = CertificateRequest(
        public_key=key.public_key(),
        subject=name,
        organization=ORGANIZATION,
        alt_names=[name],
        server_auth=True,
        not_before=now - _BACKDATED,
        not_after=now + LIFETIME,
    )
    chain = pem(authority.issue(request, now)) + authority.pem
    entry = CertificateEntry(chain=chain, key=pkcs8_pem(key), not_after=now + LIFETIME, issued_by=node, issued_at=now)
    return IssuedCertificate(entry, spki_der(key.public_key()))


class LoadedCertificates:
    """The certificates that the ingress shows, by domain. `static` stay when those of domains are loaded again."""

    def __init__(self, static: Mapping[str, CertificateEntry], clock: Callable[[], int], log: EventLog) -> None:
        self._static, self._clock, self._log = dict(static), clock, log
        self._loaded = dict(static)

    def load_all(self, certificates: Mapping[str, CertificateEntry]) -> None:
        """Put these in the place of all that were loaded, except the static ones.

        One that has expired, or does not fit its key, is left out with a warning: that of before stays.
        """
        usable = {domain: self._usable(domain, each) for domain, each in certificates.items()}
        self._loaded = {**{domain: each for domain, each in usable.items() if each is not None}, **self._static}

    def _usable(self, domain: str, certificate: CertificateEntry) -> CertificateEntry | None:
        reason = _why_unusable(certificate, self._clock())
        if not reason:
            return certificate
        self._log.warning("certificate not loaded", domain=domain, reason=reason)
        return self._loaded.get(domain)

    def load(self, domain: str, certificate: CertificateEntry) -> None:
        """Put one in the place of that of its domain."""
        self._loaded[domain] = certificate

    def get(self, domain: str) -> CertificateEntry | None:
        """Return the certificate of a domain, which is another object once it was renewed."""
        return self._loaded.get(domain)


def _why_unusable(certificate: CertificateEntry, now: int) -> str:
    if certificate.not_after <= now:
        return "certificate is expired"
    try:
        domain_tls(certificate.chain, certificate.key)
    except (ssl.SSLError, ValueError) as error:
        return f"failed to parse certificate: {error}"
    return ""
