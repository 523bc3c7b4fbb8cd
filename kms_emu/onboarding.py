"""Taking over the root keys of another KMS: the receiver's side of Onboard.

The source is verified by its evidence and this KMS's own webhook before its keys are requested; it verifies this one in
turn. Source: dstack `kms/src/onboard_service.rs` (`Keys::onboard`) at 312dc605; of the way over the admin listener, the
acceptance tests of 0.6.0; of a source that names no OS image, `upgrade_authority.rs` (`ensure_kms_allowed`) before it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.errors import AttestError, FormatError, UnverifiableError, VerificationError
from dstack_emu.attest.issuing import load_authority
from dstack_emu.attest.kdf import load_p256_pem, p256_from_uniform
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.release import DEFAULT
from dstack_emu.attest.signature import k256_key
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.kms_emu.agent_client import GuestAgentClient
from dstack_emu.kms_emu.auth_api import AuthApi
from dstack_emu.kms_emu.errors import BootDeniedError, InvalidRequestError, NotAttestedError, UnavailableError, context
from dstack_emu.kms_emu.gate import boot_info_of, require_kms_allowed
from dstack_emu.kms_emu.keys import Entropy, KmsKeys, RootKeys
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.http_client import Route, direct
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.ratls import (
    TIMEOUT,
    AttestedServer,
    RaTlsClient,
    RaTlsError,
    RefusedError,
    make_identity,
    make_self_issued_identity,
)

ZERO_REPORT_DATA: Final = bytes(64)


async def own_evidence(agent: GuestAgentClient, verifier: AttestationVerifier) -> VerifiedAttestation:
    """Attest this KMS itself with zero report_data, and verify it like anyone's."""
    with context("Failed to get local KMS attestation"):
        attestation = await agent.evidence(ZERO_REPORT_DATA)
    with context("Failed to verify local KMS attestation"):
        return await verifier.verify(attestation)


@dataclass(frozen=True, slots=True)
class Receiver:
    """A fresh KMS that takes keys over.

    `own_image_for_legacy_alone` is its release's rule for a source that names no OS image.
    """

    agent: GuestAgentClient
    auth: AuthApi
    verifier: AttestationVerifier
    entropy: Entropy
    timeout: float = TIMEOUT
    headers: MoreHeaders | None = None
    own_image_for_legacy_alone: bool = DEFAULT.substitutes_own_image_for_legacy_source_alone
    route: Route = direct

    async def take_keys(self, source_url: str, domain: str, now: int, token: str = "") -> KmsKeys:
        """Request the root keys of `source_url` (with or without `/prpc`); raise the first refusal on the way.

        With a `token` the source is an admin listener: one call, with the token as Bearer and a certificate of one's
        own issue. Without it the certificate is made under the source's temporary CA.
        """
        url = source_url.rstrip("/")
        url = url if url.endswith("/prpc") else f"{url}/prpc"
        if any(ord(character) < 32 or ord(character) == 127 for character in token):
            raise InvalidRequestError("source_token has a control character")
        try:
            ask = self._ask_admin(url, token, now) if token else self._ask(url, now)
            return self._keys(await ask, domain, now)
        except RefusedError as error:
            raise BootDeniedError(str(error)) from error
        except (RaTlsError, UnverifiableError, FormatError) as error:
            raise UnavailableError(str(error)) from error
        except AttestError as error:
            raise NotAttestedError(str(error)) from error

    async def _ask_admin(self, url: str, token: str, now: int) -> pb.KmsKeyResponse:
        """Request the keys of an admin listener, which shows its evidence with the answer."""
        with context("Failed to get quote"):
            identity = await make_self_issued_identity(p256_from_uniform(self.entropy(48)), self.agent.evidence, now)
        with context("Failed to get info"):
            vm_config = await self.agent.vm_config()
        source: list[VerifiedAttestation] = []
        more = self.headers or dict

        def headers() -> Mapping[str, str]:
            return {**more(), "Authorization": f"Bearer {token}"}

        client = self._client(url, source, identity=identity, headers=headers)
        try:
            answer = await client.call("GetKmsKey", pb.GetKmsKeyRequest(vm_config=vm_config), pb.KmsKeyResponse)
        except RaTlsError as error:
            # Whoever answers has been told the token, and may say it.
            raise type(error)(str(error).replace(token, "(the token)")) from None
        finally:
            await client.close()
        with context("Source KMS is not allowed for onboarding"):
            await self._require_source_allowed(source[0])
        return answer

    def _client(self, url: str, source: list[VerifiedAttestation], **options: Any) -> RaTlsClient:
        """Make a client that adds the evidence of each answer's server to `source`, and takes none without."""

        def require_attested(peer: AttestedServer) -> None:
            if peer.attestation is None:
                raise VerificationError("Source KMS certificate does not contain attestation")
            source.append(peer.attestation)

        return RaTlsClient(
            url,
            verifier=self.verifier,
            check_peer=require_attested,
            timeout=self.timeout,
            route=self.route,
            **options,
        )

    async def _ask(self, url: str, now: int) -> pb.KmsKeyResponse:
        """Request the keys with a certificate under the source's temporary CA."""
        source: list[VerifiedAttestation] = []
        connect = functools.partial(self._client, url, source, headers=self.headers)
        client = connect()
        try:
            temp = await client.call("GetTempCaCert", Empty(), pb.GetTempCaCertResponse)
        finally:
            await client.close()
        temp_key = load_p256_pem(temp.temp_ca_key, "temporary CA key")
        temp_ca = load_authority(temp.temp_ca_cert, temp_key, "temporary CA certificate")
        with context("Failed to get quote"):
            identity = await make_identity(temp_ca, p256_from_uniform(self.entropy(48)), self.agent.evidence, now)
        with context("Source KMS is not allowed for onboarding"):
            await self._require_source_allowed(source[0])
        with context("Failed to get info"):
            vm_config = await self.agent.vm_config()
        # The keys go to the holder of the evidence above, so the second connection must be with the same evidence, too.
        client = connect(identity=identity)
        try:
            answer = await client.call("GetKmsKey", pb.GetKmsKeyRequest(vm_config=vm_config), pb.KmsKeyResponse)
        finally:
            await client.close()
        if source[-1].attestation.report_data != source[0].attestation.report_data:
            raise NotAttestedError("Source KMS changed its key between two connections")
        return answer

    def _keys(self, answer: pb.KmsKeyResponse, domain: str, now: int) -> KmsKeys:
        """Read the keys that a source gave."""
        if len(answer.keys) != 1:
            raise UnavailableError("Invalid keys")
        roots = RootKeys.of(
            load_p256_pem(answer.temp_ca_key, "Failed to parse tmp CA key"),
            load_p256_pem(answer.keys[0].ca_key, "Failed to parse CA key"),
            k256_key(answer.keys[0].k256_key, "Failed to parse ECDSA key"),
            now,
        )
        return KmsKeys(roots, p256_from_uniform(self.entropy(48)), domain)

    async def _require_source_allowed(self, source: VerifiedAttestation) -> None:
        with context("failed to build KMS boot info from attestation"):
            boot_info = boot_info_of(source)
        is_legacy = not source.attestation.config
        if not boot_info.os_image_hash and (is_legacy or not self.own_image_for_legacy_alone):
            # A certificate with the legacy extensions carries no vm_config: upstream decides by the receiver's own
            # image.
            with context("failed to get local KMS boot info for os_image_hash fallback"):
                own = boot_info_of(await own_evidence(self.agent, self.verifier))
            boot_info = replace(boot_info, os_image_hash=own.os_image_hash)
        await require_kms_allowed(self.auth, boot_info)
