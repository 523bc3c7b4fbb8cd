"""The keys of a guest, and the issuer of its certificates.

Without a KMS the guest derives them itself, as dstack-util does (`gen_app_keys_from_seed` in `dstack-util/src/main.rs`
at 312dc605); with a KMS they come from GetAppKey.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

from dstack_emu.attest.certificate import USAGE_APP_LEAF, pem, spki_der
from dstack_emu.attest.csr import SigningRequest
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.issuing import CertificateAuthority, CertificateRequest, self_signed
from dstack_emu.attest.kdf import derive_key, derive_p256, pkcs8_der
from dstack_emu.attest.release import Release
from dstack_emu.attest.report_data import ratls_report_data
from dstack_emu.simulator.trust_domain import KeyProvider, TrustDomain


class CertificateIssuer(Protocol):
    """Issues a certificate chain (PEM, leaf first) for a guest's signing request."""

    async def sign(self, request: SigningRequest, signature: bytes) -> list[str]:
        """Issue a certificate chain; raise an error with the text of the refusal."""
        ...


@dataclass(frozen=True, slots=True)
class AppKeys:
    """Keys of one app instance; a missing value is empty.

    Sizes: disk, env and k256 keys 32 bytes, k256_signature 65 bytes.
    """

    disk_crypt_key: bytes
    env_crypt_key: bytes
    k256_key: bytes
    k256_signature: bytes
    gateway_app_id: str
    ca_cert: str
    provider: KeyProvider


@dataclass(frozen=True, slots=True)
class LocalIssuer:
    """The app's own CA, for a guest without a KMS; `clock` gives the dates of its certificates."""

    authority: CertificateAuthority
    clock: Callable[[], int]
    release: Release

    async def sign(self, request: SigningRequest, signature: bytes) -> list[str]:
        """Issue a certificate under the app's CA; return leaf and CA. Raises `AttestError`."""
        request.verify_signature(signature)
        try:
            leaf_request = replace(
                request.certificate_request(usage=USAGE_APP_LEAF),
                keeps_log_digests=self.release.certificate_log_has_digests,
            )
            leaf = self.authority.issue(leaf_request, self.clock())
        except FormatError as error:
            raise FormatError(f"Failed to sign certificate: {error}") from error
        return [pem(leaf), self.authority.pem]


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """The keys that a guest without a KMS derives from a sealing secret, with its CA."""

    keys: AppKeys
    issuer: LocalIssuer

    @classmethod
    def from_seed(cls, domain: TrustDomain, seed: bytes, provider: KeyProvider, clock: Callable[[], int]) -> Self:
        """Derive the keys; the CA certificate contains the domain's present evidence."""
        key = derive_p256(seed, [b"app-key"])
        disk_key = derive_p256(seed, [b"app-disk-key"])
        request = CertificateRequest(
            public_key=key.public_key(),
            subject="App Root Cert",
            ca_path_length=1,
            attestation=domain.attest(ratls_report_data(spki_der(key.public_key()))),
            keeps_log_digests=domain.release.certificate_log_has_digests,
        )
        authority = self_signed(request, key, clock())
        keys = AppKeys(
            disk_crypt_key=hashlib.sha256(pkcs8_der(disk_key)).digest(),
            env_crypt_key=b"",
            k256_key=derive_key(seed, [b"app-k256-key"]),
            k256_signature=b"",
            gateway_app_id="",
            ca_cert=authority.pem,
            provider=provider,
        )
        return cls(keys, LocalIssuer(authority, clock, domain.release))
