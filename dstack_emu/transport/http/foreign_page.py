"""Refuses what a browser sends for a page that is not the server's own. Programs send nothing that is refused here.

A page of any site can make the browser of its visitor send requests to this machine, where listeners on loopback ask
nobody who they are. A browser says for which page a request is: by `Origin` and `Sec-Fetch-Site` (W3C, Fetch Metadata
Request Headers), which no page can change. A site whose name leads to 127.0.0.1 after its page was loaded (DNS
rebinding) is told by its name in `Host`.

Not here: the control API and the chain, which have rules of their own. Docs: docs/security.md.
"""

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from dstack_emu.transport.http.message import Request, Response

Handler = Callable[[Request], Awaitable[Response]]

LINKED: Final = frozenset(("/", "/logs", "/health", "/metrics", "/openapi.json", "/api-docs/openapi.json"))
"""The paths to which pages of others may link: they change nothing, and a page cannot read what a link leads to."""
OWN_NAMES: Final = ("localhost", "internal", "test", "example", "invalid")
"""Below these nobody can register a name (RFC 2606, RFC 6761, and ICANN's resolution 2024.07.29.06)."""


def foreign_page(method: str, path: str, headers: Mapping[str, str], address: object, *, is_secure: bool) -> str:
    """Return why a request must be refused, the empty text if no page of others has sent it.

    `address` is that of the listener, as sockets say it. Over TLS a name is in the certificate, so it is not judged.
    """
    site = headers.get("Sec-Fetch-Site", "none")
    if site not in ("none", "same-origin") and not _is_link(method, path, headers):
        return f"Sec-Fetch-Site: pages of other hosts or ports may not use this; got {site!r:.40}"
    host = headers.get("Host", "")
    origin = headers.get("Origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        return f"Origin: pages of other hosts or ports may not use this; got {origin!r:.100}"
    if not is_secure and _is_browser(headers) and _is_loopback(address) and not _is_own_name(host):
        return f"Host: an IP address or a name of this machine expected, got {host!r:.100}"
    return ""


def refusing_foreign_pages(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Wrap the handler of an application of our own."""

    def answer(request: Request) -> Awaitable[Response]:
        transport = request.transport
        why = foreign_page(
            request.method,
            request.path,
            request.headers,
            transport.get_extra_info("sockname"),
            is_secure=transport.get_extra_info("ssl_object") is not None,
        )
        return _refused(why) if why else handler(request)

    return answer


async def _refused(why: str) -> Response:
    return Response.of(why, "text/plain", HTTPStatus.FORBIDDEN)


def _is_link(method: str, path: str, headers: Mapping[str, str]) -> bool:
    return method == "GET" and path in LINKED and headers.get("Sec-Fetch-Dest") == "document"


def _is_browser(headers: Mapping[str, str]) -> bool:
    """Tell a browser by what it always sends: Firefox lets a page change the first, but not leave out the second."""
    return headers.get("User-Agent", "").startswith("Mozilla/") or "Accept-Language" in headers


def _is_loopback(address: object) -> bool:
    return isinstance(address, tuple) and ip_address(str(address[0]).partition("%")[0]).is_loopback


def _is_own_name(host: str) -> bool:
    """Tell whether a Host is an IP address, a name of one label, or one below OWN_NAMES."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        ip_address(name)
    except ValueError:
        return "." not in name or name.rpartition(".")[2] in OWN_NAMES
    return True
