"""The names in the certificates of a stack's KMS: given ones, or those of the address that the stack listens on.

Upstream's KMS has one name, which must be a DNS name or an IPv4 address. The others are an addition of this emulator
(`emulator.rpc_cert_names`), so that clients may use every address of the stack.
"""

import ipaddress
import socket
from collections.abc import Sequence
from typing import Final

from dstack_emu.deployment.errors import StackError
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.onboard_service import validate_domain
from dstack_emu.transport.localhost_socket import LOCALHOST

_IPV4, _IPV6 = "127.0.0.1", "::1"

_OF_HOST: Final = {
    "0.0.0.0": (_IPV4, LOCALHOST),  # noqa: S104 - compared, not bound
    "::": (LOCALHOST, _IPV4, _IPV6),
    LOCALHOST: (LOCALHOST, _IPV4, _IPV6),
}
"""The names for addresses that clients cannot use as a name, and for both families of `localhost`."""


def kms_names(host: str, given: Sequence[str]) -> tuple[str, ...]:
    """Return the names for a KMS that listens on `host`; the first one is its domain, the others are additional.

    Those of the address are always among them, because the stack itself uses them. Raises `StackError` if a given name
    is neither a DNS name nor an IP address, or if the address is link-local.
    """
    for name in given:
        if not _is_domain(name) and _address(name) is None:
            raise StackError(f"--domain: a DNS name or an IP address expected, got {name!r:.100}")
    names = tuple(dict.fromkeys((*given, *_of_host(host))))
    domain = next((name for name in names if _is_domain(name)), LOCALHOST)
    return (domain, *(name for name in names if name != domain))


def _of_host(host: str) -> tuple[str, ...]:
    address = _address(host) or host or "0.0.0.0"  # noqa: S104 - as getaddrinfo understands an empty host
    if "%" in address:
        raise StackError(f"--listen {host}: a link-local address has no URL; name another address")
    if address in _OF_HOST:
        return _OF_HOST[address]
    if _address(host) is not None:
        return (address,)
    return (host, str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]))


def _address(name: str) -> str | None:
    """Return an IP address in its usual form, None for any other name."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return None


def _is_domain(name: str) -> bool:
    try:
        validate_domain(name)
    except KmsError:
        return False
    return True
