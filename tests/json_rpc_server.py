"""A chain as a webhook sees it: JSON-RPC over HTTP with the standard library, and any answer that a test wants.

The encodings of answers are written here once more, from the ABI specification, so that they are not those of the
webhook.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SELECTORS = {
    "1e079198": "isAppAllowed",
    "e067ec9d": "isKmsAllowed",
    "95f51931": "gatewayAppId",
    "25a992da": "appImplementation",
}
CONTRACT = "0x1234567890123456789012345678901234567890"
IMPLEMENTATION = "9876543210987654321098765432109876543210"


def word(value: int) -> str:
    return f"{value:064x}"


def abi_text(text: str, place: int = 32) -> str:
    """The hex of a text that is the last returned value; `place` is where it stands, in bytes."""
    content = text.encode().hex()
    return word(place) + word(len(content) // 2) + content + "0" * (-len(content) % 64)


def abi_decision(is_allowed: bool, reason: str) -> str:
    return "0x" + word(int(is_allowed)) + abi_text(reason, 64)


@dataclass
class HttpReply:
    """An HTTP answer as it is; `body` is sent in any case, `length` is what Content-Length says of it."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    held: threading.Event | None = None
    """The answer waits for it."""


Fault = Callable[[str, dict[str, Any]], Any]
"""Called with the name of the method, or of the contract's, and the request; what it returns is the answer, if any."""


class RpcError(Exception):
    """An error object: its message, its code, and what else it has."""

    def __init__(self, message: object, code: object = -32000, **more: object) -> None:
        super().__init__(str(message))
        self.document = {"code": code, "message": message, **more}


@dataclass
class Chain:
    """What the chain answers; a test changes it. `calls` are the requests so far: method, and block of an eth_call."""

    url: str = ""
    chain_id: int = 1337
    head: int = 100
    decision: tuple[bool, str] = (True, "")
    gateway: str = "0xgateway"
    calls: list[tuple[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    fault: Fault = lambda method, request: None

    def name_of(self, request: dict[str, Any]) -> str:
        if request["method"] == "eth_call":
            return SELECTORS[request["params"][0]["data"][2:10]]
        return str(request["method"])

    def result(self, name: str) -> Any:
        return {
            "eth_chainId": hex(self.chain_id),
            "eth_blockNumber": hex(self.head),
            "isAppAllowed": abi_decision(*self.decision),
            "isKmsAllowed": abi_decision(*self.decision),
            "gatewayAppId": "0x" + abi_text(self.gateway),
            "appImplementation": "0x" + IMPLEMENTATION.rjust(64, "0"),
        }[name]

    def answer(self, body: bytes) -> HttpReply:
        request = json.loads(body)
        name = self.name_of(request)
        self.requests.append(request)
        self.calls.append((name, request["params"][1] if request["method"] == "eth_call" else None))
        envelope = {"jsonrpc": "2.0", "id": request["id"]}
        try:
            result = self.fault(name, request)
        except RpcError as error:
            return HttpReply(json.dumps({**envelope, "error": error.document}).encode())
        if isinstance(result, HttpReply):
            return result
        return HttpReply(json.dumps({**envelope, "result": self.result(name) if result is None else result}).encode())


@contextmanager
def running_chain() -> Iterator[Chain]:
    """Serve a chain on a free port of 127.0.0.1 until the block ends."""
    chain = Chain()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reply = chain.answer(self.rfile.read(int(self.headers["Content-Length"])))
            if reply.held is not None:
                reply.held.wait()
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body) if reply.length is None else reply.length))
            self.end_headers()
            try:
                self.wfile.write(reply.body)
            except OSError:  # the webhook has read enough
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None: ...

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        chain.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield chain
        finally:
            server.shutdown()
            thread.join()
