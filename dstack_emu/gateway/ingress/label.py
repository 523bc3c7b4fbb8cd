"""The first label of a server name: which app or instance is meant, which of its ports, and what is done with TLS.

The grammar is `<id>[-<port>[s|g]]`. Source: `parse_dst_info` in `gateway/src/proxy.rs` of dstack 312dc605.
"""

import re
from dataclasses import dataclass
from typing import Final

from dstack_emu.gateway.ingress.errors import RefusedConnectionError

DEFAULT_PORT: Final = 80
DEFAULT_PASSTHROUGH_PORT: Final = 443

_MAX_PORT: Final = 0xFFFF
_PORT: Final = re.compile(r"\+?[0-9]+", re.ASCII)
_MAX_DIGITS: Final = 64
"""The maximum length of a label and so of a port in it, leading zeros included."""


@dataclass(frozen=True, slots=True)
class Destination:
    """What a label says: an app id or instance id, a TCP port of the app, and the treatment of TLS.

    With `is_passthrough` the client's bytes go to the app as they are. Otherwise TLS ends here, and with `is_h2` the
    gateway agrees to HTTP/2 alone.
    """

    id: str
    port: int
    is_passthrough: bool = False
    is_h2: bool = False


def parse_label(label: str) -> Destination:
    """Parse the first label of a server name; raise `RefusedConnectionError` with upstream's text."""
    name, *suffixes = label.split("-")
    if not name:
        raise RefusedConnectionError("app id is empty")
    suffix = suffixes[0] if suffixes else ""
    number = suffix.removesuffix("g")
    is_h2 = number != suffix
    is_passthrough = number.endswith("s")
    if is_h2 and is_passthrough:
        raise RefusedConnectionError("invalid sni format: `gs` is not allowed")
    port = _port(number.removesuffix("s"), DEFAULT_PASSTHROUGH_PORT if is_passthrough else DEFAULT_PORT)
    if len(suffixes) > 1:
        raise RefusedConnectionError("invalid sni format")
    return Destination(name, port, is_passthrough, is_h2)


def _port(text: str, default: int) -> int:
    port = parse_port(text) if text else default
    if port is None:
        raise RefusedConnectionError(f"invalid port: {text!r}")
    return port


def parse_port(text: str) -> int | None:
    """Parse a decimal number of 16 bits, None if it is none. Rust reads a plus sign and leading zeros, too."""
    if not _PORT.fullmatch(text) or len(text) > _MAX_DIGITS:
        return None
    return int(text) if int(text) <= _MAX_PORT else None
