"""The addresses of instances: the lowest free one of the range that is not reserved.

Source: dstack `gateway/src/main_service.rs` (`valid_ip`, `alloc_ip`) at 312dc605.
"""

from collections.abc import Collection
from ipaddress import IPv4Address

from dstack_emu.gateway.config import WgSection
from dstack_emu.gateway.errors import GatewayError


def is_usable(ip: IPv4Address, wg: WgSection) -> bool:
    """Return whether an instance may have an address."""
    if ip not in wg.client_ip_range or ip in (wg.ip.network.broadcast_address, wg.ip.ip):
        return False
    return not any(ip in net for net in wg.reserved_net)


def lowest_free(wg: WgSection, taken: Collection[str]) -> str:
    """Return the lowest address that nobody has; raise `GatewayError` if there is none.

    The first and the last address of the range are no hosts' unless it has at most two.
    """
    for ip in wg.client_ip_range.hosts():
        if is_usable(ip, wg) and str(ip) not in taken:
            return str(ip)
    raise GatewayError("IP pool exhausted, no available addresses in client_ip_range")
