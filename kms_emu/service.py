"""The RPCs of a KMS with keys: one method each, over plain values; who may call what is decided by `kms_emu.gate`.

`kms_emu.onboard_service` has those before there are keys. Order of checks, error contexts and texts: dstack
`kms/src/main_service.rs` at 312dc605.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.csr import parse_request, require_validity_order
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import find_payload
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.prpc import decode_json
from dstack_emu.attest.verify import VerifiedAttestation, require_bound_to_key
from dstack_emu.kms_emu import keys
from dstack_emu.kms_emu.auth_api import AuthInfo
from dstack_emu.kms_emu.auth_cache import ShortLived
from dstack_emu.kms_emu.call_log import journaled
from dstack_emu.kms_emu.cert_dir import BOOTSTRAP_INFO
from dstack_emu.kms_emu.dependencies import KmsDependencies
from dstack_emu.kms_emu.errors import DisabledError, InvalidRequestError, context
from dstack_emu.kms_emu.gate import Gate, require_app_id
from dstack_emu.kms_emu.image_cache import ImageCache, main_listener_rpc
from dstack_emu.kms_emu.keys import KmsKeys
from dstack_emu.kms_emu.onboarding import own_evidence
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.service import Rpc, ServiceTable, without_arguments, without_context


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: evidence from the client certificate, verified and bound to its key, or None without any."""

    attestation: VerifiedAttestation | None = None

    def fields(self) -> Mapping[str, object]:
        """Return its identity, for the log."""
        if self.attestation is None:
            return {}
        return {"app_id": find_payload(self.attestation.attestation.runtime_events, "app-id").hex()}


class KmsService:
    """The trusted RPCs, each behind the self check, and GetMeta."""

    def __init__(self, deps: KmsDependencies, kms_keys: KmsKeys) -> None:
        self._deps, self._keys = deps, kms_keys
        self._root_ca_pem = kms_keys.roots.root_ca.pem
        self.log, self.clock, self.core, self.release = deps.log, deps.clock, deps.core, deps.release
        self._self_allowed: ShortLived[None] = ShortLived(deps.auth_cache_seconds, deps.now)
        self._auth_info: ShortLived[AuthInfo] = ShortLived(deps.auth_cache_seconds, deps.now)
        self._gate = Gate(
            deps.auth,
            lambda: own_evidence(deps.agent, deps.verifier),
            enforce_self=deps.core.enforce_self_authorization,
            images=deps.images,
            allowed=self._self_allowed,
            release=deps.release,
        )

    def forget_answers(self) -> None:
        """Forget what the webhook answered: the next call requests it again."""
        self._self_allowed.forget()
        self._auth_info.forget()

    @property
    def gate(self) -> Gate:
        """Return the gate that every trusted RPC passes."""
        return self._gate

    async def get_meta(self) -> pb.GetMetaResponse:
        """Return the identity of this KMS; the only RPC without a self check."""
        info = await self._auth_info.get(self._deps.auth.info)
        return pb.GetMetaResponse(
            ca_cert=self._keys.roots.root_ca.pem,
            allow_any_upgrade=info.is_dev,
            k256_pubkey=self._keys.roots.k256_pubkey,
            bootstrap_info=self._bootstrap_info(),
            is_dev=info.is_dev,
            gateway_app_id=info.gateway_app_id,
            kms_contract_address=info.kms_contract_address,
            chain_id=info.chain_id,
            app_auth_implementation=info.app_implementation,
            os_image_verification=self.core.image.verify if self.release.get_meta_has_os_image_verification else None,
        )

    async def get_temp_ca_cert(self) -> pb.GetTempCaCertResponse:
        """Hand out the CA under which callers make their client certificates."""
        grant = await self._gate.self_check()
        roots = self._keys.roots
        return pb.GetTempCaCertResponse(
            temp_ca_cert=roots.temp_ca.pem, temp_ca_key=keys.temp_ca_secret(roots, grant), ca_cert=roots.root_ca.pem
        )

    async def get_app_key(self, caller: Caller, request: pb.GetAppKeyRequest) -> pb.AppKeyResponse:
        """Release an app instance's keys to it."""
        if request.api_version > 1:
            raise InvalidRequestError(f"Unsupported API version: {request.api_version}")
        of_kms = await self._gate.self_check()
        with context("App not allowed"):
            grant = await self._gate.admit_app(of_kms, caller.attestation, vm_config=request.vm_config)
        roots = self._keys.roots
        secrets = keys.app_secrets(roots, grant)
        return pb.AppKeyResponse(
            ca_cert=self._root_ca_pem,
            disk_crypt_key=secrets.disk_crypt_key,
            env_crypt_key=secrets.env_crypt_key,
            k256_key=secrets.k256_key,
            k256_signature=secrets.k256_signature,
            tproxy_app_id=grant.gateway_app_id,
            gateway_app_id=grant.gateway_app_id,
            os_image_hash=grant.boot_info.os_image_hash,
        )

    async def get_kms_key(self, caller: Caller, request: pb.GetKmsKeyRequest) -> pb.KmsKeyResponse:
        """Release the root keys to another KMS, unless the configuration leaves that to the admin listener."""
        if not self.core.onboard.public_key_handover:
            raise DisabledError("public KMS key handover is disabled; use the admin listener")
        return await self.hand_over(caller, request)

    async def hand_over(self, caller: Caller, request: pb.GetKmsKeyRequest) -> pb.KmsKeyResponse:
        """Release the root keys to another KMS."""
        of_kms = await self._gate.self_check()
        grant = await self._gate.admit_kms(of_kms, caller.attestation, vm_config=request.vm_config)
        secrets = keys.root_secrets(self._keys.roots, grant)
        root = pb.KmsKeys(ca_key=secrets.ca_key, k256_key=secrets.k256_key)
        return pb.KmsKeyResponse(temp_ca_key=secrets.temp_ca_key, keys=[root])

    async def get_app_env_encrypt_pub_key(self, request: pb.AppId) -> pb.PublicKeyResponse:
        """Give the public key that an app's environment variables are encrypted to."""
        grant = await self._gate.self_check()
        app_id, timestamp = require_app_id(request.app_id), self._deps.clock()
        key = keys.env_public_key(self._keys.roots, grant, app_id, timestamp)
        return pb.PublicKeyResponse(
            public_key=key.public_key, signature=key.signature, timestamp=timestamp, signature_v1=key.signature_v1
        )

    async def sign_cert(self, request: pb.SignCertRequest) -> pb.SignCertResponse:
        """Issue a certificate to an app, by the evidence inside its signing request."""
        of_kms = await self._gate.self_check()
        if request.api_version not in (1, 2):
            raise InvalidRequestError(f"Unsupported API version: {request.api_version}")
        size = len(request.csr) + len(request.signature)
        with context("Failed to parse csr", InvalidRequestError):
            signed = await run_aside(size, lambda: parse_request(request.csr, request.api_version))
        with context("Failed to verify csr signature", InvalidRequestError):
            await run_aside(size, lambda: signed.verify_signature(request.signature))
        with context("Failed to upgrade csr v1 to v2", InvalidRequestError):
            csr = await run_aside(size, signed.upgrade)
        with context("Quote verification failed"):
            require_bound_to_key(csr.attestation, csr.public_key)
            evidence = await self._deps.verifier.verify(csr.attestation)
        grant = await self._gate.admit_app(of_kms, evidence, vm_config=request.vm_config, boot_time=True)
        with context("Failed to sign certificate", InvalidRequestError):
            if self.release.refuses_reversed_validity:
                require_validity_order(csr.config.not_before, csr.config.not_after)
            sign = functools.partial(
                keys.sign_certificate,
                self._keys.roots,
                grant,
                csr,
                self._deps.issue_clock(),
                keeps_log_digests=self.release.certificate_log_has_digests,
                has_verified_app_info=self.release.certificate_app_info_is_verified,
            )
            chain = await run_aside(size, sign)
        return pb.SignCertResponse(certificate_chain=chain)

    def _bootstrap_info(self) -> pb.BootstrapResponse | None:
        if not self._deps.folder.exists(BOOTSTRAP_INFO):
            return None
        try:
            return decode_json(pb.BootstrapResponse, self._deps.folder.read(BOOTSTRAP_INFO))
        except FormatError as error:
            self.log.warning("not readable", file=BOOTSTRAP_INFO, reason=error)
            return None


def kms_table(service: KmsService) -> ServiceTable[Caller]:
    """Return the RPCs of the runtime phase, with 0.5.x's ClearImageCache if the configuration has a token for it."""
    env_key = without_context(service.get_app_env_encrypt_pub_key)
    token_hash = service.core.admin_token_hash if service.release.clear_image_cache_with_token else ""
    cache = ImageCache(service.core.image.cache_dir)
    table = ServiceTable[Caller].of(
        "KMS.",
        Rpc("GetMeta", Empty, pb.GetMetaResponse, without_arguments(service.get_meta)),
        Rpc("GetTempCaCert", Empty, pb.GetTempCaCertResponse, without_arguments(service.get_temp_ca_cert)),
        Rpc("GetAppKey", pb.GetAppKeyRequest, pb.AppKeyResponse, service.get_app_key),
        Rpc("GetKmsKey", pb.GetKmsKeyRequest, pb.KmsKeyResponse, service.get_kms_key),
        Rpc("GetAppEnvEncryptPubKey", pb.AppId, pb.PublicKeyResponse, env_key),
        Rpc("SignCert", pb.SignCertRequest, pb.SignCertResponse, without_context(service.sign_cert)),
        *([main_listener_rpc(cache, token_hash)] if token_hash else []),
    )
    return journaled(table, service.log, service.clock, Caller.fields)


def admin_handover_rpc(service: KmsService) -> Rpc[Any, Any, Any]:
    """Return the RPC of the admin listener that releases the root keys."""
    return Rpc("GetKmsKey", pb.GetKmsKeyRequest, pb.KmsKeyResponse, service.hand_over)
