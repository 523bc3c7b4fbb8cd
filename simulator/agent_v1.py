"""The guest API v1: the RPCs of dstack.guest.v1, of one guest agent.

Both services answer from the trust domain and the keys of the agent that v0 answers from. There is no GPU, and no
container runs, so Health knows only what an app reports in its status file.

Source: dstack docs/guest-api-v1.md at 147e39c8, guest-agent/src/rpc_service_v1.rs and rpc_service_v1/keys.rs at
0fcd31cd, gpu_attest.rs at 252076e5.
"""

from collections.abc import Callable
from typing import Any

from dstack_emu.attest.app_info import AppInfo
from dstack_emu.attest.attestation import REPORT_DATA_SIZE
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.guest_keys_v1 import derive_guest_key, sign_claim
from dstack_emu.attest.kdf import derive_p256, pkcs8_pem
from dstack_emu.attest.proto import dstack_guest_v1_pb2 as pb
from dstack_emu.attest.report_data import pad_report_data
from dstack_emu.simulator.agent import GuestAgent, certificate_config
from dstack_emu.simulator.app_health import NO_CONTAINER, UnhealthyError, read_health
from dstack_emu.simulator.errors import GpuUnavailableError, GuestError
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.service import Rpc, ServiceTable, without_context

NONCE_SIZE = 32


class GuestApiV1:
    """The services DstackGuest and Worker of dstack.guest.v1, over one agent. `now` gives Unix seconds."""

    def __init__(self, agent: GuestAgent, now: Callable[[], float]) -> None:
        self._agent, self._now = agent, now

    async def issue_cert(self, request: pb.IssueCertRequest) -> pb.IssueCertResponse:
        """Make a new P-256 key and have a certificate issued for it; evidence in it has the form V1."""
        config = certificate_config(request)
        key = derive_p256(self._agent.random(32), [])
        return pb.IssueCertResponse(
            key=pkcs8_pem(key), certificate_chain=await self._agent.issue(key, config, as_v1=True)
        )

    async def get_key(self, request: pb.GetKeyRequest) -> pb.GetKeyResponse:
        """Derive the key of a domain, with the chain of two signatures that proves its origin."""
        keys = self._agent.keys

        def derive() -> pb.GetKeyResponse:
            derived = derive_guest_key(keys.k256_key, request.algorithm, request.domain)
            chain = [sign_claim(keys.k256_key, derived), keys.k256_signature]
            return pb.GetKeyResponse(key=derived.key, public_key=derived.public_key, signature_chain=chain)

        return await run_aside(len(request.domain), derive)

    async def attest(self, request: pb.AttestRequest) -> pb.AttestResponse:
        """Return evidence over up to 64 bytes of report_data, in the form V1. There is no GPU evidence to include."""
        if len(request.report_data) > REPORT_DATA_SIZE:
            raise FormatError("report data is too long")
        evidence = self._agent.domain.attest(pad_report_data(request.report_data))
        return pb.AttestResponse(attestation=evidence.as_v1().encode())

    async def attest_gpu(self, request: pb.AttestGpuRequest) -> pb.AttestGpuResponse:
        """Refuse: the image has no GPU attestation. A nonce of another size than 32 bytes is refused first."""
        if len(request.nonce) != NONCE_SIZE:
            raise GuestError(
                f"GPU attestation failed: nonce must be exactly {NONCE_SIZE} bytes, got {len(request.nonce)}"
            )
        raise GpuUnavailableError("GPU attestation failed: GPU attestation is not available in this image")

    async def info(self, _request: pb.InfoRequest) -> pb.InfoResponse:
        """Return the identity of the domain; `device_id` is the true one, which upstream's agent does not know."""
        return self._info(hides_details=False)

    async def public_info(self, _request: pb.InfoRequest) -> pb.InfoResponse:
        """Return the public part: without app_compose, vm_config and key_provider_info, unless they are public."""
        return self._info(hides_details=not self._agent.domain.manifest.public_tcbinfo)

    async def version(self, _request: pb.VersionRequest) -> pb.VersionResponse:
        """Return the release of dstack that is emulated."""
        release = self._agent.domain.release
        return pb.VersionResponse(version=release.version, rev=release.revision)

    async def health(self, _request: pb.HealthRequest) -> pb.HealthResponse:
        """Tell whether the app is healthy; one without a health check is."""
        requirements = self._agent.domain.manifest.requirements
        if requirements is None or not requirements.health_check:
            return pb.HealthResponse(healthy=True)
        try:
            if requirements.health_status_file is None:
                raise UnhealthyError(*NO_CONTAINER)
            read_health(requirements.health_status_file, self._now())
        except UnhealthyError as error:
            return pb.HealthResponse(unhealthy=[pb.ContainerHealth(name=error.name, status=error.status)])
        return pb.HealthResponse(healthy=True)

    def _info(self, *, hides_details: bool) -> pb.InfoResponse:
        domain, info = self._agent.domain, self._agent.app_info()
        response = _identity(info)
        response.app_name = domain.manifest.name
        if not hides_details:
            response.app_compose = domain.manifest.text
            response.vm_config = domain.vm_config_json
            response.key_provider_info = info.key_provider_info.decode(errors="replace")
        return response


def _identity(info: AppInfo) -> pb.InfoResponse:
    return pb.InfoResponse(
        app_id=info.app_id,
        compose_hash=info.compose_hash,
        instance_id=info.instance_id,
        device_id=info.device_id,
        os_image_hash=info.os_image_hash,
        mr_aggregated=info.mr_aggregated,
    )


# ---- service tables


def guest_v1_table(api: GuestApiV1) -> ServiceTable[None]:
    """Return the service DstackGuest of v1."""
    return _table(
        Rpc("IssueCert", pb.IssueCertRequest, pb.IssueCertResponse, without_context(api.issue_cert)),
        Rpc("GetKey", pb.GetKeyRequest, pb.GetKeyResponse, without_context(api.get_key)),
        Rpc("Attest", pb.AttestRequest, pb.AttestResponse, without_context(api.attest)),
        Rpc("AttestGpu", pb.AttestGpuRequest, pb.AttestGpuResponse, without_context(api.attest_gpu)),
        Rpc("Info", pb.InfoRequest, pb.InfoResponse, without_context(api.info)),
        Rpc("Version", pb.VersionRequest, pb.VersionResponse, without_context(api.version)),
    )


def worker_v1_table(api: GuestApiV1) -> ServiceTable[None]:
    """Return the service Worker of v1."""
    return _table(
        Rpc("Info", pb.InfoRequest, pb.InfoResponse, without_context(api.public_info)),
        Rpc("Version", pb.VersionRequest, pb.VersionResponse, without_context(api.version)),
        Rpc("Health", pb.HealthRequest, pb.HealthResponse, without_context(api.health)),
    )


def _table(*rpcs: Rpc[None, Any, Any]) -> ServiceTable[None]:
    return ServiceTable.of("", *rpcs)
