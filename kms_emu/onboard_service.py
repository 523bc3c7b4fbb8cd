"""The RPCs of a KMS without keys: it makes its own, or takes another KMS's over.

`kms_emu.service` has those once there are keys. Order of checks, error contexts and texts: dstack
`kms/src/onboard_service.rs` at 312dc605.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.pck import device_id
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.prpc import encode_json
from dstack_emu.attest.report_data import bootstrap_report_data
from dstack_emu.kms_emu.call_log import journaled
from dstack_emu.kms_emu.cert_dir import BOOTSTRAP_INFO, K256_KEY, REQUIRED, ROOT_CA_KEY
from dstack_emu.kms_emu.dependencies import KmsDependencies
from dstack_emu.kms_emu.errors import InvalidRequestError, UnavailableError, WrongPhaseError, context
from dstack_emu.kms_emu.gate import boot_info_of, require_kms_allowed
from dstack_emu.kms_emu.keys import KmsKeys
from dstack_emu.kms_emu.onboarding import ZERO_REPORT_DATA, own_evidence
from dstack_emu.kms_emu.rpc_certificate import issue_rpc_certificate
from dstack_emu.transport.service import Rpc, ServiceTable, without_arguments, without_context
from dstack_emu.transport.urls import shown_url

MAX_SOURCE_TEXT: Final = 8192
"""The maximum length of the URL and of the token of a source KMS; a server reads no longer line."""


def validate_domain(domain: str) -> str:
    """Refuse what is no DNS name: non-empty ASCII of at most 253 bytes, labels of letters, digits and inner hyphens."""
    if not domain or len(domain) > 253 or not domain.isascii():
        raise InvalidRequestError("domain must be a non-empty ASCII DNS name of at most 253 bytes")
    for label in domain.split("."):
        allowed = all(c.isalnum() or c == "-" for c in label)
        if not label or len(label) > 63 or label.startswith("-") or label.endswith("-") or not allowed:
            raise InvalidRequestError("domain contains an invalid DNS label")
    return domain


class OnboardService:
    """Bootstrap new keys, or take another KMS's over; concurrent calls wait for each other."""

    def __init__(self, deps: KmsDependencies, finish: Callable[[], None]) -> None:
        self._deps, self._finish = deps, finish
        self.log, self.clock, self.release = deps.log, deps.clock, deps.release
        self._lock = asyncio.Lock()

    async def bootstrap(self, request: pb.BootstrapRequest) -> pb.BootstrapResponse:
        """Make and store new root keys, if this KMS is allowed to run."""
        domain = validate_domain(request.domain)
        async with self._lock:
            deps = self._deps
            if any(deps.folder.exists(name) for name in (BOOTSTRAP_INFO, ROOT_CA_KEY, K256_KEY)):
                raise WrongPhaseError("KMS has already been bootstrapped")
            with context("KMS is not allowed to bootstrap"):
                await self._require_self_allowed()
            kms_keys, files = await self._generate(domain)
            ca_pubkey, k256_pubkey = kms_keys.roots.ca_pubkey, kms_keys.roots.k256_pubkey
            attestation = await deps.agent.attest(bootstrap_report_data(ca_pubkey, k256_pubkey))
            answer = pb.BootstrapResponse(ca_pubkey=ca_pubkey, k256_pubkey=k256_pubkey, attestation=attestation)
            deps.folder.store({**files, BOOTSTRAP_INFO: encode_json(answer)})
        self.log.info("bootstrapped", domain=domain, k256_pubkey=k256_pubkey.hex())
        return answer

    async def auto_bootstrap(self, domain: str) -> None:
        """Bootstrap without a request, as `auto_bootstrap_domain` demands; no bootstrap info is written then."""
        validate_domain(domain)
        self._require_no_root_keys()
        with context("KMS is not allowed to auto-bootstrap"):
            await self._require_self_allowed()
        kms_keys, files = await self._generate(domain)
        self._deps.folder.store(files)
        self.log.info("bootstrapped", domain=domain, k256_pubkey=kms_keys.roots.k256_pubkey.hex(), asked=False)

    async def onboard(self, request: pb.OnboardRequest) -> pb.OnboardResponse:
        """Take over and store the root keys of a source KMS, if both sides are allowed."""
        domain = validate_domain(request.domain)
        for name, text in (("source_url", request.source_url), ("source_token", request.source_token)):
            if len(text) > MAX_SOURCE_TEXT:
                raise InvalidRequestError(f"{name} must be at most {MAX_SOURCE_TEXT} characters, got {len(text)}")
        async with self._lock:
            deps = self._deps
            if any(deps.folder.exists(name) for name in (ROOT_CA_KEY, K256_KEY)):
                raise WrongPhaseError("KMS has already been onboarded")
            with context("Failed to onboard"):
                token = request.source_token if deps.release.onboard_token else ""
                kms_keys = await deps.receiver.take_keys(request.source_url, domain, deps.issue_clock(), token)
                certificate = await issue_rpc_certificate(deps, kms_keys)
            with context("Failed to store keys"):
                deps.folder.store(kms_keys.files(certificate))
        k256_pubkey = kms_keys.roots.k256_pubkey
        self.log.info("onboarded", source=shown_url(request.source_url), domain=domain, k256_pubkey=k256_pubkey.hex())
        return pb.OnboardResponse(k256_pubkey=k256_pubkey)

    async def attestation_info(self) -> pb.AttestationInfoResponse:
        """Say what this KMS measures: what a policy that shall allow it needs."""
        deps = self._deps
        with context("Failed to get attestation"):
            evidence = await deps.agent.evidence(ZERO_REPORT_DATA)
        with context("Failed to verify attestation"):
            verified = await deps.verifier.verify(evidence)
        with context("Failed to get VM info"):
            vm_config = await deps.agent.vm_config()
        eth_rpc_url = kms_contract_address = ""
        try:
            info = await deps.auth.info()
            eth_rpc_url, kms_contract_address = info.eth_rpc_url or "", info.kms_contract_address or ""
        except UnavailableError as error:
            self.log.warning("failed to get auth api info", reason=error)
        with context("Failed to decode app info"):
            boot_info = boot_info_of(verified, vm_config=vm_config)
        return pb.AttestationInfoResponse(
            device_id=device_id(verified.quote.ppid),
            mr_aggregated=boot_info.mr_aggregated,
            os_image_hash=boot_info.os_image_hash,
            tee_variant=boot_info.tee_variant,
            site_name=deps.core.site_name,
            eth_rpc_url=eth_rpc_url,
            kms_contract_address=kms_contract_address,
            ppid=verified.quote.ppid,
        )

    async def finish(self) -> Empty:
        """End the onboard phase once this answer is out."""
        self._finish()
        return Empty()

    def _require_no_root_keys(self) -> None:
        """Refuse to make keys where one is left of an earlier set: its operator has to restore the missing files."""
        folder = self._deps.folder
        found = [name for name in (ROOT_CA_KEY, K256_KEY) if folder.exists(name)]
        if found:
            missing = ", ".join(name for name in REQUIRED if not folder.exists(name))
            raise WrongPhaseError(
                f"KMS has already been bootstrapped: {folder.path} has {' and '.join(found)}, but not {missing}; "
                "restore what is missing, or move the folder away"
            )

    async def _require_self_allowed(self) -> None:
        if not self._deps.core.enforce_self_authorization:
            return
        with context("failed to build local KMS boot info"):
            boot_info = boot_info_of(await own_evidence(self._deps.agent, self._deps.verifier))
        await require_kms_allowed(self._deps.auth, boot_info)

    async def _generate(self, domain: str) -> tuple[KmsKeys, dict[str, bytes]]:
        with context("Failed to generate keys"):
            kms_keys = KmsKeys.generate(domain, self._deps.entropy, self._deps.issue_clock())
            return kms_keys, kms_keys.files(await issue_rpc_certificate(self._deps, kms_keys))


def onboard_table(service: OnboardService) -> ServiceTable[None]:
    """Return the RPCs of the onboard phase."""
    table = ServiceTable[None].of(
        "Onboard.",
        Rpc("Bootstrap", pb.BootstrapRequest, pb.BootstrapResponse, without_context(service.bootstrap)),
        Rpc("Onboard", pb.OnboardRequest, pb.OnboardResponse, without_context(service.onboard)),
        Rpc(
            "GetAttestationInfo",
            Empty,
            pb.AttestationInfoResponse,
            without_arguments(service.attestation_info),
            old_spellings=service.release.attestation_mode_alias,
        ),
        Rpc("Finish", Empty, Empty, without_arguments(service.finish)),
    )
    return journaled(table, service.log, service.clock)
