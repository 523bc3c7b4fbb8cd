"""A guest that boots with keys from a KMS, as dstack-util does it.

It tries the URLs of its KMS in turn. It calls GetTempCaCert without checking the CA, makes an RA-TLS certificate under
the temporary CA, and connects by mTLS, trusting only the KMS's root; the KMS's certificate must have the usage
`kms:rpc`. Then it calls GetAppKey, and measures the events that record the source of the keys.

Source: dstack `dstack-util/src/system_setup.rs:2016-2200` and `cert-client/src/lib.rs` at 312dc605; for the additional
step of 0.5.x, `system_setup.rs:824-898` at 40eaf35e; for the error of several KMS in 0.6, a public state of that file
shortly before release 0.6.0.
"""

import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.app_policy import verify_key_provider_inputs
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.certificate import USAGE_KMS_RPC, certificate_spki, load_pem
from dstack_emu.attest.csr import SigningRequest
from dstack_emu.attest.errors import AttestError, VerificationError
from dstack_emu.attest.issuing import CertificateAuthority, load_authority
from dstack_emu.attest.kdf import load_p256_pem, p256_from_uniform
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.simulator.app_keys import AppKeys
from dstack_emu.simulator.errors import GuestError, KmsRefusedError, KmsUnreachableError
from dstack_emu.simulator.guest_files import KmsAccess
from dstack_emu.simulator.seed import Entropy
from dstack_emu.simulator.trust_domain import KeyProvider, TrustDomain
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.http_client import Route, direct
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.ratls import (
    TIMEOUT,
    AttestedServer,
    RaTlsClient,
    RaTlsError,
    RaTlsUnreachableError,
    RefusedError,
    make_identity,
)
from dstack_emu.transport.tls import Identity
from dstack_emu.transport.urls import shown_url

API_VERSION: Final = 1
CSR_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class KmsIssuer:
    """Issues certificates through the KMS that released the keys, with the client certificate `identity`. Close it.

    `url` is that KMS's, with `/prpc`.
    """

    url: str
    client: RaTlsClient
    vm_config: str
    identity: Identity

    @classmethod
    def of(
        cls,
        domain: TrustDomain,
        url: str,
        identity: Identity,
        root_ca: str,
        *,
        connect: Callable[..., RaTlsClient] = RaTlsClient,
    ) -> Self:
        """Make a domain's access to the KMS at `url` (with `/prpc`), under its root (PEM). Makes no request.

        Like upstream's agent, it does not verify the KMS's evidence again; by release it verifies its usage.
        """
        check = _require_kms_usage if domain.release.verifies_usage_of_issuer else None
        client = connect(url, identity=identity, root_ca=root_ca, check_peer=check)
        return cls(url, client, domain.vm_config_json, identity)

    async def sign(self, request: SigningRequest, signature: bytes) -> list[str]:
        """Call the KMS's SignCert; return leaf, app CA and root CA.

        Raises `KmsRefusedError`, `KmsUnreachableError` or `GuestError`.
        """
        signing = pb.SignCertRequest(
            api_version=CSR_VERSION, csr=request.encoded, signature=signature, vm_config=self.vm_config
        )
        try:
            answer = await self.client.call("SignCert", signing, pb.SignCertResponse)
        except RefusedError as error:
            raise KmsRefusedError(str(error)) from error
        except RaTlsUnreachableError as error:
            raise KmsUnreachableError(str(error)) from error
        except RaTlsError as error:
            raise GuestError(str(error)) from error
        return list(answer.certificate_chain)

    async def close(self) -> None:
        """Close the connections to the KMS."""
        await self.client.close()


async def kms_issuer(
    domain: TrustDomain,
    access: KmsAccess,
    root_ca: str,
    entropy: Entropy,
    now: int,
    *,
    connect: Callable[..., RaTlsClient] = RaTlsClient,
) -> KmsIssuer:
    """Make a booted domain's access to SignCert: a new certificate under the temporary CA, and the KMS's root (PEM).

    Makes no request. `connect` makes the client.
    """
    identity = await _identity(domain, access.temp_ca, entropy, now)
    return KmsIssuer.of(domain, access.url, identity, root_ca, connect=connect)


@dataclass(frozen=True, slots=True)
class _Released:
    """What one KMS gave: its access, the CA that it names as its root, the keys, and what its certificate measures."""

    access: KmsAccess
    root_ca: str
    keys: pb.AppKeyResponse
    mr_kms: bytes | None


async def fetch_keys(
    domain: TrustDomain,
    kms_urls: Sequence[str],
    verifier: AttestationVerifier,
    entropy: Entropy,
    now: int,
    *,
    patience: float = TIMEOUT,
    headers: MoreHeaders | None = None,
    route: Route = direct,
) -> tuple[AppKeys, KmsIssuer]:
    """Boot a domain through the first KMS (`https://host:port`) that gives it keys: measure their source, and complete
    the boot.

    A guest whose release measures the KMS does so if the KMS's certificate contains evidence. `patience` is the timeout
    of each call to a KMS in seconds, now and later; `headers` are added to each call; `route` says where they go.
    Raises `GuestError` with the refusals of all KMS or of the first one, by release, or `KmsUnreachableError` if no KMS
    sent an answer; the domain then remains as it was before the call. What the guest refuses once it has keys leads to
    no other KMS.
    """
    connect = functools.partial(RaTlsClient, timeout=patience, headers=headers, route=route)

    async def request_keys(url: str) -> _Released:
        with _refused_as():
            temp = await _temp_ca(connect, url)
            temp_key = load_p256_pem(temp.temp_ca_key, "temporary CA key")
            access = KmsAccess(url, load_authority(temp.temp_ca_cert, temp_key, "temporary CA certificate"))
            load_pem(temp.ca_cert, "KMS root CA certificate")
            identity = await _identity(domain, access.temp_ca, entropy, now)
            check = _KmsCertificateCheck()
            client = connect(url, identity=identity, root_ca=temp.ca_cert, verifier=verifier, check_peer=check)
            request = pb.GetAppKeyRequest(api_version=API_VERSION, vm_config=domain.vm_config_json)
            try:
                with _refused_as("Failed to get app key: "):
                    answer = await client.call("GetAppKey", request, pb.AppKeyResponse)
            finally:
                await client.close()
        return _Released(access, temp.ca_cert, answer, check.mr_aggregated)

    require_kms_as_provider(domain, kms_urls)
    released = await _first_that_releases(kms_urls, domain.release, request_keys)
    answer = released.keys
    if not answer.disk_crypt_key:
        raise GuestError("Failed to get valid key phrase from KMS")
    provider = KeyProvider("kms", certificate_spki(load_pem(released.root_ca, "KMS root CA certificate")).hex())
    domain.complete(provider, os_image_hash=answer.os_image_hash, mr_kms=released.mr_kms)
    keys = AppKeys(
        disk_crypt_key=answer.disk_crypt_key,
        env_crypt_key=answer.env_crypt_key,
        k256_key=answer.k256_key,
        k256_signature=answer.k256_signature,
        gateway_app_id=answer.gateway_app_id,
        ca_cert=released.root_ca,
        provider=provider,
    )
    return keys, await kms_issuer(domain, released.access, released.root_ca, entropy, now, connect=connect)


def require_kms_as_provider(domain: TrustDomain, kms_urls: Sequence[str]) -> None:
    """Verify that an app-compose lets a KMS at one of these URLs give the keys; raise `GuestError`."""
    with _refused_as():
        verify_key_provider_inputs(domain.manifest, kms_urls, domain.release)
    named = domain.manifest.key_provider
    if named not in (None, "kms"):
        raise GuestError(
            f"app-compose: key_provider: kms expected, or none at all, got {named}, whose guest needs no KMS"
        )


async def _first_that_releases(
    kms_urls: Sequence[str], release: Release, request_keys: Callable[[str], Awaitable[_Released]]
) -> _Released:
    refusals: list[tuple[str, GuestError]] = []
    for kms_url in kms_urls:
        url = f"{kms_url.rstrip('/')}/prpc"
        try:
            return await request_keys(url)
        except GuestError as error:
            refusals.append((url, error))
    raise _all_refused(refusals, release)


def _all_refused(refusals: Sequence[tuple[str, GuestError]], release: Release) -> GuestError:
    kind = KmsUnreachableError if all(isinstance(e, KmsUnreachableError) for _, e in refusals) else GuestError
    if release.reports_every_kms:
        every = "; ".join(f"{shown_url(url)}: {error}" for url, error in refusals)
        said = f"failed to get app keys from KMS: {every}"
    else:
        said = f"Failed to get app keys from KMS: {refusals[0][1]}"
    return kind(f"Failed to request app keys: {said}")


async def _temp_ca(connect: Callable[..., RaTlsClient], url: str) -> pb.GetTempCaCertResponse:
    with _refused_as("Failed to get temp ca cert: ", nothing_came=KmsUnreachableError):
        client = connect(url)
        try:
            return await client.call("GetTempCaCert", Empty(), pb.GetTempCaCertResponse)
        finally:
            await client.close()


async def _identity(domain: TrustDomain, temp_ca: CertificateAuthority, entropy: Entropy, now: int) -> Identity:
    async def attest(report_data: bytes) -> Attestation:
        return domain.attest(report_data)

    key, keeps_digests = p256_from_uniform(entropy(48)), domain.release.certificate_log_has_digests
    return await make_identity(temp_ca, key, attest, now, keeps_log_digests=keeps_digests)


def _require_kms_usage(peer: AttestedServer) -> None:
    """Raise `VerificationError` if a server's certificate is none of a KMS: a KMS's root signs those of apps, too."""
    if peer.usage is None:
        raise VerificationError("missing server cert usage")
    if peer.usage != USAGE_KMS_RPC:
        raise VerificationError(f"Invalid server cert usage: {peer.usage}")


class _KmsCertificateCheck:
    """Accepts a server as a KMS by the usage in its certificate, and keeps its mr_aggregated."""

    def __init__(self) -> None:
        self.mr_aggregated: bytes | None = None

    def __call__(self, peer: AttestedServer) -> None:
        _require_kms_usage(peer)
        if peer.attestation is not None:
            self.mr_aggregated = peer.attestation.app_info().mr_aggregated


@contextmanager
def _refused_as(step: str = "", *, nothing_came: type[GuestError] = GuestError) -> Iterator[None]:
    try:
        yield
    except (RaTlsError, AttestError) as error:
        kind = nothing_came if isinstance(error, RaTlsUnreachableError) else GuestError
        raise kind(f"{step}{error}") from error
