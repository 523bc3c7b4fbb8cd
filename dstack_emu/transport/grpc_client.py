"""A gRPC client for single calls. Each call has its own connection, so it works in whichever phase the server is.

grpcio has no option like `curl -k`. Therefore the server's certificate is fetched first, and grpcio is told to trust
it: any server is accepted. The caller must verify what the certificate proves.

A caller of many calls uses `running`: otherwise grpcio starts and stops its threads for each call.

Not here: retries and kept connections. Upstream has no gRPC; this is an addition of the emulator.
"""

import asyncio
import contextlib
import logging
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final, TypeVar

import grpc
import grpc.aio
from cryptography import x509
from google.protobuf.message import Message

from dstack_emu.attest.certificate import load_der
from dstack_emu.attest.errors import FormatError
from dstack_emu.transport.client import MAX_RESPONSE
from dstack_emu.transport.errors import TransportError
from dstack_emu.transport.failures import describe_failure
from dstack_emu.transport.open_calls import Asked
from dstack_emu.transport.tls import Identity, client_context

A = TypeVar("A", bound=Message)
Options = tuple[tuple[str, object], ...]

_OPTIONS: Final[Options] = (
    ("grpc.use_local_subchannel_pool", 1),  # otherwise grpcio shares connections between channels
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_RESPONSE),
)


_log = logging.getLogger(__name__)

SLACK: Final = 1.0
"""Seconds after a call's deadline in which grpcio must have ended the call."""

STOP_TIMEOUT: Final = 5.0
"""Seconds that grpcio has to end its threads."""

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The first bytes of an HTTP/2 client, with empty settings (RFC 9113, section 3.4)."""


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Keep grpcio's threads running until the block ends."""
    grpc.aio.init_grpc_aio()
    try:
        yield
    finally:
        # grpcio waits without a deadline until its thread has ended, which a call that it did not end may prevent.
        ending = threading.Thread(target=grpc.aio.shutdown_grpc_aio, name="end of grpcio", daemon=True)
        ending.start()
        ending.join(STOP_TIMEOUT)
        if ending.is_alive():
            _log.warning("grpcio did not end its threads within %g s; they end with the process", STOP_TIMEOUT)


class StatusError(Exception):
    """The server refused a call: `code` is the name of the status, the text its details."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


async def call(
    target: str,
    method: str,
    request: Message,
    answer: type[A],
    *,
    seconds: float,
    secure: bool = False,
    identity: Identity | None = None,
    metadata: Sequence[tuple[str, str]] = (),
) -> A:
    """Call `package.Service/Method` at `host:port`, over TLS if `secure`, with a client certificate if one is given.

    Raises `StatusError` if the server refuses, `TransportError` if no answer came.
    """
    credentials: grpc.ChannelCredentials | None = None
    options: Options = ()
    if secure:
        async with _within(seconds, target, "TLS handshake"):
            certificate = await _certificate(target, identity)
        try:
            credentials, options = _trusting(certificate, identity)
        except FormatError as error:
            raise TransportError(target, str(error)) from error
    else:
        async with _within(seconds, target, "connection"):
            await _require_listener(target)
    answer_to = f"answer to {method}"
    # grpcio enforces the deadline of the call; the outer deadline is for the case that it does not.
    async with (
        _within(seconds + SLACK, target, answer_to, f"{method} over gRPC"),
        _channel(target, credentials, (*_OPTIONS, *options)) as channel,
    ):
        stub = channel.unary_unary(
            f"/{method}", request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
        )
        try:
            received: A | None = await stub(request, timeout=seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            code, text = error.code(), error.details() or ""
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TransportError(target, _late(answer_to, seconds)) from error
            # If the server itself answered UNAVAILABLE, the channel is connected; if grpcio made it up, it is not.
            connected = channel.get_state() is grpc.ChannelConnectivity.READY
            if code is grpc.StatusCode.UNAVAILABLE and not connected:
                raise TransportError(target, text) from error
            raise StatusError(code.name, text) from error
        if received is None:  # grpc.aio returns None for bytes that it cannot parse
            raise TransportError(target, "the answer is not a message")
        return received


async def certificate_of(target: str, *, seconds: float) -> bytes:
    """Return the certificate (DER) that a server shows; raise `TransportError` if there is no TLS."""
    async with _within(seconds, target, "TLS handshake"):
        return await _certificate(target, None)


async def is_demanded(target: str, *, seconds: float) -> bool:
    """Return whether a server refuses clients without a certificate; raise `TransportError` if it has no TLS."""
    async with _within(seconds, target, "TLS handshake and answer to the HTTP/2 preface"):
        reader, writer = await asyncio.open_connection(*split(target), ssl=client_context())
        try:
            writer.write(PREFACE)  # an HTTP/2 server answers it
            await reader.read(1)
        except ssl.SSLError as error:
            return error.reason is not None and "CERTIFICATE_REQUIRED" in error.reason
        finally:
            writer.transport.abort()
        return False


@contextlib.asynccontextmanager
async def _within(seconds: float, target: str, awaited: str, asked: str = "") -> AsyncIterator[None]:
    """Give a block a deadline, and raise its failures as `TransportError`; `awaited` names what it waits for.

    `asked` names it among the open calls.
    """
    try:
        with Asked(asked or f"for a {awaited}", target):
            async with asyncio.timeout(seconds):
                yield
    except OSError as error:  # TimeoutError is one
        late = isinstance(error, TimeoutError) and not error.errno
        cause = _late(awaited, seconds) if late else describe_failure(error, seconds)
        raise TransportError(target, cause) from error


def _late(awaited: str, seconds: float) -> str:
    return f"no {awaited} within {seconds:g} s"


async def _certificate(target: str, identity: Identity | None) -> bytes:
    host, port = split(target)
    _, writer = await asyncio.open_connection(host, port, ssl=client_context(identity))
    try:
        channel: ssl.SSLObject = writer.get_extra_info("ssl_object")
        return channel.getpeercert(binary_form=True) or b""
    finally:
        writer.transport.abort()


async def _require_listener(target: str) -> None:
    _, writer = await asyncio.open_connection(*split(target))
    writer.transport.abort()


def split(target: str) -> tuple[str, int]:
    """Return host and port of `host:port`; an IPv6 address is in brackets."""
    host, _, port = target.rpartition(":")
    return host.strip("[]"), int(port)


def _trusting(certificate: bytes, identity: Identity | None) -> tuple[grpc.ChannelCredentials, Options]:
    """Return TLS settings that trust this certificate and the name in it; raise `FormatError`."""
    read = load_der(certificate)
    names: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound, ValueError):
        found = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [str(name.value) for name in found if isinstance(name, x509.DNSName | x509.IPAddress)]
    trusted = ssl.DER_cert_to_PEM_cert(certificate).encode()
    mine = () if identity is None else (identity.key.encode(), identity.certificate.encode())
    options = (("grpc.ssl_target_name_override", names[0]),) if names else ()
    return grpc.ssl_channel_credentials(trusted, *mine), options


def _channel(target: str, credentials: grpc.ChannelCredentials | None, options: Options) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, credentials, options)
