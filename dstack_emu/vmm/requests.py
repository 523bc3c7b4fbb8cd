"""The manifest of a machine that a request creates or changes, with upstream's checks, in its order.

Source: dstack `vmm/src/main_service.rs` at 312dc605.
"""

from collections.abc import Mapping

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.vmm import checks
from dstack_emu.vmm.compose_file import needs_swtpm, requested_volumes
from dstack_emu.vmm.config import CvmSection
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.manifest import Manifest, Volume

_RESOURCES = ("vcpu", "memory", "disk_size")


def created_manifest(
    request: pb.VmConfiguration,
    vm_id: str,
    created_at_ms: int,
    cvm: CvmSection,
    others: Mapping[str, Manifest],
    release: Release,
) -> Manifest:
    """Return the manifest of a new machine; `others` are those of all machines, by id. Raises `VmmError`."""
    checks.check_name(request.name)
    ports = checks.mapped_ports(request.ports, cvm.port_mapping)
    if release.vmm_checks_port_conflicts:
        checks.check_port_conflicts(ports, {})
    app_id = request.app_id.removeprefix("0x").lower() if request.HasField("app_id") else ""
    gpus = request.gpus if request.HasField("gpus") else pb.GpuConfig(attach_mode="listed")
    requested_gpus = checks.requested_gpus(gpus, cvm)
    volumes = requested_volumes(request.compose_file, cvm.volumes_dir) if release.manifest_3_members else ()
    simulated_tee = checks.requested_tee(request)
    if simulated_tee is not None and cvm.tee_simulator is None:
        raise VmmError("tee simulator credentials are not configured on this VMM")
    manifest = Manifest(
        id=vm_id,
        name=request.name,
        app_id=app_id or checks.app_id_of(request.compose_file),
        vcpu=request.vcpu,
        memory=request.memory,
        disk_size=request.disk_size,
        image=request.image,
        port_map=ports,
        created_at_ms=created_at_ms,
        hugepages=request.hugepages,
        pin_numa=request.pin_numa,
        gpus=requested_gpus,
        kms_urls=tuple(request.kms_urls),
        gateway_urls=tuple(request.gateway_urls),
        no_tee=request.no_tee or simulated_tee is not None,
        swtpm=release.tpm_key_provider and needs_swtpm(request.compose_file, simulated_tee),
        networks=checks.requested_networks(request, release),
        simulated_tee=simulated_tee,
        volumes=tuple(Volume(source=str(path)) for path in volumes),
    )
    if release.vmm_checks_port_conflicts:
        checks.check_port_conflicts(ports, others)
    return manifest


def updated_manifest(
    manifest: Manifest,
    request: pb.UpdateVmRequest,
    compose_file: str,
    *,
    is_at_rest: bool,
    cvm: CvmSection,
    release: Release,
    others: Mapping[str, Manifest],
) -> Manifest:
    """Return a machine's manifest after an update; `compose_file` is that after it. Raises `VmmError`."""
    manifest = resized_manifest(manifest, request, is_at_rest=is_at_rest)
    changes: dict[str, object] = {}
    if request.HasField("gpus"):
        changes["gpus"] = checks.requested_gpus(request.gpus, cvm)
    if request.HasField("no_tee"):
        changes["no_tee"] = request.no_tee
    if request.update_ports:
        ports = checks.changed_ports(request.ports)
        if release.vmm_checks_port_conflicts:
            checks.check_port_conflicts(ports, others)
        changes["port_map"] = ports
    if request.update_kms_urls:
        changes["kms_urls"] = tuple(request.kms_urls)
    if request.update_gateway_urls:
        changes["gateway_urls"] = tuple(request.gateway_urls)
    if request.update_networking:
        changes["networks"] = checks.changed_networks(request.networks)
    changes["swtpm"] = release.tpm_key_provider and needs_swtpm(compose_file, manifest.simulated_tee)
    return manifest.model_copy(update=changes)


def resized_manifest(
    manifest: Manifest, request: pb.ResizeVmRequest | pb.UpdateVmRequest, *, is_at_rest: bool
) -> Manifest:
    """Return a machine's manifest with other resources, which it can only get while it is at rest."""
    changes: dict[str, object] = {}
    for name in _RESOURCES:
        if request.HasField(name):
            changes[name] = getattr(request, name)
    if request.HasField("image"):
        changes["image"] = request.image
    if changes and not is_at_rest:
        raise VmmError(f"vm should be stopped before resize: {manifest.id}")
    if "disk_size" in changes and request.disk_size < manifest.disk_size:
        raise VmmError("Cannot shrink disk size")
    return manifest.model_copy(update=changes)


def require_resources(request: pb.ResizeVmRequest) -> None:
    """Check that a request to resize names a resource, and none that is nothing; an update is not checked so."""
    if not any(request.HasField(name) for name in (*_RESOURCES, "image")):
        raise VmmError("resize request contains no updates")
    for name in _RESOURCES:
        if request.HasField(name) and getattr(request, name) == 0:
            raise VmmError(f"{name} must be greater than zero")
    if request.HasField("image") and not request.image:
        raise VmmError("image must not be empty")
