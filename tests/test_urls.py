"""Users and passwords in URLs: in no text that others see, and still sent to the server that the URL names."""

import base64
import http.server
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.transport.urls import shown_url, without_credentials
from tests.commands import serving
from tests.kms_process import World, running, variables
from tests.ports import refusing_port
from tests.running import RunningStack

USER, PASSWORD = "the-user", "the%20pass%40word"
SECRETS = (USER, PASSWORD, "the pass@word", base64.b64encode(b"the-user:the pass@word").decode())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:p@host:1/path?a=b@c#d", "http://host:1/path?a=b@c#d"),
        ("https://u@[::1]/a@b", "https://[::1]/a@b"),
        ("http://u:p@q@host", "http://host"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://host", "http://host"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
        ("u:p@host:1/path", "host:1/path"),
        ("//u:p@host", "//host"),
        ("http://u:p/w@host/path", "http://host/path"),
        ("http://u:70000@p@host", "http://host"),
        ("http://u:p@", "http://"),
    ],
)
def test_url_is_shown_without_user_and_password(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_text_is_shown_without_users_and_passwords() -> None:
    text = "a (http://u:p@host/x): b 'https://u@other' c@d"
    assert without_credentials(text) == "a (http://host/x): b 'https://other' c@d"


class _Webhook(http.server.BaseHTTPRequestHandler):
    """Denies; answers `GET /` by a 500."""

    authorizations: list[str | None]

    def do_GET(self) -> None:
        self._answer(500, b"no")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b'{"isAllowed":false,"reason":"no","gatewayAppId":""}')

    def _answer(self, status: int, body: bytes) -> None:
        self.authorizations.append(self.headers["Authorization"])
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, _format: str, *_args: Any) -> None: ...


@contextmanager
def webhook() -> Iterator[tuple[str, list[str | None]]]:
    """Serve it; yield its host and port, and the Authorization headers that it is sent."""
    seen: list[str | None] = []
    handler = type("Webhook", (_Webhook,), {"authorizations": seen})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One agent with its PCCS."""
    with serving("agent", "--release", "0.6") as description:
        yield World.of(description)


def require_no_secret(*texts: str) -> None:
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text], text


def webhook_at(address: str) -> dict[str, str]:
    return {
        "core.auth_api.type": "webhook",
        "core.auth_api.webhook.url": f"http://{USER}:{PASSWORD}@{address}/base",
        "core.onboard.auto_bootstrap_domain": "",
    }


@pytest.mark.parametrize("release", ["0.5", "0.6"])
def test_webhook_is_sent_them_and_callers_are_not_told(world: World, tmp_path: Path, release: str) -> None:
    bootstrap = ("Onboard.Bootstrap", {"domain": "kms.test"})
    with (
        webhook() as (address, seen),
        running(tmp_path, world, "--release", release, **variables(webhook_at(address))) as kms,
    ):
        status, answer = kms.rpc(*bootstrap)
        assert (status, "boot denied: no" in answer["error"]) == (400, True)
        assert kms.rpc("Onboard.GetAttestationInfo")[0] == 200  # it logs that the webhook said no more
        assert set(seen) == {f"Basic {SECRETS[-1]}"}
        require_no_secret(answer["error"], *kms.log())
    with (
        refusing_port() as port,
        running(tmp_path, world, "--release", release, **variables(webhook_at(f"127.0.0.1:{port}"))) as kms,
    ):
        answer = kms.rpc(*bootstrap)[1]
        assert f"error sending request for url (http://127.0.0.1:{port}/base/bootAuth/kms)" in answer["error"]
        require_no_secret(answer["error"], *kms.log())


def test_pccs_and_source_are_shown_without_them(world: World, tmp_path: Path) -> None:
    with refusing_port() as port:
        url = f"https://{USER}:{PASSWORD}@127.0.0.1:{port}"
        with running(tmp_path, world, **variables({"core.attestation.urls.pccs": url})) as kms:
            for method, arguments in (
                ("GetAttestationInfo", {}),
                ("Onboard", {"source_url": url, "domain": "kms.test"}),
                ("Onboard", {"source_url": f"ftp://{USER}:{PASSWORD}@host", "domain": "kms.test"}),
                ("Onboard", {"source_url": f"{USER}:{PASSWORD}@host", "domain": "kms.test"}),
            ):
                status, answer = kms.rpc(f"Onboard.{method}", arguments)
                assert status == 400
                require_no_secret(answer["error"], *kms.log())


def test_commands_print_urls_without_them() -> None:
    with webhook() as (address, _):
        url = f"http://{USER}:{PASSWORD}@{address}"
        for arguments in (("check-webhook", url), ("check-webhook", url, "--json"), ("health", "--url", url)):
            done = subprocess.run(
                [sys.executable, "-m", "dstack_emu", *arguments],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert address in done.stdout + done.stderr, done
            require_no_secret(done.stdout, done.stderr)


def control(stack: RunningStack, path: str, body: dict[str, Any] | None = None, method: str = "GET") -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(stack.services["control"] + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def test_stack_shows_a_foreign_webhook_without_them(ready_stack: RunningStack) -> None:
    with webhook() as (address, seen):
        made = control(
            ready_stack,
            "/kms",
            {"name": "secretive", "webhook": f"http://{USER}:{PASSWORD}@{address}"},
            "POST",
        )
        url = json.loads(made)["url"]
        try:
            request = urllib.request.Request(f"{url}/prpc/Onboard.Bootstrap?json", b'{"domain":"kms.test"}')
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(request, timeout=30)
            journal = control(ready_stack, "/journal")
            assert "secretive" in journal
            require_no_secret(made, refusal.value.read().decode(), journal, control(ready_stack, "/kms"))
            assert seen
        finally:
            control(ready_stack, "/kms/secretive", method="DELETE")
