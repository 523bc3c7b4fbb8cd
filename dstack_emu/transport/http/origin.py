"""Parses a URL into the server to connect to and the parts of a request to it."""

import base64
import string
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from dstack_emu.transport.failures import NoAnswerError
from dstack_emu.transport.urls import is_ip_address

_PORTS: Final = {"http": 80, "https": 443}
_IN_PATH: Final = "/:@!$&'()*+,;=%~"
_IN_QUERY: Final = _IN_PATH + "?"
_PRINTABLE: Final = frozenset(string.printable) - set(string.whitespace)


@dataclass(frozen=True, slots=True)
class Origin:
    """A server: its name or address, its port, and whether it uses TLS."""

    host: str
    port: int
    is_secure: bool
    is_address: bool = False
    """The host is an address, which needs not be resolved."""


@dataclass(frozen=True, slots=True)
class RequestTarget:
    """The target of a request: `path` is percent-encoded and includes the query; `lines` are the first headers."""

    origin: Origin
    path: bytes
    lines: bytes
    """The header Host, and Authorization if the URL has credentials."""

    @classmethod
    def parse(cls, url: str) -> "RequestTarget":
        """Parse an http or https URL; raise `NoAnswerError` if it is not one."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host = host if host.isascii() else host.encode("idna").decode()
        except ValueError as error:
            raise NoAnswerError("not a URL") from error
        if parts.scheme not in _PORTS or not host or not _PRINTABLE.issuperset(host):
            raise NoAnswerError("not a URL")
        named = f"[{host}]" if ":" in host else host
        authority = named if port in (None, _PORTS[parts.scheme]) else f"{named}:{port}"
        path = quote(parts.path or "/", _IN_PATH) + (f"?{quote(parts.query, _IN_QUERY)}" if parts.query else "")
        lines = f"Host: {authority}\r\n{_credentials(parts.username, parts.password)}"
        origin = Origin(host, port or _PORTS[parts.scheme], parts.scheme == "https", is_ip_address(host))
        return cls(origin, path.encode(), lines.encode())


def _credentials(user: str | None, password: str | None) -> str:
    if user is None:
        return ""
    both = f"{unquote(user)}:{unquote(password or '')}".encode()
    return f"Authorization: Basic {base64.b64encode(both).decode()}\r\n"
