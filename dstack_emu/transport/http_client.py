"""An HTTP client for short requests, with a deadline for each request and a limit for the length of an answer.

Every request has a connection of its own, so that an answer cannot belong to an earlier request: nothing in HTTP/1.1
ties the two together, and what arrives on a kept connection after a request was written may have been sent before it.
docs/decisions/http.md has the reasons, and what it costs. Redirects are followed only on request. There are no proxies
and no cookies, and the client does not offer to accept compression.

Not here: the meaning of an answer; parsing it (`transport.http.answer`).
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin

from dstack_emu.attest.cache import Memo
from dstack_emu.attest.version import EMULATOR
from dstack_emu.transport.failures import NoAnswerError, NoAnswerInTimeError, describe_failure
from dstack_emu.transport.http.answer import AnswerReader
from dstack_emu.transport.http.client_connection import ClientConnection
from dstack_emu.transport.http.headers import Headers
from dstack_emu.transport.http.origin import Origin, RequestTarget
from dstack_emu.transport.open_calls import Asked

MAX_REDIRECTS: Final = 10

Route = Callable[[str, int], tuple[str, int]]
"""Returns the address and the port to connect to for host and port of a URL, or raises `OSError` if nothing is there.

It returns a host that it leaves as it is, otherwise an IP address. What the URL names stays what a certificate is
checked for, and what the header Host has."""


def direct(host: str, port: int) -> tuple[str, int]:
    """Return what the URL names: the route of every client that is given no other."""
    return host, port


_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_WITH_BODY: Final = frozenset(("POST", "PUT", "PATCH"))


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer; the names of its headers are case-insensitive.

    `certificate` is that of the server (DER), None without TLS.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    certificate: bytes | None = None


class HttpClient:
    """Sends requests, each over a connection of its own. Close it; later requests still work.

    `timeout` is for a whole request, in seconds. `max_answer` is the maximum length of a body in bytes,
    uncompressed. `headers` are sent with every request. `tls` are the settings for https (None: the system's
    authorities verify servers). With `unix`, every request goes to that socket file, and the host in its URL is
    ignored. With `unpacks` false, a compressed body is returned as it is. `route` says where the client connects
    to. `shown` is how the open calls name a URL.
    """

    def __init__(
        self,
        *,
        timeout: float,
        max_answer: int,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        unix: str | None = None,
        unpacks: bool = True,
        route: Route = direct,
        shown: Callable[[str], str] = str,
    ) -> None:
        self.timeout, self._max_answer = timeout, max_answer
        always = {"Accept": "*/*", "Connection": "close"}
        self._headers = _lines({"User-Agent": f"dstack-emu/{EMULATOR}", **(headers or {}), **always})
        self._tls, self._unix, self._unpacks, self._route, self._shown = tls, unix, unpacks, route, shown
        self._target = Memo(RequestTarget.parse, lambda url, target: 3 * len(url), max_entries=64, max_bytes=1 << 16)
        self._open: set[ClientConnection] = set()

    async def send(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        follow_redirects: bool = False,
        write: Callable[[bytes], object] | None = None,
    ) -> HttpAnswer:
        """Send a request and return the answer, whatever its status is.

        With `write`, the pieces of a successful answer's body are passed to it. Raises `NoAnswerError`, whose text says
        why, and `AnswerTooLongError`. No request is repeated.
        """
        try:
            whom = self._shown(url) if self._unix is None else f"unix:{self._unix} {url}"
            async with asyncio.timeout(self.timeout):
                for _ in range(MAX_REDIRECTS):
                    with Asked(method, whom):
                        answer = await self._send(method, url, body, headers or {}, write)
                    location = answer.headers.get("location")
                    if not follow_redirects or answer.status not in _REDIRECTS or location is None:
                        return answer
                    url = urljoin(url, location)
                    whom = self._shown(url)
        except (OSError, TimeoutError) as error:
            kind = NoAnswerInTimeError if isinstance(error, TimeoutError) and not error.errno else NoAnswerError
            raise kind(describe_failure(error, self.timeout)) from error
        raise NoAnswerError(f"more than {MAX_REDIRECTS} redirects")

    async def close(self) -> None:
        """Close all connections, including those in use."""
        for connection in tuple(self._open):
            connection.abort()
        await asyncio.sleep(0)  # their transports close in the loop's next turn

    async def _send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: Mapping[str, str],
        write: Callable[[bytes], object] | None,
    ) -> HttpAnswer:
        target = self._target(url)
        length = b"" if body is None and method not in _WITH_BODY else b"Content-Length: %d\r\n" % len(body or b"")
        head = b"%b %b HTTP/1.1\r\n%b%b%b%b\r\n" % (
            *(method.encode(), target.path, target.lines),
            *(self._headers, _lines(headers), length),
        )
        connection = await self._connect(target.origin)
        reader = AnswerReader(self._max_answer, write, unpacks=self._unpacks)
        await connection.exchange(head + (body or b""), reader)
        return HttpAnswer(reader.status, Headers(reader.headers), reader.body, connection.certificate)

    async def _connect(self, origin: Origin) -> ClientConnection:
        loop = asyncio.get_running_loop()
        if self._unix is not None:
            _, connection = await loop.create_unix_connection(self._new, self._unix)
            return connection
        tls = self._settings() if origin.is_secure else None
        name, port = self._route(origin.host, origin.port)
        failure: OSError = socket.gaierror(f"no address of {name}")
        is_address = origin.is_address or name != origin.host
        for host in (name,) if is_address else await _addresses(origin):
            try:
                _, connection = await loop.create_connection(
                    self._new, host, port, ssl=tls, server_hostname=origin.host if tls else None
                )
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = error
            else:
                return connection
        raise failure

    def _new(self) -> ClientConnection:
        return ClientConnection(self._open)

    def _settings(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


async def _addresses(origin: Origin) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label of more than 63 characters
        raise socket.gaierror(f"no host name: {error}") from error
    return [str(address[0]) for *_, address in found]


def _lines(headers: Mapping[str, str]) -> bytes:
    for name, value in headers.items():
        if any(character in name + value for character in "\r\n\0"):
            raise ValueError(f"a header may not have a line break: {name!r:.80}")
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode(errors="surrogateescape")
