"""One address for many webhooks: each request goes to the webhook of the moment, whose answer may be spoilt.

The webhooks are the emulator's, each over a policy file that the test rewrites, and one that asks contracts on a chain
of the test; a KMS has the switch's URL.
"""

import asyncio
import http.client
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dstack_emu.auth.eth_server import eth_app
from dstack_emu.auth.eth_settings import EthSettings
from dstack_emu.auth.file_server import file_app
from dstack_emu.auth.mock import MockSettings
from dstack_emu.auth.server import mock_app, simple_app
from dstack_emu.transport.listen import Server, bind_tcp, serve
from tests.contract_cases import DecisionChain
from tests.decision_model import Webhook


class WebhookSwitch:
    """The webhooks of one policy file, the one that answers now, and the paths that it was asked since it does."""

    def __init__(self, folder: Path) -> None:
        self.policy, self.url = folder / "policy.json", ""
        self.chain: DecisionChain | None = None
        self._loop = asyncio.new_event_loop()
        self._ports: dict[str, int] = {}
        self._servers: list[Server] = []
        self._now = (Webhook("mock", "allow-all"), 0)
        self.asked: list[str] = []
        self.set(self._now[0])

    def set(self, webhook: Webhook) -> None:
        """Let this webhook answer from now on; its policy file is replaced as a whole."""
        if webhook.contract == "contract":
            assert self.chain is not None
            self.chain.set(json.loads(webhook.file)["acts"])
        elif webhook.contract != "mock":
            new = self.policy.with_suffix(".new")
            new.write_text(webhook.file)
            os.replace(new, self.policy)
        key = f"mock {webhook.file}" if webhook.contract == "mock" else webhook.contract
        if key not in self._ports:
            self._ports[key] = self._on_loop(self._start(webhook))
        self._now, self.asked = (webhook, self._ports[key]), []

    def _on_loop(self, work: Any) -> Any:
        if self._loop.is_running():
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        return self._loop.run_until_complete(work)

    async def _start(self, webhook: Webhook) -> int:
        sock = bind_tcp("127.0.0.1", 0)
        port: int = sock.getsockname()[1]
        app: Any
        match webhook.contract:
            case "mock":
                policy, _, listed = webhook.file.partition(":")
                names = {"allowlist-device": "MOCK_ALLOWED_DEVICE_IDS", "allowlist-mr": "MOCK_ALLOWED_MR_AGGREGATED"}
                listing = {names[policy]: listed} if policy in names else {}
                app = mock_app(MockSettings.from_env({"MOCK_POLICY": policy, **listing}))
            case "file":
                app = file_app(self.policy)
            case "contract":
                assert self.chain is not None
                app = eth_app(EthSettings(self.chain.url, self.chain.kms, self.chain.revision))
            case contract:
                app = simple_app(self.policy, contract=contract)
        self._servers.append(await serve(app, sock))
        return port

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, str]:
        """Return status and body, and what happens to the connection."""
        webhook, port = self._now
        self.asked.append(path)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        status, answer = response.status, response.read()
        connection.close()
        spoiling = webhook.spoiling if path == f"/bootAuth/{webhook.spoilt}" else ""
        match spoiling:
            case "status":
                return 503, b'{"isAllowed":true,"reason":"","gatewayAppId":""}', ""
            case "malformed":
                return 200, b'{"isAllowed":true,"reason":"","gatewayAppId":""', ""
            case "text":
                return 200, b'{"isAllowed":"true","reason":"","gatewayAppId":""}', ""
        return status, answer, spoiling

    def close(self) -> None:
        """Stop the webhooks."""
        for server in self._servers:
            self._on_loop(server.close())


@contextmanager
def webhook_switch(folder: Path) -> Iterator[WebhookSwitch]:
    """Serve a switch, and the webhooks behind it, until the block ends."""
    switch = WebhookSwitch(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            kept = {name: self.headers[name] for name in ("Content-Type",) if name in self.headers}
            status, answer, spoiling = switch.answer(self.command, self.path, kept, body)
            self.close_connection = True
            if spoiling == "reset":
                return
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer) + (spoiling == "cut")))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    switch.url = f"http://127.0.0.1:{server.server_address[1]}"
    loop = switch._loop
    threads = [threading.Thread(target=server.serve_forever), threading.Thread(target=loop.run_forever)]
    for thread in threads:
        thread.start()
    try:
        yield switch
    finally:
        server.shutdown()
        switch.close()
        loop.call_soon_threadsafe(loop.stop)
        for thread in threads:
            thread.join()
        server.server_close()
        loop.close()
