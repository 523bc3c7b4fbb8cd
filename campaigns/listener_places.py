"""The listeners of one stack, and how bytes are sent to them; all are on 127.0.0.1 or socket files."""

import json
import os
import re
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any, Final
from urllib.parse import urlsplit

import grpc

from campaigns.listener_requests import UPGRADE, client_hello, frame, http
from campaigns.outputs import asked, command
from tests.tls import client as trusting_anybody

TIMEOUT: Final = 60.0
IDLE: Final = 0.3
"""Seconds of silence after which a listener is taken to wait for more."""
VARIABLE: Final = re.compile(rb"(?im)^date: .*\r\n")
H2: Final = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    b"\0\0\0\4\0\0\0\0\0"
    b"\0\0\x3e\1\4\0\0\0\1\x83\x86\x44\x10/kms.KMS/GetMeta\0\x41\1a\x40\x0ccontent-type\x10application/grpc\x40\2te\x08trailers"
    b"\0\0\5\0\1\0\0\0\1\0\0\0\0\0"
)
"""A call of gRPC: preface, settings, headers and an empty message."""
BOOT_INFO: Final = b"{}"

Connect = Callable[[], socket.socket]


@dataclass(frozen=True)
class Place:
    """A listener: how to connect to it, valid requests, and how to ask it something that has a constant answer."""

    name: str
    connect: Connect
    requests: tuple[bytes, ...]
    answer: Callable[[], bytes]

    def send(self, data: bytes, how: str, chance: Random) -> bytes:
        """Send bytes, and return what is answered; nothing is raised if the listener ends the connection."""
        said = b""
        with suppress(OSError), self.connect() as sock:
            if how == "stalled":
                data = data[: chance.randrange(len(data) + 1)]
            for piece in pieces(data, chance) if how == "in pieces" else (data,):
                sock.sendall(piece)
                if how == "in pieces":
                    time.sleep(0.002)
            if how == "half closed":
                socket.socket.shutdown(sock, socket.SHUT_WR)  # in TLS, too, without a close_notify
            if how == "stalled":
                time.sleep(0.05)
            if how in ("stalled", "reset"):
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return said
            sock.settimeout(IDLE)
            while piece := sock.recv(65536):
                said += piece
        return said


def pieces(data: bytes, chance: Random) -> Iterator[bytes]:
    """Split bytes at up to six places."""
    places = sorted({0, *(chance.randint(0, len(data)) for _ in range(chance.randint(1, 6)))})
    for begin, end in zip(places, [*places[1:], len(data)], strict=True):
        yield data[begin:end]


def whole_answer(connect: Connect, request: bytes) -> bytes:
    """Send a valid request; return the answer up to its end, without what varies."""
    said = b""
    with connect() as sock:
        sock.settimeout(TIMEOUT)
        sock.sendall(request)
        while piece := sock.recv(65536):
            said += piece
    if not re.match(rb"HTTP/1\.1 2\d\d ", said):
        raise ConnectionError(f"got {said[:300]!r}, expected a success")
    return VARIABLE.sub(b"", said)


def websocket_answer(connect: Connect) -> bytes:
    """Ask a chain for its id over a WebSocket; return all of the answer, with that to a close."""
    request = frame(b'{"jsonrpc":"2.0","id":1,"method":"eth_chainId","params":[]}')
    said = b""
    with connect() as sock:
        sock.settimeout(TIMEOUT)
        sock.sendall(UPGRADE + request)
        while b"result" not in said:
            if not (piece := sock.recv(65536)):
                raise ConnectionError(f"got {said[:300]!r}, expected a frame with a result")
            said += piece
    return VARIABLE.sub(b"", said)


class Process:
    """What the stack's process holds, and its log."""

    def __init__(self, pid: int, log: IO[str]) -> None:
        self._folder, self._log, self._at = Path(f"/proc/{pid}"), log, 0

    def files(self) -> int:
        """Return the number of open files."""
        return len(os.listdir(self._folder / "fd"))

    def threads(self) -> int:
        """Return the number of threads."""
        return len(os.listdir(self._folder / "task"))

    def memory(self) -> int:
        """Return the resident memory in bytes."""
        return int((self._folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def new_log(self) -> str:
        """Return what was logged since the last call."""
        self._log.seek(self._at)
        text = self._log.read()
        self._at = self._log.tell()
        return text

    def tracebacks(self) -> list[str]:
        """Return each traceback that was logged since `new_log`."""
        found = []
        for line in self.new_log().splitlines():
            if "Traceback" in line:
                with suppress(ValueError):
                    line = "\n".join(str(value) for value in json.loads(line).values())
                found.append(line.strip())
        return found


@dataclass(frozen=True)
class RunningStack:
    """A stack, and the URL of a webhook beside it."""

    description: dict[str, Any]
    mock: str
    process: Process
    mock_process: Process


@contextmanager
def running_stack(folder: Path) -> Iterator[RunningStack]:
    """Run a stack with everything that listens, a KMS without keys in it, and auth-mock beside it."""
    stack = (
        "up",
        "--free-ports",
        "--state",
        str(folder / "state"),
        "--vmm",
        "--gateway",
        "--grpc",
        "--auth",
        "dst=eth",
    )
    mock = ("auth", "mock", "--listen", "127.0.0.1:0")
    with logged(*stack) as (description, process), logged(*mock) as (said, mock_process):
        added = asked(f"{description['services']['control']}/kms", {"name": "third", "platform": "host of third"})
        description["services"]["kms-third"] = added["url"]
        yield RunningStack(description, said["url"], process, mock_process)


@contextmanager
def logged(*arguments: str) -> Iterator[tuple[dict[str, Any], Process]]:
    """Run a command with a log in JSON until the block ends; yield what it prints, and its process."""
    with tempfile.TemporaryFile("w+") as log:
        line = command(*arguments, "--json", "--log-format", "json")
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            assert process.stdout is not None
            try:
                if not (printed := process.stdout.readline()):
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(arguments)}: {log.read()[-4000:]}")
                yield json.loads(printed), Process(process.pid, log)
            finally:
                process.terminate()


def places(stack: RunningStack) -> list[Place]:
    """Return every listener."""
    services, app = stack.description["services"], stack.description["app"]
    body = b'{"path":"a","purpose":"","algorithm":"secp256k1"}'
    as_json = "Content-Type: application/json"
    agent = (http("POST", "/GetKey", body, as_json), http("POST", "/Info", b"{}", as_json), http("GET", "/"))
    meta = http("POST", "/prpc/KMS.GetMeta?json", b"{}", as_json)
    chain = http("POST", "/", b'{"jsonrpc":"2.0","id":1,"method":"eth_chainId","params":[]}', as_json)
    info = http("POST", "/prpc/Tappd.Info", b"{}", as_json)
    boot = http("POST", "/bootAuth/app", BOOT_INFO, as_json)

    def plain(name: str, connect: Connect, *requests: bytes) -> Place:
        return Place(name, connect, requests, lambda: whole_answer(connect, requests[0]))

    def behind(name: str, tls: Connect, raw: Connect, hello: bytes, valid: bytes) -> Place:
        """A listener of TLS, which is sent what is no TLS."""
        return Place(name, raw, (hello,), lambda: whole_answer(tls, valid))

    kms, kms_raw = secured(services["kms-src"]), address(services["kms-src"])
    rpc, rpc_raw = secured(services["gateway"]), address(services["gateway"])
    app_url = urlsplit(stack.description["gateway"]["app_url"])
    ingress_raw = address(f"https://{services['ingress']}")
    ingress = secured(f"https://{services['ingress']}", str(app_url.hostname))
    page = http("GET", "/")
    found = [
        plain("agent socket", unix(app["dstack_sock"]), *agent),
        plain("tappd socket", unix(app["tappd_sock"]), info, page),
        plain("agent", address(services["app"]), *agent),
        plain("KMS", kms, meta, http("GET", "/")),
        behind("KMS without TLS", kms, kms_raw, client_hello("a.example"), meta),
        plain(
            "KMS to onboard", address(services["kms-third"]), http("GET", "/"), http("POST", "/prpc/Onboard.Nothing")
        ),
        plain("auth-simple", address(services["auth-src"]), http("GET", "/"), boot),
        plain("auth-eth-bun", address(services["auth-dst"]), http("GET", "/"), boot),
        plain("auth-mock", address(stack.mock), http("GET", "/"), boot),
        plain("PCCS", address(services["pccs"]), http("GET", "/tdx/certification/v4/qe/identity")),
        plain(
            "verifier", address(services["verifier"]), http("GET", "/health"), http("POST", "/verify", b"{}", as_json)
        ),
        plain(
            "VMM",
            address(services["vmm"]),
            http("POST", "/prpc/Version?json", b"{}", as_json),
            http("POST", "/guest/Info?json", b'{"id":"a"}', as_json),
        ),
        plain(
            "gateway admin",
            address(services["gateway-admin"]),
            http("POST", "/prpc/ListDnsCredentials?json", b"{}"),
            http("GET", "/"),
            http("POST", "/prpc/Status?json", b"{}"),
        ),
        plain("gateway RPC", rpc, http("POST", "/prpc/Info?json", b"{}", as_json)),
        behind(
            "gateway RPC without TLS",
            rpc,
            rpc_raw,
            client_hello("a.example"),
            http("POST", "/prpc/Info?json", b"{}", as_json),
        ),
        behind("ingress", ingress, ingress_raw, client_hello(str(app_url.hostname)), page),
        plain("ingress in TLS", ingress, page),
        Place(
            "chain",
            address(services["chain"]),
            (chain, UPGRADE),
            lambda: whole_answer(address(services["chain"]), chain) + websocket_answer(address(services["chain"])),
        ),
        plain("control", address(services["control"]), http("GET", "/health"), http("GET", "/kms/third")),
    ]
    agent_grpc, kms_grpc = (f"https://{stack.description['grpc'][name]}" for name in ("app-grpc", "kms-src-grpc"))
    root = Path(stack.description["kms_ca"]).read_bytes()
    found += [
        remote("agent gRPC", agent_grpc, address(agent_grpc), None),
        remote("KMS gRPC", kms_grpc, secured(kms_grpc), grpc.ssl_channel_credentials(root)),
    ]
    return found


def remote(name: str, url: str, connect: Connect, credentials: grpc.ChannelCredentials | None) -> Place:
    """A listener of gRPC, asked for its health."""
    target = urlsplit(url).netloc

    def answer() -> bytes:
        with grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target) as channel:
            said: bytes = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=TIMEOUT)
            return said

    return Place(name, connect, (H2,), answer)


def address(url: str) -> Connect:
    """Connect to the port of a URL."""
    parts = urlsplit(url)
    return lambda: socket.create_connection((str(parts.hostname), int(parts.port or 0)), TIMEOUT)


def secured(url: str, name: str = "127.0.0.1") -> Connect:
    """Connect to a URL's port by TLS; any certificate is believed."""
    raw, context = address(url), trusting_anybody()

    def connect() -> socket.socket:
        sock = raw()
        try:
            secured: socket.socket = context.wrap_socket(sock, server_hostname=name)
        except OSError:
            sock.close()
            raise
        return secured

    return connect


def unix(path: str) -> Connect:
    """Connect to a socket file."""

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        return sock

    return connect
