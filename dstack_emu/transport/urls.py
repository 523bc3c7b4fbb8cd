"""URLs: their checks, and their text without the user and the password, which are for their server alone."""

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

_SCHEME: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
_IN_TEXT: Final = re.compile(r"(://)[^/@\s\"'<>]+@")


def shown_url(url: str) -> str:
    """Return a URL without user and password, as the real programs' HTTP library shows it.

    Of what is no URL, all between a scheme and the last `@` is left out: a password may be why it is none.
    """
    if "@" not in url:
        return url
    scheme = match[0] if (match := _SCHEME.match(url)) else ""
    rest = url[len(scheme) :]
    if not scheme or not _is_url(url):
        return scheme + rest.rpartition("@")[2]
    authority, slash, path = re.split("([/?#]|$)", rest, maxsplit=1)
    return scheme + authority.rpartition("@")[2] + slash + path


def shown_origin(url: str) -> str:
    """Return scheme, host and port of an http URL, as browsers write an origin; what is no such URL as `shown_url`.

    Use it for the node of a chain: the path of its URL often has the key of an account.
    """
    if not is_http_url(url):
        return shown_url(url)
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = "" if parts.port in (None, {"http": 80, "https": 443}[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def without_credentials(text: str) -> str:
    """Return a text in which no URL has a user or a password."""
    return _IN_TEXT.sub(r"\1", text) if "@" in text else text


def is_http_url(url: str) -> bool:
    """Return whether a text is an http or https URL with a host, and with no port or one that can be reached."""
    return _is_url(url) and urlsplit(url).scheme in ("http", "https")


def is_ip_address(host: str) -> bool:
    """Return whether a host is an IPv4 or IPv6 address, without brackets, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
