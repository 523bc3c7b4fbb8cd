"""The network interfaces of a machine: what each is, and its MAC address.

Nothing is connected: a machine has no network of its own. Source: dstack `vmm/src/app/network.rs` at 312dc605;
vhost and queues as in pull request 1145.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.vmm.config import CvmSection
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.manifest import Manifest

MAX_DEFAULT_QUEUES: Final = 16
"""The maximum number of pairs of queues of an interface for which none is given."""
HOST_INTERFACES: Final = Path("/sys/class/net")
_BACKENDS: Final[Mapping[str, str]] = {"user": "slirp", "bridge": "tap_bridge", "custom": "custom"}


def interfaces(manifest: Manifest, cvm: CvmSection) -> list[pb.NetworkInterfaceStatus]:
    """Return the interfaces of a machine, as VmInfo has them."""
    default = cvm.networking
    networks = [(each.mode, each.bridge) for each in manifest.networks] or [(default.mode, default.bridge)]
    return [
        pb.NetworkInterfaceStatus(
            mode=mode,
            backend=_BACKENDS[mode],
            mac=mac_address(manifest.id, number, default.mac_prefix),
            bridge_name=(bridge or default.bridge) if mode == "bridge" else None,
            netdev_id=f"net{number}",
            vhost=None if mode == "custom" else mode == "bridge" and default.vhost,
            queues=None if mode == "custom" else _queues(manifest, cvm) if mode == "bridge" and default.vhost else 1,
        )
        for number, (mode, bridge) in enumerate(networks)
    ]


def _queues(manifest: Manifest, cvm: CvmSection) -> int:
    """Return how many pairs of queues an interface in the host's kernel gets: one for each vCPU, up to a limit."""
    return max(1, min(manifest.vcpu, cvm.max_net_queues, MAX_DEFAULT_QUEUES))


def mac_address(vm_id: str, number: int = 0, prefix: str = "") -> str:
    """Return the MAC address of a machine's interface of that number; it begins with the bytes of `prefix` (hex)."""
    text = vm_id if number == 0 else f"{vm_id}:{number}"
    given = bytes.fromhex(prefix.replace(":", ""))
    first, *rest = (given + hashlib.sha256(text.encode()).digest())[:6]
    return bytes([(first & 0xFE) | 2, *rest]).hex(":")


def require_bridges(found: Iterable[pb.NetworkInterfaceStatus], host: Path = HOST_INTERFACES) -> None:
    """Raise `VmmError` if an interface is on a bridge that this host does not have."""
    for each in found:
        if each.mode == "bridge" and not each.bridge_name:
            raise VmmError("bridge networking requested but no bridge is configured")
        if each.mode == "bridge" and ("/" in each.bridge_name or not (host / each.bridge_name).exists()):
            raise VmmError(f"bridge interface '{each.bridge_name}' does not exist")
