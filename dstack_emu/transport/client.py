"""A pRPC client: calls an RPC by name over HTTP, HTTPS or a unix socket, in JSON.

Like upstream's own client, it POSTs to `<method>?json` without a Content-Type. It follows no redirects, and uses no
proxy from the environment. Each call has a connection of its own.

Not here: retries, TLS settings (the caller passes an ssl.SSLContext), and the meaning of an answer.

Source of truth: Dstack-TEE/dstack, branch next at 312dc605, dstack/ra-rpc/src/client.rs and
dstack/http-client/src/prpc.rs.
"""

import ssl as tls
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Final, TypeVar

from google.protobuf.message import Message

from dstack_emu.attest.prpc import decode_json, encode_json
from dstack_emu.attest.strict_json import read_json
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.errors import TransportError as TransportError
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient, Route, direct

A = TypeVar("A", bound=Message)

MAX_RESPONSE: Final = 10 * 1024 * 1024
"""The maximum length of an answer in bytes."""

CheckServer = Callable[[bytes | None], Awaitable[None]]
MoreHeaders = Callable[[], Mapping[str, str]]
"""Returns the headers to add to a request. It is called for each request, in the context of the caller."""


class RpcError(Exception):
    """An answer with a status other than 200.

    `text` is the text of the error if the body is pRPC's JSON, otherwise the body; `body` is the body in both cases.
    """

    def __init__(self, status: int, text: str, body: str) -> None:
        super().__init__(text or f"HTTP status {status}")
        self.status = status
        self.text = text
        self.body = body


class PrpcClient:
    """Calls the RPCs of one address. Close it, or use it in `async with`.

    `address` is `http://host:port` or `https://…`, with a path if the service has a mount, or a socket file as
    `unix:/path` or `/path`. `timeout` is for a whole call, in seconds. `headers` are added to each request. `route`
    says where it connects to.

    `check_server` is awaited after every answer, before its status is read. Its argument is the leaf certificate (DER)
    that the server of this connection presented, or None without TLS. If it raises, the call ends with that error. A
    server's attestation is verified there; the request has already been sent by then.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float,
        ssl: tls.SSLContext | None = None,
        check_server: CheckServer | None = None,
        headers: MoreHeaders | None = None,
        route: Route = direct,
    ) -> None:
        self._socket = address.removeprefix("unix:") if address.startswith(("unix:", "/")) else None
        if self._socket is None and not address.startswith(("http://", "https://")):
            raise TransportError(address, "neither an http(s) URL nor a socket path")
        self._base = "http://localhost" if self._socket is not None else address.rstrip("/")
        self._check_server, self._headers = check_server, headers
        self._client = HttpClient(timeout=timeout, max_answer=MAX_RESPONSE, tls=ssl, unix=self._socket, route=route)

    async def __aenter__(self) -> "PrpcClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. A later call still works."""
        await self._client.close()

    async def call(self, method: str, request: Message, response_type: type[A]) -> A:
        """Call `method` (with its path if the address has none, such as `prpc/Tappd.Info`) and return its answer.

        Raises `TransportError` if no answer came, `RpcError` if its status is not 200, `FormatError` if it is not a
        `response_type`, and the errors of `check_server`.
        """
        url = f"{self._base}/{method}?json"
        shown = url if self._socket is None else f"unix:{self._socket}:/{method}?json"
        headers = None if self._headers is None else self._headers()
        try:
            answer = await self._client.send("POST", url, encode_json(request), headers)
        except (NoAnswerError, AnswerTooLongError) as error:
            raise TransportError(shown, str(error)) from error
        if self._check_server is not None:
            await self._check_server(answer.certificate)
        if answer.status != 200:
            text = answer.body.decode(errors="replace")
            raise RpcError(answer.status, _error_text(text), text)
        return await run_aside(len(answer.body), lambda: decode_json(response_type, answer.body or b"null"))


def _error_text(body: str) -> str:
    try:
        parsed = read_json(body)
    except ValueError:
        return body
    text = parsed.get("error") if isinstance(parsed, dict) else None
    return text if isinstance(text, str) else body
