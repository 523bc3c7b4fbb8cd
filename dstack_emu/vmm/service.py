"""The RPCs of a VMM: messages in, messages out, over the machines of a `Fleet`.

Source: dstack `vmm/src/main_service.rs` at 312dc605; what 0.6.0 added is that of vmm_rpc.proto at 030fbb21.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError
from dstack_emu.transport.service import Rpc, ServiceTable, without_arguments, without_context
from dstack_emu.transport.tls import client_context
from dstack_emu.vmm import checks
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.images import Images
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.networks import interfaces
from dstack_emu.vmm.vm import Vm

KMS_TIMEOUT: Final = 10.0
"""Seconds that the KMS has to answer a call that is passed on."""
PROCESS: Final = "trust domain of this process"
"""What SvList shows as the command of a machine."""


class VmmService:
    """The Vmm service."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.config, self.release = fleet, fleet.config, fleet.release
        self._images = Images(fleet.config.image.path, fleet.factory.built_in_images())

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
        found = self.fleet.ordered(request.ids)
        if keyword := request.keyword:
            found = [vm for vm in found if _contains(vm.manifest, keyword)]
        if status := request.status:
            found = [vm for vm in found if vm.status == status]
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
            image_version=self._images.version(manifest.image),
            events=vm.recorded_events(),
            running=vm.is_alive,
            interfaces=interfaces(manifest, self.config.cvm),
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
                max_queues=cvm.max_net_queues,
                default_vhost=cvm.networking.vhost,
            ),
        )

    async def version(self) -> pb.VersionResponse:
        """State the release."""
        return pb.VersionResponse(version=self.release.version, rev=self.release.revision)

    # ---- images

    async def list_images(self) -> pb.ImageListResponse:
        """List the local images."""
        return pb.ImageListResponse(images=self._images.all())

    async def delete_image(self, request: pb.Id) -> Empty:
        """Delete a local image that no machine uses."""
        self._images.delete(request.id, (vm.manifest for vm in self.fleet.ordered()))
        self.fleet.log.info("image deleted", image=request.id)
        return Empty()

    async def list_registry_images(self) -> pb.RegistryImageListResponse:
        """List the tags of the registry, none without one."""

        def local_names() -> set[str]:
            return {image.name for image in self._images.all()}

        return pb.RegistryImageListResponse(images=await self.fleet.pulls.tags(local_names))

    async def pull_registry_image(self, request: pb.PullRegistryImageRequest) -> Empty:
        """Begin to pull an image."""
        self.fleet.pulls.start(request.tag)
        return Empty()

    # ---- the processes that run machines

    async def sv_list(self) -> pb.SvListResponse:
        """List the processes of machines that were started, until they are removed from the list."""
        return pb.SvListResponse(
            processes=[
                pb.SvProcessInfo(id=vm.id, name=vm.manifest.name, status=vm.process, command=PROCESS)
                for vm in self.fleet.ordered()
                if vm.process is not None
            ]
        )

    async def sv_stop(self, request: pb.Id) -> Empty:
        """End the process of a machine; the machine is still one that is to run."""
        await self._process(request.id).end_process()
        return Empty()

    async def sv_remove(self, request: pb.Id) -> Empty:
        """Remove a process that has ended from the list."""
        vm = self._process(request.id)
        if vm.is_alive:
            raise VmmError("Process is running")
        vm.process = None
        return Empty()

    def _process(self, vm_id: str) -> Vm:
        vm = self.fleet.vms.get(vm_id)
        if vm is None or vm.process is None:
            raise VmmError("Supervisor process not found")
        return vm

    # ---- the KMS

    async def get_app_env_encrypt_pub_key(self, request: pb.AppId) -> pb.PublicKeyResponse:
        """Pass a call on to the KMS, whose certificate is not verified: its root keys sign the answer."""
        url = self.config.kms_url
        if not url:
            raise VmmError("KMS is not configured")
        try:
            tls = client_context() if url.startswith("https://") else None
            async with PrpcClient(f"{url.rstrip('/')}/prpc", timeout=KMS_TIMEOUT, ssl=tls) as kms:
                return await kms.call("GetAppEnvEncryptPubKey", request, pb.PublicKeyResponse)
        except (TransportError, RpcError, AttestError) as error:
            raise VmmError(f"Failed to get app env encrypt pub key: {error}") from error

    # ---- what this machine does not have

    async def list_gpus(self) -> pb.ListGpusResponse:
        """List no GPU."""
        return pb.ListGpusResponse(allow_attach_all=self.config.cvm.gpu.allow_attach_all)


def _first(urls: tuple[str, ...]) -> str:
    return urls[0] if urls else ""


def _contains(manifest: Manifest, keyword: str) -> bool:
    return any(keyword in text for text in (manifest.name, manifest.id, manifest.app_id, manifest.image))


def _without_request(name: str, answer: type[Message], method: Callable[[], Awaitable[Message]]) -> Rpc[None, Any, Any]:
    """Return an RPC without arguments, which never reads what is sent to it."""
    return Rpc(name, Empty, answer, without_arguments(method), reads_request=False)


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
        _without_request("ListImages", pb.ImageListResponse, service.list_images),
        Rpc(
            "GetAppEnvEncryptPubKey",
            pb.AppId,
            pb.PublicKeyResponse,
            without_context(service.get_app_env_encrypt_pub_key),
        ),
        Rpc("GetInfo", pb.Id, pb.GetInfoResponse, without_context(service.get_info)),
        _without_request("Version", pb.VersionResponse, service.version),
        _without_request("GetMeta", pb.GetMetaResponse, service.get_meta),
        _without_request("ListGpus", pb.ListGpusResponse, service.list_gpus),
        _without_request("ReloadVms", pb.ReloadVmsResponse, service.reload_vms),
        _without_request("SvList", pb.SvListResponse, service.sv_list),
        Rpc("SvStop", pb.Id, Empty, without_context(service.sv_stop)),
        Rpc("SvRemove", pb.Id, Empty, without_context(service.sv_remove)),
        _without_request("ListRegistryImages", pb.RegistryImageListResponse, service.list_registry_images),
        Rpc("PullRegistryImage", pb.PullRegistryImageRequest, Empty, without_context(service.pull_registry_image)),
        Rpc("DeleteImage", pb.Id, Empty, without_context(service.delete_image)),
    ]
    return ServiceTable.of("Teepod.", *rpcs)
