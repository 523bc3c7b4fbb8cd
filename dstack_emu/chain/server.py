"""The chain's server: JSON-RPC by POST and over a WebSocket, on one port.

Clients send JSON under any content type. Over a WebSocket there is eth_subscribe with newHeads and logs, too. Binds no
socket. What the EVM executes is done in a thread, one request after the other, so that the loop answers meanwhile.
"""

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from aiohttp import WSMsgType, web
from aiohttp.typedefs import Handler
from yarl import URL

from dstack_emu.chain.block import Block
from dstack_emu.chain.errors import InvalidParamsError
from dstack_emu.chain.filters import LogFilter
from dstack_emu.chain.quantities import Params, quantity
from dstack_emu.chain.rpc import Rpc
from dstack_emu.chain.views import header_view
from dstack_emu.transport.aiohttp_server import JUDGES_PAGES

MAX_BODY: Final = 4 * 1024 * 1024
"""Bytes of a request or a message."""
MAX_SUBSCRIPTIONS: Final = 100
"""Subscriptions of one connection."""
MAX_UNSENT: Final = 20_000
"""Messages that wait for one connection, as in geth; that of a client that falls further behind is aborted."""
CLOSE_TIMEOUT: Final = 2.0
"""Seconds that clients have to close their connections when the server ends."""

Views = Callable[[Block], list[Any]]
"""What a subscriber is sent of a block."""


class ChainServer:
    """Serves the methods of a node, and tells subscribers of its blocks."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._thread = ThreadPoolExecutor(1, "chain")
        self._sockets: set[_Socket] = set()

    def app(self) -> web.Application:
        """Make the application."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[_refuse_foreign_pages])
        app[JUDGES_PAGES] = True
        app.router.add_post("/", self._post)
        app.router.add_get("/", self._get)
        app.on_shutdown.append(self._close_sockets)
        app.on_cleanup.append(self._end_thread)
        return app

    def tell(self, block: Block) -> None:
        """Send a block to its subscribers, from any thread."""
        for socket in tuple(self._sockets):
            socket.tell(block)

    async def answer(self, rpc: Rpc, body: bytes) -> bytes | None:
        """Answer a request in the thread of this server, after those that came before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, rpc.answer, body)

    async def _post(self, request: web.Request) -> web.Response:
        answer = await self.answer(self._rpc, await request.read())
        return web.Response(body=answer or b"", content_type="application/json")

    async def _get(self, request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse(max_msg_size=MAX_BODY)
        if not _asks_for(websocket, request):
            return web.Response(
                status=405, text="JSON-RPC by POST, or a WebSocket, expected", headers={"Allow": "POST"}
            )
        await websocket.prepare(request)
        socket = _Socket(websocket, request.transport, self._rpc)
        self._sockets.add(socket)
        try:
            await socket.serve(self)
        finally:
            self._sockets.discard(socket)
        return websocket

    async def _end_thread(self, _app: web.Application) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _close_sockets(self, _app: web.Application) -> None:
        sockets = tuple(self._sockets)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await asyncio.gather(*(socket.websocket.close() for socket in sockets))
        for socket in sockets:
            socket.abort()


def _asks_for(websocket: web.WebSocketResponse, request: web.Request) -> bool:
    """Return whether a request begins a WebSocket."""
    try:
        return websocket.can_prepare(request).ok
    except ValueError:  # aiohttp raises it for a header that is not ASCII
        return False


@web.middleware
async def _refuse_foreign_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a page of another machine makes a browser send: the accounts here have no password."""
    origin = request.headers.get("Origin")
    if origin is not None and not _is_of_this_machine(origin):
        return web.Response(status=403, text=f"Origin: pages of other hosts may not use this; got {origin!r:.100}")
    return await handler(request)


def _is_of_this_machine(origin: str) -> bool:
    try:
        url = URL(origin)
    except ValueError:
        return False
    if url.scheme not in ("http", "https"):
        return bool(url.scheme)  # an extension, such as a wallet, which its user installed
    if url.host is None or url.host == "localhost":
        return url.host is not None
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


class _Socket:
    """A connection, and what it subscribed to."""

    def __init__(self, websocket: web.WebSocketResponse, transport: asyncio.Transport | None, rpc: Rpc) -> None:
        self.websocket = websocket
        self._rpc = rpc.also({"eth_subscribe": self._subscribe, "eth_unsubscribe": self._unsubscribe})
        self._views: dict[str, Views] = {}
        self._last = 0
        self._loop = asyncio.get_running_loop()
        self._outgoing = asyncio.Queue[bytes](MAX_UNSENT)
        self._transport = transport

    async def serve(self, server: ChainServer) -> None:
        """Answer messages until the connection ends."""
        writer = asyncio.create_task(self._write())
        try:
            async for message in self.websocket:
                if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                    continue
                body = message.data.encode() if message.type == WSMsgType.TEXT else message.data
                if answer := await server.answer(self._rpc, body):
                    self._send(answer)
        finally:
            writer.cancel()

    def tell(self, block: Block) -> None:
        """Send what was subscribed to, after the answer to the request that made the block."""
        for name, views in tuple(self._views.items()):
            for view in views(block):
                message = {"subscription": name, "result": view}
                text = json.dumps({"jsonrpc": "2.0", "method": "eth_subscription", "params": message})
                self._loop.call_soon_threadsafe(self._send, text.encode())

    def _send(self, message: bytes) -> None:
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.abort()

    def abort(self) -> None:
        """Abort the connection."""
        if self._transport is not None:
            self._transport.abort()

    async def _write(self) -> None:
        while True:
            await self.websocket.send_str((await self._outgoing.get()).decode())

    def _subscribe(self, params: Params) -> str:
        kind = params.get(0)
        if len(self._views) >= MAX_SUBSCRIPTIONS:
            raise InvalidParamsError(f"at most {MAX_SUBSCRIPTIONS} subscriptions of a connection expected")
        if kind == "newHeads":
            views: Views = lambda block: [header_view(block)]  # noqa: E731
        elif kind == "logs":
            views = LogFilter.of(params.members(1, "filter") if params.get(1) is not None else {}).of_block
        else:
            raise InvalidParamsError(f"subscription: newHeads or logs expected, got {kind!r:.40}")
        self._last += 1
        name = quantity(self._last)
        self._views[name] = views
        return name

    def _unsubscribe(self, params: Params) -> bool:
        return self._views.pop(str(params.get(0)), None) is not None
