"""The measured forwarders and the app behind them, each in a process of its own; the forwarders are on uvloop.

`ingress FOLDER APP` is the gateway's ingress with the certificate in FOLDER, whose instance listens on the port APP.
`copy FOLDER APP` copies bytes to that port and back with asyncio's streams, and looks at none of them.
`app FOLDER 0` reads until `GO`, and then sends until the connection ends.
"""

import asyncio
import contextlib
import json
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from dstack_emu.gateway.ingress.server import Ingress
from dstack_emu.gateway.ingress.settings import IngressSettings
from dstack_emu.gateway.ingress.tls import domain_tls
from dstack_emu.gateway.routing import Endpoint, Instance
from dstack_emu.gateway.state import PolicyEntry
from dstack_emu.transport.listen import bind_tcp

CHUNK = 65536
GO = b"GO"
_ZEROS = bytes(1 << 20)
DOMAIN = "app.localhost"
INSTANCE = Instance("app", "app", "10.0.0.2")


class _OneApp:
    def __init__(self, port: int) -> None:
        self._port = port

    def candidates(self, name: str) -> Sequence[Instance]:
        return (INSTANCE,)

    async def port_policy(self, instance: Instance) -> PolicyEntry:
        return PolicyEntry()

    def endpoint(self, instance: Instance, port: int) -> Endpoint:
        return ("127.0.0.1", self._port)

    async def app_info(self) -> Mapping[str, Any]:
        return {}

    async def acme_info(self) -> Mapping[str, Any]:
        return {}


async def _serve_ingress(folder: Path, app: int, sock: socket.socket) -> None:
    one, settings = _OneApp(app), IngressSettings(max_connections_per_app=0)
    tls = domain_tls((folder / "app.crt").read_text(), (folder / "app.key").read_text())
    ingress = Ingress(routes=one, reach=one, find_tls={DOMAIN: tls}.get, this_node=one, settings=settings)
    await ingress.start([sock])


async def _serve_copy(folder: Path, app: int, sock: socket.socket) -> None:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        app_reader, app_writer = await asyncio.open_connection("127.0.0.1", app)
        await asyncio.gather(copy(reader, app_writer), copy(app_reader, writer))

    await asyncio.start_server(serve, sock=sock)


async def _serve_app(folder: Path, app: int, sock: socket.socket) -> None:
    sock.setblocking(True)
    threading.Thread(target=_accept, args=(sock,), daemon=True).start()


def _accept(sock: socket.socket) -> None:
    while True:
        threading.Thread(target=_send, args=(sock.accept()[0],), daemon=True).start()


def _send(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        received = b""
        while not received.endswith(GO):
            received = received[-1:] + sock.recv(CHUNK)
        while True:
            sock.sendall(_ZEROS)


async def _run(kind: str, folder: str, app: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    sock = bind_tcp("127.0.0.1", 0)
    await {"ingress": _serve_ingress, "copy": _serve_copy, "app": _serve_app}[kind](Path(folder), int(app), sock)
    print(json.dumps({"port": sock.getsockname()[1]}), flush=True)
    await stop.wait()


if __name__ == "__main__":
    uvloop.run(_run(*sys.argv[1:]))
