"""The checks of a request to create or change a machine, with upstream's texts and in its order. Pure.

Source: dstack `vmm/src/main_service.rs` and `vmm/src/app.rs` at 312dc605.
"""

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.app_policy import TEE_VARIANTS
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.vmm.config import CvmSection, PortMappingSection
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.manifest import NETWORK_MODES, Gpus, GpuSlot, Manifest, Network, PortMap

_NAME: Final = re.compile(r"[A-Za-z0-9 \-_.@~!$^()]*")
_IMAGE_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_VM_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_name(name: str) -> None:
    """Check a machine's name."""
    if not _NAME.fullmatch(name):
        raise VmmError(f"Invalid name: {name}")


def check_image_name(name: str) -> None:
    """Check the name of a local image, which is part of a path."""
    if not _IMAGE_NAME.fullmatch(name) or ".." in name:
        raise VmmError("Invalid image name")


def is_vm_id(text: str) -> bool:
    """Return whether a text may be a machine's id, which is part of a path."""
    return _VM_ID.fullmatch(text) is not None


def app_id_of(compose_file: str) -> str:
    """Return the app id of a new app: the first 20 bytes of its compose hash (hex)."""
    return compose_hash(compose_file)[:40]


def compose_hash(compose_file: str) -> str:
    """Return the SHA-256 of a compose file's bytes (hex)."""
    return hashlib.sha256(compose_file.encode()).hexdigest()


def parse_compose(compose_file: str, release: Release) -> AppManifest:
    """Parse an app-compose.json as the VMM of a release does; raise `VmmError` with the bare reason."""
    try:
        return AppManifest.parse(compose_file, release)
    except FormatError as error:
        raise VmmError(str(error)) from error


def mapped_ports(ports: Iterable[pb.PortMapping], allowed: PortMappingSection) -> tuple[PortMap, ...]:
    """Return the port mappings of a new machine."""
    ports = list(ports)
    if ports and not allowed.enabled:
        raise VmmError("Port mapping is disabled")
    return tuple(_mapped_port(port, allowed.address, allowed) for port in ports)


def changed_ports(ports: Iterable[pb.PortMapping]) -> tuple[PortMap, ...]:
    """Return the port mappings of an update: the address must be given; switch and ranges are not consulted."""
    return tuple(_mapped_port(port, "", None) for port in ports)


def _mapped_port(port: pb.PortMapping, default: str, allowed: PortMappingSection | None) -> PortMap:
    if port.host_port > 0xFFFF:
        raise VmmError("Invalid host port: out of range integral type conversion attempted")
    if port.vm_port > 0xFFFF:
        raise VmmError("Invalid vm port: out of range integral type conversion attempted")
    if allowed is not None and not allowed.allows(port.protocol, port.host_port):
        raise VmmError(f"Port mapping is not allowed for {port.protocol}:{port.host_port}")
    address = _address(port.host_address or default)
    if port.protocol == "tcp":
        return PortMap(address=address, protocol="tcp", host_port=port.host_port, vm_port=port.vm_port)
    if port.protocol == "udp":
        return PortMap(address=address, protocol="udp", host_port=port.host_port, vm_port=port.vm_port)
    raise VmmError("Invalid protocol")


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise VmmError("Invalid host address: invalid IP address syntax") from error


def check_port_conflicts(ports: Sequence[PortMap], others: Mapping[str, Manifest]) -> None:
    """Check that the ports of a machine differ from one another and from those of all others, stopped ones too."""
    for index, port in enumerate(ports):
        if any(port.conflicts_with(before) for before in ports[:index]):
            raise VmmError(f"duplicate host port mapping: {port}")
    for vm_id, other in others.items():
        for port in ports:
            if any(port.conflicts_with(taken) for taken in other.port_map):
                raise VmmError(f"host port mapping conflicts with VM {vm_id}: {port}")


def requested_gpus(gpus: pb.GpuConfig, cvm: CvmSection) -> Gpus:
    """Return the GPUs of a request. This machine has none, so `all` attaches none."""
    slots = tuple(GpuSlot(slot=gpu.slot) for gpu in gpus.gpus)
    if not cvm.gpu.enabled and (slots or gpus.attach_mode == "all"):
        raise VmmError("GPU is not enabled")
    if gpus.attach_mode == "listed":
        return Gpus(gpus=slots)
    if gpus.attach_mode != "all":
        raise VmmError(f"Invalid GPU attach mode: {gpus.attach_mode}")
    if not cvm.gpu.allow_attach_all:
        raise VmmError("Attaching all GPUs is not allowed")
    return Gpus(attach_mode="all")


def requested_networks(request: pb.VmConfiguration, release: Release) -> tuple[Network, ...]:
    """Return the networks of a new machine, none for the VMM's default: `networks` count more than `networking`."""
    if not release.vmm_checks_network_modes:
        return _unchecked_network(request.networking.mode)
    if request.networks:
        return changed_networks(request.networks)
    if request.HasField("networking") and (network := _network(request.networking)) is not None:
        return (network,)
    return ()


def _unchecked_network(mode: str) -> tuple[Network, ...]:
    """Return the network of a mode as 0.5 does: an unknown mode is that of the VMM."""
    return (Network.model_validate({"mode": mode}),) if mode in NETWORK_MODES else ()


def changed_networks(networks: Iterable[pb.NetworkingConfig]) -> tuple[Network, ...]:
    """Return the networks of an update, each of which must have a mode."""
    found = [_network(each) for each in networks]
    if None in found:
        raise VmmError("networking mode is required")
    return tuple(network for network in found if network is not None)


def _network(network: pb.NetworkingConfig) -> Network | None:
    mode, bridge = network.mode, network.bridge_name.strip()
    match mode:
        case "user" if bridge:
            raise VmmError("bridge_name is only valid for bridge networking mode")
        case "user":
            return Network(mode="user")
        case "bridge":
            return Network(mode="bridge", bridge=bridge)
        case "" if bridge:
            raise VmmError("networking mode is required when bridge is set")
        case "":
            return None
        case "custom":
            raise VmmError("custom networking mode is manifest-only")
    raise VmmError(f"unsupported networking mode '{mode}'")


def requested_tee(request: pb.VmConfiguration) -> str | None:
    """Return the simulated TEE of a request, None without one."""
    if not request.HasField("simulated_tee"):
        return None
    if request.simulated_tee not in TEE_VARIANTS:
        raise VmmError(f"unsupported TEE variant: {request.simulated_tee}")
    return request.simulated_tee


def human_time(seconds: float) -> str:
    """Return a duration as humantime has it, in whole seconds: `1day 2h 3m 4s`; below one second `0s`."""
    left = int(seconds)
    parts = []
    for unit, size in (("year", 31_557_600), ("month", 2_630_016), ("day", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            plural = "s" if len(unit) > 1 and count > 1 else ""
            parts.append(f"{count}{unit}{plural}")
    return " ".join(parts) or "0s"
