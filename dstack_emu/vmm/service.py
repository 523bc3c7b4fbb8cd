"""The RPCs of a VMM: messages in, messages out, over the machines of a `Fleet`.

Source: dstack `vmm/src/main_service.rs` at 312dc605.
"""

import json
from pathlib import Path
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.os_image import METADATA_FILE, ImageInfo
from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError
from dstack_emu.transport.service import Rpc, ServiceTable, without_arguments, without_context
from dstack_emu.vmm import checks
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.vm import Vm

KMS_TIMEOUT: Final = 10.0
"""Seconds that the KMS has to answer a call that is passed on."""


class VmmService:
    """The Vmm service."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.config, self.release = fleet, fleet.config, fleet.release

    # ---- machines

    async def create_vm(self, request: pb.VmConfiguration) -> pb.Id:
        """Create a machine."""
        return pb.Id(id=await self.fleet.create(request))

    async def start_vm(self, request: pb.Id) -> Empty:
        """Start a machine."""
        await self.fleet.start(request.id)
        return Empty()

    async def stop_vm(self, request: pb.Id) -> Empty:
        """End a machine at once."""
        await self.fleet.stop(request.id)
        return Empty()

    async def shutdown_vm(self, request: pb.Id) -> Empty:
        """Let a machine's guest power off."""
        await self.fleet.shutdown(request.id)
        return Empty()

    async def remove_vm(self, request: pb.Id) -> Empty:
        """Begin to remove a machine."""
        await self.fleet.remove(request.id)
        return Empty()

    async def update_vm(self, request: pb.UpdateVmRequest) -> pb.Id:
        """Change a machine for its next start."""
        return pb.Id(id=await self.fleet.update(request))

    async def resize_vm(self, request: pb.ResizeVmRequest) -> Empty:
        """Change the resources of a machine."""
        await self.fleet.resize(request)
        return Empty()

    async def reload_vms(self) -> pb.ReloadVmsResponse:
        """Read the folder of machines again."""
        loaded, updated, removed = self.fleet.reload()
        return pb.ReloadVmsResponse(loaded=loaded, updated=updated, removed=removed)

    # ---- what there is

    async def status(self, request: pb.StatusRequest) -> pb.StatusResponse:
        """List the machines that match, a page of them if pages are asked for."""
        found = [vm for vm in self.fleet.ordered() if _matches(vm, request)]
        shown = found
        if request.page and request.page_size:
            first = (request.page - 1) * request.page_size
            shown = found[first : first + request.page_size]
        return pb.StatusResponse(
            vms=[self._info(vm, brief=request.brief) for vm in shown],
            port_mapping_enabled=self.config.cvm.port_mapping.enabled,
            total=len(found),
        )

    async def get_info(self, request: pb.Id) -> pb.GetInfoResponse:
        """Describe one machine; an unknown id is no error."""
        vm = self.fleet.vms.get(request.id)
        return pb.GetInfoResponse(found=vm is not None, info=None if vm is None else self._info(vm))

    def _info(self, vm: Vm, *, brief: bool = False) -> pb.VmInfo:
        manifest = vm.manifest
        configuration = None
        if not brief:
            configuration = manifest.configuration(
                compose_file=vm.folder.compose_file(),
                encrypted_env=vm.folder.encrypted_env(),
                user_config=vm.folder.user_config(),
                stopped=not vm.is_started,
            )
        instance_id = vm.instance_id
        return pb.VmInfo(
            id=vm.id,
            name=manifest.name,
            status=vm.status,
            uptime=vm.uptime(),
            app_url=self._app_url(vm, instance_id),
            app_id=manifest.app_id,
            instance_id=instance_id or None,
            configuration=configuration,
            exited_at=vm.exited_at(),
            boot_progress=vm.boot_progress,
            boot_error=vm.boot_error,
            shutdown_progress=vm.shutdown_progress,
            image_version=self._image_version(manifest.image),
            events=vm.recorded_events(),
            interfaces=self._interfaces(vm),
        )

    def _app_url(self, vm: Vm, instance_id: str) -> str | None:
        """Return the address of a machine's agent behind the gateway, None without gateway or instance id."""
        try:
            has_gateway = checks.parse_compose(vm.folder.compose_file(), self.release).has_gateway
        except VmmError:
            return None
        if not has_gateway or not instance_id:
            return None
        gateway = self.config.gateway
        urls = vm.manifest.gateway_urls
        domain = urls[0].partition("://")[2].partition(":")[0].partition("/")[0] if urls else gateway.base_domain
        port = "" if gateway.port == 443 else f":{gateway.port}"
        return f"https://{instance_id}-{gateway.agent_port}.{domain}{port}"

    def _interfaces(self, vm: Vm) -> list[pb.NetworkInterfaceStatus]:
        default = self.config.cvm.networking
        networks = [(each.mode, each.bridge) for each in vm.manifest.networks] or [(default.mode, default.bridge)]
        return [
            pb.NetworkInterfaceStatus(
                mode=mode,
                backend="slirp" if mode == "user" else "tap_bridge",
                mac=checks.mac_address(vm.id, number),
                bridge_name=(bridge or default.bridge) if mode == "bridge" else None,
                netdev_id=f"net{number}",
            )
            for number, (mode, bridge) in enumerate(networks)
        ]

    async def get_compose_hash(self, request: pb.VmConfiguration) -> pb.ComposeHash:
        """Hash a compose file."""
        checks.check_name(request.name)
        try:
            checks.parse_compose(request.compose_file, self.release)
        except VmmError as error:
            raise VmmError(f"Invalid compose file: {error}") from error
        return pb.ComposeHash(hash=checks.compose_hash(request.compose_file))

    async def get_meta(self) -> pb.GetMetaResponse:
        """Describe the configuration."""
        cvm, gateway = self.config.cvm, self.config.gateway
        return pb.GetMetaResponse(
            kms=pb.KmsSettings(url=_first(cvm.kms_urls), urls=cvm.kms_urls),
            gateway=pb.GatewaySettings(
                url=_first(cvm.gateway_urls),
                base_domain=gateway.base_domain,
                port=gateway.port,
                agent_port=gateway.agent_port,
                urls=cvm.gateway_urls,
            ),
            resources=pb.ResourcesSettings(
                max_cvm_number=cvm.cid_pool_size,
                max_allocable_vcpu=cvm.max_allocable_vcpu,
                max_allocable_memory_in_mb=cvm.max_allocable_memory_in_mb,
            ),
            networking=pb.NetworkingCapabilities(
                supported_modes=["user", "bridge"],
                default_mode=cvm.networking.mode,
                default_bridge=cvm.networking.bridge,
            ),
        )

    async def version(self) -> pb.VersionResponse:
        """State the release."""
        return pb.VersionResponse(version=self.release.version, rev=self.release.revision)

    # ---- images

    async def list_images(self) -> pb.ImageListResponse:
        """List the local images; a folder whose metadata cannot be read is left out."""
        folder = self.config.image.path
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        infos = ((name, _metadata(folder / name)) for name in names)
        return pb.ImageListResponse(
            images=[
                pb.ImageInfo(
                    name=name,
                    description=json.dumps(metadata, separators=(",", ":")),
                    version=str(metadata.get("version", "")),
                    is_dev=metadata.get("is_dev") is True,
                )
                for name, metadata in infos
                if metadata is not None
            ]
        )

    def _image_version(self, name: str) -> str:
        metadata = _metadata(self.config.image.path / name)
        return "" if metadata is None else str(metadata.get("version", ""))

    # ---- the KMS

    async def get_app_env_encrypt_pub_key(self, request: pb.AppId) -> pb.PublicKeyResponse:
        """Pass a call on to the KMS."""
        url = self.config.kms_url
        if not url:
            raise VmmError("KMS is not configured")
        try:
            async with PrpcClient(f"{url.rstrip('/')}/prpc", timeout=KMS_TIMEOUT) as kms:
                return await kms.call("GetAppEnvEncryptPubKey", request, pb.PublicKeyResponse)
        except (TransportError, RpcError, AttestError) as error:
            raise VmmError(f"Failed to get app env encrypt pub key: {error}") from error

    # ---- what this machine does not have

    async def list_gpus(self) -> pb.ListGpusResponse:
        """List no GPU."""
        return pb.ListGpusResponse(allow_attach_all=self.config.cvm.gpu.allow_attach_all)

    async def list_registry_images(self) -> pb.RegistryImageListResponse:
        """List no image: there is no registry."""
        return pb.RegistryImageListResponse()


def _first(urls: tuple[str, ...]) -> str:
    return urls[0] if urls else ""


def _metadata(folder: Path) -> dict[str, Any] | None:
    """Read an image's metadata.json; None if it cannot be read."""
    try:
        content = (folder / METADATA_FILE).read_bytes()
        ImageInfo.parse(content)
        document = json.loads(content)
    except (OSError, FormatError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _matches(vm: Vm, request: pb.StatusRequest) -> bool:
    manifest, keyword = vm.manifest, request.keyword
    if request.ids and vm.id not in request.ids:
        return False
    return any(keyword in text for text in (manifest.name, vm.id, manifest.app_id, manifest.image))


def vmm_table(service: VmmService) -> ServiceTable[None]:
    """Return the RPCs of the service. Only the prefix `Teepod.` is removed from names, as upstream does."""
    rpcs: list[Rpc[None, Any, Any]] = [
        Rpc("CreateVm", pb.VmConfiguration, pb.Id, without_context(service.create_vm)),
        Rpc("StartVm", pb.Id, Empty, without_context(service.start_vm)),
        Rpc("StopVm", pb.Id, Empty, without_context(service.stop_vm)),
        Rpc("RemoveVm", pb.Id, Empty, without_context(service.remove_vm)),
        Rpc("UpgradeApp", pb.UpdateVmRequest, pb.Id, without_context(service.update_vm)),
        Rpc("UpdateVm", pb.UpdateVmRequest, pb.Id, without_context(service.update_vm)),
        Rpc("ShutdownVm", pb.Id, Empty, without_context(service.shutdown_vm)),
        Rpc("ResizeVm", pb.ResizeVmRequest, Empty, without_context(service.resize_vm)),
        Rpc("GetComposeHash", pb.VmConfiguration, pb.ComposeHash, without_context(service.get_compose_hash)),
        Rpc("Status", pb.StatusRequest, pb.StatusResponse, without_context(service.status)),
        Rpc("ListImages", Empty, pb.ImageListResponse, without_arguments(service.list_images)),
        Rpc(
            "GetAppEnvEncryptPubKey",
            pb.AppId,
            pb.PublicKeyResponse,
            without_context(service.get_app_env_encrypt_pub_key),
        ),
        Rpc("GetInfo", pb.Id, pb.GetInfoResponse, without_context(service.get_info)),
        Rpc("Version", Empty, pb.VersionResponse, without_arguments(service.version)),
        Rpc("GetMeta", Empty, pb.GetMetaResponse, without_arguments(service.get_meta)),
        Rpc("ListGpus", Empty, pb.ListGpusResponse, without_arguments(service.list_gpus)),
        Rpc("ReloadVms", Empty, pb.ReloadVmsResponse, without_arguments(service.reload_vms)),
        Rpc("ListRegistryImages", Empty, pb.RegistryImageListResponse, without_arguments(service.list_registry_images)),
    ]
    return ServiceTable("Teepod.", {rpc.name: rpc for rpc in rpcs})
