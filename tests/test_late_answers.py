"""A server that answers each request twice, the second time a little later: the second is never the next one's answer.

The late answer arrives when the next request is already written, if that goes over the same connection: a client cannot
tell it from the next one's.
"""

import itertools
import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Final, Literal, get_args

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dstack_emu.kms_emu.agent_client import GuestAgentClient
from dstack_emu.transport.http_client import HttpClient
from tests import foreign, tls
from tests.foreign import Authority, Guest
from tests.running import RunningStack, running_kms
from tests.test_webhook_failures import ALLOW, copied_keys, kms_toml

ROUNDS: Final = 200
LATE: Final = (0.0002, 0.0005, 0.001, 0.002, 0.004)
"""Seconds after which an answer is sent again."""

Transport = Literal["tcp", "tls", "unix"]
Answering = Callable[[str, bytes], bytes]
"""The body of the answer to a path and a body."""


class _Threads(socketserver.ThreadingMixIn):
    daemon_threads = True
    request_queue_size = 64


class _Tcp(_Threads, socketserver.TCPServer):
    def get_request(self) -> tuple[socket.socket, Any]:
        accepted: tuple[socket.socket, Any] = super().get_request()
        accepted[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return accepted


class _Unix(_Threads, socketserver.UnixStreamServer):
    pass


@contextmanager
def answering_twice(
    answer: Answering, path: Path | None = None, settings: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Serve on a port, or at a socket file; give its address."""
    delays = itertools.cycle(LATE)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # the client has left
                connection = self.request if settings is None else settings.wrap_socket(self.request, server_side=True)
                with connection, connection.makefile("rb") as source:
                    while request := read_request(source):
                        body = answer(*request)
                        whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
                        connection.sendall(whole)
                        time.sleep(next(delays))  # this is what the server does wrong
                        connection.sendall(whole)

    server: _Tcp | _Unix = _Tcp(("127.0.0.1", 0), Handler) if path is None else _Unix(str(path), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    scheme = "http" if settings is None else "https"
    yield f"{scheme}://127.0.0.1:{server.socket.getsockname()[1]}" if path is None else str(path)
    server.shutdown()
    server.server_close()


def read_request(source: BufferedIOBase) -> tuple[str, bytes] | None:
    """Read one request to its end; return its path and body, or None at the end of the connection."""
    if not (line := source.readline()):
        return None
    size = 0
    while (header := source.readline()) not in (b"\r\n", b""):
        name, _, value = header.partition(b":")
        if name.lower() == b"content-length":
            size = int(value)
    return line.split(b" ")[1].decode(), source.read(size)


def server_settings() -> ssl.SSLContext:
    """TLS of a server whose certificate nobody verifies."""
    authority = Authority.invent("server")
    key = authority.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return tls.server(authority.certificate.public_bytes(Encoding.PEM).decode(), key.decode())


@pytest.mark.parametrize("transport", get_args(Transport))
async def test_answer_is_never_an_earlier_requests(transport: Transport, tmp_path: Path) -> None:
    path = tmp_path / "socket" if transport == "unix" else None
    settings = server_settings() if transport == "tls" else None
    with answering_twice(lambda asked, body: asked.encode(), path, settings) as address:
        base, unix = ("http://localhost", address) if path else (address, None)
        client = HttpClient(timeout=20, max_answer=1000, tls=tls.client(), unix=unix)
        try:
            for method in ("POST", "GET"):
                for number in range(ROUNDS):
                    answer = await client.send(method, f"{base}/{number}", b"" if method == "POST" else None)
                    assert answer.body.decode() == f"/{number}"
        finally:
            await client.close()


async def test_agents_answer_is_never_that_to_earlier_report_data(tmp_path: Path) -> None:
    def attest(path: str, body: bytes) -> bytes:
        return json.dumps({"attestation": json.loads(body)["report_data"]}).encode()

    with answering_twice(attest, tmp_path / "agent.sock") as address:
        agent = GuestAgentClient(address)
        try:
            for number in range(ROUNDS):
                assert await agent.attest(bytes([number]) * 64) == bytes([number]) * 64
        finally:
            await agent.close()


def test_denied_app_gets_no_key_of_a_webhook_that_answers_twice(ready_stack: RunningStack, tmp_path: Path) -> None:
    """The decision about the KMS itself, which allows it, comes before the one about the app."""
    denial = {**ALLOW, "isAllowed": False, "reason": "no"}

    def decide(path: str, body: bytes) -> bytes:
        return json.dumps(ALLOW if path.endswith("/kms") else denial).encode()

    copied_keys(tmp_path, ready_stack)
    with (
        answering_twice(decide) as webhook,
        running_kms(kms_toml(tmp_path, ready_stack, webhook), ready_stack.services["agent-src"]) as url,
    ):
        guest = Guest.of(url, ready_stack.description["app"]["dstack_sock"])
        with foreign.kms(url, identity=guest.identity(), root_ca=guest.root_ca) as connection:
            for _ in range(ROUNDS):
                assert connection.call("GetAppKey", api_version=1).error == "App not allowed: Boot denied: no"
            denial.update(ALLOW)
            assert connection.call("GetAppKey", api_version=1).status == 200
