"""The PROXY protocol: the header that names the client of a forwarded connection, read and written.

What is read goes to the app in the version in which it came, a version 2 header without its additional fields (TLVs).
Source: the PROXY protocol's specification, sections 2.1 and 2.2; `gateway/src/pp.rs` of dstack 312dc605.
"""

import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.gateway.ingress.errors import RefusedConnectionError

MAX_V1: Final = 107
"""The maximum length of a version 1 header in bytes, with its CR LF."""
MAX_V2: Final = 2048
"""The maximum length of a version 2 header in bytes."""

_V1: Final = b"PROXY"
_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED: Final = 16  # signature 12, version and command 1, family and protocol 1, length 2
_PROXY: Final = 0x21
_COMMANDS: Final = (0x20, _PROXY)
_FAMILIES: Final = {0: 0, 1: 12, 2: 36, 3: 216}
"""The length of the addresses of each family: unspecified, IPv4, IPv6, socket files."""
_FAMILY_OF: Final = {socket.AF_INET: 1, socket.AF_INET6: 2}
_STREAM: Final = 1


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """Who the client is: `client` for the log (`host:port`, or `unknown`), and the header's bytes for the app."""

    client: str
    encoded: bytes


def header_of(peer: Any, local: Any, family: int) -> ProxyHeader:
    """Make a version 2 header of the two addresses of an accepted socket, as the standard library has them."""
    if family not in _FAMILY_OF or not peer or not local:
        return ProxyHeader("unknown", _encoded(_PROXY, _STREAM, b""))
    hosts = b"".join(ipaddress.ip_address(address[0].partition("%")[0]).packed for address in (peer, local))
    addresses = hosts + struct.pack("!HH", peer[1], local[1])
    family_and_protocol = _FAMILY_OF[socket.AddressFamily(family)] << 4 | _STREAM
    return ProxyHeader(_shown(peer[0], peer[1]), _encoded(_PROXY, family_and_protocol, addresses))


def read_header(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Read the header at the beginning of a connection; return it and its length, or None if more bytes are needed.

    Raises `RefusedConnectionError` if there is none.
    """
    if data[: len(_V1)] == _V1:
        return _read_v1(data)
    if _V2.startswith(data[: len(_V2)]):
        return _read_v2(data)
    if _V1.startswith(data):
        return None
    raise RefusedConnectionError("no valid proxy protocol header detected")


def _read_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    end = data.find(b"\r\n", 0, MAX_V1)
    if end < 0:
        if len(data) >= MAX_V1:
            raise RefusedConnectionError("no valid proxy protocol header detected (v1 terminator not found)")
        return None
    size = end + 2
    return ProxyHeader(_v1_client(data[:end]), data[:size]), size


def _v1_client(line: bytes) -> str:
    match line.split(b" "):
        case [_, b"UNKNOWN", *_]:
            return "unknown"
        case [_, b"TCP4" | b"TCP6" as family, source, destination, source_port, destination_port]:
            version = 4 if family == b"TCP4" else 6
            hosts = [_v1_host(host, version) for host in (source, destination)]
            ports = [_v1_port(port) for port in (source_port, destination_port)]
            return _shown(hosts[0], ports[0])
    raise _unparsable(f"{line!r} is no version 1 header")


def _v1_host(text: bytes, version: int) -> str:
    try:
        address = ipaddress.ip_address(text.decode("ascii"))
    except ValueError as error:
        raise _unparsable(f"{text!r} is no address") from error
    if address.version != version:
        raise _unparsable(f"{text!r} is no IPv{version} address")
    return str(address)


def _v1_port(text: bytes) -> int:
    if not text.isdigit() or len(text) > 5 or int(text) > 0xFFFF:
        raise _unparsable(f"{text!r} is no port")
    return int(text)


def _read_v2(data: bytes) -> tuple[ProxyHeader, int] | None:
    if len(data) < _V2_FIXED:
        return None
    command, family, length = struct.unpack_from("!BBH", data, len(_V2))
    size = _V2_FIXED + length
    if size > MAX_V2:
        raise RefusedConnectionError("v2 proxy protocol header is too long")
    if command not in _COMMANDS or family >> 4 not in _FAMILIES or length < _FAMILIES[family >> 4]:
        raise _unparsable(f"version and command {command:#04x}, family {family:#04x}, {length} bytes")
    if len(data) < size:
        return None
    addresses = data[_V2_FIXED : _V2_FIXED + _FAMILIES[family >> 4]]
    return ProxyHeader(_v2_client(family >> 4, addresses), _encoded(command, family, addresses)), size


def _v2_client(family: int, addresses: bytes) -> str:
    match family:
        case 1:
            return _shown(str(ipaddress.ip_address(addresses[:4])), int.from_bytes(addresses[8:10], "big"))
        case 2:
            return _shown(str(ipaddress.ip_address(addresses[:16])), int.from_bytes(addresses[32:34], "big"))
    return "unknown"


def _encoded(command: int, family: int, addresses: bytes) -> bytes:
    return _V2 + struct.pack("!BBH", command, family, len(addresses)) + addresses


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _unparsable(why: str) -> RefusedConnectionError:
    return RefusedConnectionError(f"failed to parse proxy protocol header: {why}")
