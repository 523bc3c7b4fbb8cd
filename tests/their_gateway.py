"""A gateway that shares no code with the project: the standard library's HTTPS server, which answers as a test says."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography import x509
from dstack_sdk import DstackClient

from tests import tls

REGISTERED: dict[str, Any] = {
    "wg": {
        "client_ip": "10.4.0.7",
        "servers": [
            {"pk": "c2Vjb25kIGluIG9yZGVyLCBmaXJzdCBpbiBhbnN3ZXI=", "ip": "10.4.0.2/16", "endpoint": "192.0.2.2:51820"},
            {"pk": "Zmlyc3QgaW4gb3JkZXIsIHNlY29uZCBpbiBhbnN3ZXI=", "ip": "10.4.0.1", "endpoint": "192.0.2.1:51820"},
        ],
    },
    "agent": {"external_port": 443, "internal_port": 8090, "domain": "app.test", "app_address_ns_prefix": "_x"},
    "gateways": [],
}
"""What RegisterCvm of a gateway answers."""


@dataclass
class TheirGateway:
    """A gateway that runs. It answers with `answers` in turn, and then with REGISTERED; `requests` are what it got."""

    url: str
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    requests: list[tuple[str, dict[str, Any], x509.Certificate]] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def wait_for_request(self) -> None:
        """Wait until a request that was not waited for yet has arrived."""
        assert self.arrived.acquire(timeout=30)


def certificate_of(agent: str) -> tuple[str, str]:
    """Return the certificate chain and the key (PEM) that a gateway has from the agent at that address."""
    key = DstackClient(agent).get_tls_key(
        "dstack-gateway", ["127.0.0.1"], usage_ra_tls=True, usage_client_auth=True, with_app_info=True
    )
    return "".join(key.certificate_chain), key.key


@contextmanager
def their_gateway(chain: str, key: str, client_ca: str) -> Iterator[TheirGateway]:
    """Run a gateway with this certificate (PEM), for clients under this CA (PEM)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            der = self.connection.getpeercert(binary_form=True)
            gateway.requests.append((self.path, body, x509.load_der_x509_certificate(der)))
            status, answer = gateway.answers.pop(0) if gateway.answers else (200, REGISTERED)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            gateway.arrived.release()

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = tls.server(chain, key, client_ca=client_ca).wrap_socket(server.socket, server_side=True)
        gateway = TheirGateway(f"https://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield gateway
        finally:
            server.shutdown()
            thread.join()
