"""A pRPC client: calls an RPC by name over HTTP, HTTPS or a unix socket, in JSON.

Like upstream's own client it POSTs `<method>?json` without a Content-Type. It follows no redirects, uses no
proxy from the environment and keeps connections open between calls.

Not here: retries, TLS settings (an ssl.SSLContext is the caller's), what an answer means.

Source of truth: Dstack-TEE/dstack, branch next at 312dc605, dstack/ra-rpc/src/client.rs and
dstack/http-client/src/prpc.rs.
"""

import asyncio
import json
import os
import ssl as tls
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, TypeVar

import aiohttp
from google.protobuf.message import Message

from dstack_emu.attest.prpc import decode_json, encode_json
from dstack_emu.transport.errors import TransportError as TransportError

A = TypeVar("A", bound=Message)

MAX_RESPONSE: Final = 10 * 1024 * 1024
"""Bytes of an answer that are read at most."""

CheckServer = Callable[[bytes | None], Awaitable[None]]
MoreHeaders = Callable[[], Mapping[str, str]]
"""Headers that a client adds to a request, asked for at each one, in the context of who makes it."""

_server_certificate: ContextVar[bytes | None] = ContextVar("server_certificate", default=None)


class RpcError(Exception):
    """An answer with another status than 200.

    `text` is the error's text where the body is pRPC's JSON, else the body itself; `body` is always the body.
    """

    def __init__(self, status: int, text: str, body: str) -> None:
        super().__init__(text or f"HTTP status {status}")
        self.status = status
        self.text = text
        self.body = body


class PrpcClient:
    """Calls the RPCs of one address. Close it, or use it in `async with`.

    `address` is `http://host:port` or `https://…`, with a path where the service has a mount, or a socket
    file as `unix:/path` or `/path`. `timeout` is for a whole call, in seconds.

    `check_server` is awaited after every response head, before the status is looked at, with the leaf
    certificate (DER) that the server of this very connection presented, or None without TLS; what it raises
    ends the call. That is where a server's attestation is judged. The request has been sent by then.
    `headers` are added to each request.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float,
        ssl: tls.SSLContext | None = None,
        check_server: CheckServer | None = None,
        headers: MoreHeaders | None = None,
    ) -> None:
        self._socket = address.removeprefix("unix:") if address.startswith(("unix:", "/")) else None
        if self._socket is None and not address.startswith(("http://", "https://")):
            raise TransportError(address, "neither an http(s) URL nor a socket path")
        self._base = "http://localhost" if self._socket is not None else address.rstrip("/")
        self._timeout = timeout
        self._ssl = ssl
        self._check_server = check_server
        self._headers = headers
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "PrpcClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def call(self, method: str, request: Message, response_type: type[A]) -> A:
        """Call `method` (with its path where the address has none: `prpc/Tappd.Info`) and return its answer.

        TransportError where no answer came, RpcError where it has another status than 200, FormatError where
        it is not a `response_type`; and what `check_server` raises.
        """
        url = f"{self._base}/{method}?json"
        shown = url if self._socket is None else f"unix:{self._socket}:/{method}?json"
        try:
            async with asyncio.timeout(self._timeout):
                status, body = await self._post(url, shown, encode_json(request))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise TransportError(shown, describe_failure(error, self._timeout)) from error
        if status != 200:
            text = body.decode(errors="replace")
            raise RpcError(status, _error_text(text), text)
        return decode_json(response_type, body or b"null")

    async def _post(self, url: str, shown: str, body: bytes) -> tuple[int, bytes]:
        if self._session is None:
            self._session = self._open()
        headers = None if self._headers is None else self._headers()
        async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            if self._check_server is not None:
                await self._check_server(_server_certificate.get())
            chunks = []
            size = 0
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > MAX_RESPONSE:
                    raise TransportError(shown, f"the answer is longer than {MAX_RESPONSE} bytes")
                chunks.append(chunk)
            return response.status, b"".join(chunks)

    def _open(self) -> aiohttp.ClientSession:
        connector: aiohttp.BaseConnector
        if self._socket is not None:
            connector = aiohttp.UnixConnector(self._socket)
        else:
            connector = _Connector(ssl=self._ssl if self._ssl is not None else True)
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Content-Type", "Accept-Encoding"),
            timeout=aiohttp.ClientTimeout(),
        )


class _Connector(aiohttp.TCPConnector):
    """Remembers the certificate behind a connection, which a finished response no longer knows.

    `connect` is the documented place where a request gets its connection; it runs in the context of the request.
    """

    async def connect(self, *arguments: Any, **options: Any) -> Any:
        connection = await super().connect(*arguments, **options)
        channel = connection.transport.get_extra_info("ssl_object") if connection.transport is not None else None
        _server_certificate.set(channel.getpeercert(binary_form=True) if channel is not None else None)
        return connection


def _error_text(body: str) -> str:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return body
    text = parsed.get("error") if isinstance(parsed, dict) else None
    return text if isinstance(text, str) else body


def describe_failure(error: Exception, timeout: float) -> str:
    """Name what went wrong in words that do not depend on the library."""
    origin = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error.__cause__ or error
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"TLS: {error.certificate_error}"
    if isinstance(origin, tls.SSLError) or isinstance(error, tls.SSLError):
        return f"TLS: {origin}"
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"no such host: {origin}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "connection closed before the answer"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "connection closed within the answer"
    if isinstance(error, aiohttp.ClientResponseError):
        return "the answer is not HTTP"
    if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
        return "not a URL"
    if isinstance(origin, OSError) and origin.errno:
        return os.strerror(origin.errno)
    if isinstance(origin, ConnectionError):  # asyncio's own, which has no number
        return "TLS: connection closed within the handshake"
    return f"{type(error).__name__}: {error}"
