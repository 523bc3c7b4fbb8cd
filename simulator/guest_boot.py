"""A guest that boots with keys from a KMS, as dstack-util does it.

GetTempCaCert without CA checks, an RA-TLS certificate under the temporary CA, then mTLS with the KMS's root pinned,
whose certificate must have the usage `kms:rpc`; then GetAppKey, and the events that record where the keys came from.
Source: dstack `dstack-util/src/system_setup.rs:2016-2200` and `cert-client/src/lib.rs` at 312dc605.
"""

import functools
from dataclasses import dataclass
from typing import Final

from google.protobuf.empty_pb2 import Empty

from attest.attestation import Attestation
from attest.certificate import USAGE_KMS_RPC, certificate_spki, load_authority, load_pem
from attest.csr import SigningRequest
from attest.errors import AttestError, VerificationError
from attest.kdf import load_p256_pem, p256_from_uniform
from attest.proto import kms_pb2 as pb
from simulator.app_keys import AppKeys
from simulator.errors import GuestError
from simulator.seed import Entropy
from simulator.trust_domain import KeyProvider, TrustDomain
from transport.client import MoreHeaders
from transport.pccs_client import AttestationVerifier
from transport.ratls import TIMEOUT, Identity, Peer, RaTlsClient, RaTlsError, make_identity

API_VERSION: Final = 1
CSR_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class KmsIssuer:
    """Certificates from the KMS that gave the keys; `identity` is what the client shows it."""

    client: RaTlsClient
    vm_config: str
    identity: Identity

    async def sign(self, request: SigningRequest, signature: bytes) -> list[str]:
        """Ask the KMS's SignCert; the chain is leaf, app CA, root CA."""
        question = pb.SignCertRequest(
            api_version=CSR_VERSION, csr=request.encoded, signature=signature, vm_config=self.vm_config
        )
        try:
            answer = await self.client.call("SignCert", question, pb.SignCertResponse)
        except RaTlsError as error:
            raise GuestError(str(error)) from error
        return list(answer.certificate_chain)

    async def close(self) -> None:
        """Close the connections to the KMS."""
        await self.client.close()


async def fetch_keys(
    domain: TrustDomain,
    kms_url: str,
    verifier: AttestationVerifier,
    entropy: Entropy,
    now: int,
    *,
    patience: float = TIMEOUT,
    headers: MoreHeaders | None = None,
) -> tuple[AppKeys, KmsIssuer]:
    """Boot a domain through a KMS (`https://host:port`): fetch its keys, measure where they came from, and finish.

    `patience` is how many seconds each call to the KMS may take, then and later; `headers` are added to each.
    Raises `GuestError` with the refusal in the KMS's own words; the domain stays as it was after its first events.
    """
    url = f"{kms_url.rstrip('/')}/prpc"
    try:
        connect = functools.partial(RaTlsClient, url, timeout=patience, headers=headers)
        temp = await _temp_ca(connect())
        identity = await _identity(domain, temp, entropy, now)
        client = connect(identity=identity, root_ca=temp.ca_cert, verifier=verifier, judge=require_kms)
        try:
            request = pb.GetAppKeyRequest(api_version=API_VERSION, vm_config=domain.vm_config_json)
            answer = await client.call("GetAppKey", request, pb.AppKeyResponse)
        except BaseException:
            await client.close()
            raise
    except (RaTlsError, AttestError) as error:
        raise GuestError(f"Failed to get app keys from KMS: {error}") from error
    root = load_pem(temp.ca_cert, "KMS root CA certificate")
    provider = KeyProvider("kms", certificate_spki(root).hex())
    domain.complete(provider, os_image_hash=answer.os_image_hash)
    keys = AppKeys(
        disk_crypt_key=answer.disk_crypt_key,
        env_crypt_key=answer.env_crypt_key,
        k256_key=answer.k256_key,
        k256_signature=answer.k256_signature,
        gateway_app_id=answer.gateway_app_id,
        ca_cert=temp.ca_cert,
        provider=provider,
    )
    return keys, KmsIssuer(client, domain.vm_config_json, identity)


async def _temp_ca(client: RaTlsClient) -> pb.GetTempCaCertResponse:
    try:
        return await client.call("GetTempCaCert", Empty(), pb.GetTempCaCertResponse)
    finally:
        await client.close()


async def _identity(
    domain: TrustDomain, temp: pb.GetTempCaCertResponse, entropy: Entropy, now: int
) -> Identity:
    temp_key = load_p256_pem(temp.temp_ca_key, "temporary CA key")
    temp_ca = load_authority(temp.temp_ca_cert, temp_key, "temporary CA certificate")

    async def attest(report_data: bytes) -> Attestation:
        return domain.attest(report_data)

    return await make_identity(temp_ca, p256_from_uniform(entropy(48)), attest, now)


def require_kms(peer: Peer) -> None:
    """Refuse a server whose certificate is not of the usage `kms:rpc`."""
    if peer.usage is None:
        raise VerificationError("Missing server cert usage")
    if peer.usage != USAGE_KMS_RPC:
        raise VerificationError(f"Invalid server cert usage: {peer.usage}")
