"""An auth webhook that somebody else wrote, with the standard library: it allows what is on a list."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class TheirWebhook(ThreadingHTTPServer):
    """Allows a request if one of `allowed` is among its members, or everybody if `allowed` has a star."""

    daemon_threads = True

    def __init__(self, *allowed: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.allowed = set(allowed)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.credentials: set[str | None] = set()
        self.traces: list[tuple[str | None, str | None]] = []
        """The headers of W3C Trace Context, of each request."""

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: TheirWebhook

    def do_GET(self) -> None:
        self._answer({"status": "ok", "gatewayAppId": "theirs"})

    def do_POST(self) -> None:
        server = self.server
        boot_info = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, boot_info))
        server.credentials.add(self.headers["Authorization"])
        server.traces.append((self.headers["traceparent"], self.headers["tracestate"]))
        is_allowed = "*" in server.allowed or bool(server.allowed.intersection(map(str, boot_info.values())))
        reason = "" if is_allowed else "not on their list"
        self._answer({"isAllowed": is_allowed, "gatewayAppId": "theirs", "reason": reason})

    def _answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""


@contextmanager
def their_webhook(*allowed: str) -> Iterator[TheirWebhook]:
    """Run one until the block ends."""
    with TheirWebhook(*allowed) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
