"""A webhook that answers anything but a decision: the KMS names it, gives nothing, and works again once it is sane.

The webhook is a small server of this file's own, and the KMS a process of its own (`dstack-emu kms`), with the agents
and the PCCS of a stack. Texts are upstream's up to where its own parsers begin to speak.
"""

import asyncio
import contextlib
import gzip
import json
import os
import shutil
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.release import release
from dstack_emu.kms_emu.auth_api import AuthApi, WebhookAuth
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.dependencies import KmsDependencies, KmsInstruments
from dstack_emu.kms_emu.errors import NotAttestedError
from dstack_emu.kms_emu.server import KmsServer
from tests import foreign
from tests.foreign import Answer, Guest
from tests.ports import free_port
from tests.running import RunningStack, running_kms

Reply = Callable[[BufferedIOBase], None]

ALLOW = {"isAllowed": True, "reason": "", "gatewayAppId": "0xgateway"}
INFO = {
    "status": "ok",
    "kmsContractAddr": "0xcontract",
    "gatewayAppId": "0xgateway",
    "chainId": 31337,
    "appImplementation": "0ximplementation",
}
MIB = 1024 * 1024


def http(status: str, body: bytes, *headers: str) -> Reply:
    """An answer of HTTP/1.1 that announces the end of its connection, with a length unless a header says another."""
    said = any(header.startswith("Content-Length: ") for header in headers)
    length = () if said else (f"Content-Length: {len(body)}",)
    head = "\r\n".join((f"HTTP/1.1 {status}", "Connection: close", *length, *headers, "", ""))
    return lambda out: _write(out, head.encode() + body)


def ok(body: object) -> Reply:
    """A 200 with JSON."""
    return http("200 OK", json.dumps(body).encode(), "Content-Type: application/json")


def raw(body: str | bytes) -> Reply:
    """A 200 with any body."""
    return http("200 OK", body.encode() if isinstance(body, str) else body)


def endless(out: BufferedIOBase) -> None:
    """A 200 whose body never ends."""
    out.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        out.write(b"10000\r\n" + b" " * 65536 + b"\r\n")


def _write(out: BufferedIOBase, data: bytes) -> None:
    out.write(data)


class Webhook:
    """An HTTP server that keeps connections and answers its three questions (`app`, `kms`, `info`) as it is told.

    A question that it was told nothing of is answered as it should be; after a reply it was told, it hangs up.
    """

    def __init__(self) -> None:
        self.replies: dict[str, Reply] = {}
        self.port = free_port()
        self._connections: list[socket.socket] = []
        self.listen()

    @property
    def url(self) -> str:
        """What a KMS is told."""
        return f"http://127.0.0.1:{self.port}"

    def url_of(self, question: str) -> str:
        """Where a KMS asks one of the questions."""
        return self.url if question == "info" else f"{self.url}/bootAuth/{question}"

    def listen(self) -> None:
        """Listen, where it listened before."""
        webhook = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                webhook._converse(self.connection, self.rfile, self.wfile)

        class Listener(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 64

        self._listener = Listener(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Stop listening, and hang up."""
        self._listener.shutdown()
        self._listener.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def _converse(self, connection: socket.socket, source: BufferedIOBase, out: BufferedIOBase) -> None:
        self._connections.append(connection)
        with contextlib.suppress(OSError):  # the KMS may have heard enough
            while question := _read_question(source):
                reply = self.replies.get(question)
                if reply is not None:
                    reply(out)
                    return
                ok(INFO if question == "info" else ALLOW)(out)


def _read_question(source: BufferedIOBase) -> str:
    """Read one request to its end; return which question it is, or nothing at the end of the connection."""
    line = source.readline().decode()
    size = 0
    while (header := source.readline().decode()) not in ("\r\n", ""):
        name, _, value = header.partition(":")
        if name.lower() == "content-length":
            size = int(value)
    source.read(size)
    path = line.split(" ")[1] if line else ""
    return {"/": "info", "/bootAuth/kms": "kms", "/bootAuth/app": "app"}.get(path, path)


DECODE = "failed to decode response from {url}, status=200 OK, body="
SENDING = "error sending request for url ({url}): "

MISBEHAVIOURS: dict[str, tuple[Reply, str]] = {
    "500": (http("500 Internal Server Error", b"oops"), "auth api {url} returned 500 Internal Server Error: oops"),
    "500 of an allow": (
        http("500 Internal Server Error", json.dumps(ALLOW).encode()),
        "auth api {url} returned 500 Internal Server Error: " + json.dumps(ALLOW).replace("{", "{{").replace("}", "}}"),
    ),
    "500 at length": (
        http("500 Internal Server Error", b"x" * 2000),
        "auth api {url} returned 500 Internal Server Error: " + "x" * 512,
    ),
    "404": (http("404 Not Found", b"404 Not Found"), "auth api {url} returned 404 Not Found: 404 Not Found"),
    "302": (http("302 Found", b"", "Location: /allow"), "auth api {url} returned 302 Found: "),
    "307": (http("307 Temporary Redirect", b"", "Location: /"), "auth api {url} returned 307 Temporary Redirect: "),
    "no content": (http("204 No Content", b""), "failed to decode response from {url}, status=204 No Content, body=: "),
    "not JSON": (raw("<html>hi</html>"), DECODE + "<html>hi</html>: "),
    "half of it": (raw(json.dumps(ALLOW)[:-1]), DECODE),
    "more than it": (raw(json.dumps(ALLOW) + "}"), DECODE),
    "UTF-16": (raw(json.dumps(ALLOW).encode("utf-16")), DECODE),
    "not a number": (raw(json.dumps({**ALLOW, "extra": float("nan")})), DECODE),
    "empty": (raw(""), DECODE + ": "),
    "null": (raw("null"), DECODE + "null: invalid type: null, expected struct "),
    "true": (raw("true"), DECODE + "true: invalid type: "),
    "list": (ok([]), DECODE + "[]: invalid type: "),
    "deeply nested": (raw("[" * 100_000), DECODE),
    "closes": (lambda out: None, SENDING + "connection closed before the answer"),
    "closes within": (
        http("200 OK", b'{"isAllowed":true,', "Content-Length: 100"),
        SENDING + "connection closed within the answer",
    ),
    "no HTTP": (lambda out: _write(out, b"SSH-2.0-OpenSSH_9.2\r\n"), SENDING + "the answer is not HTTP"),
    "endless header": (http("200 OK", b"", "X: " + "x" * MIB), SENDING + "the answer is not HTTP"),
    "huge": (
        raw(json.dumps(ALLOW) + " " * (2 * MIB)),
        "auth api {url} answered more than 1048576 bytes",
    ),
    "endless": (endless, "auth api {url} answered more than 1048576 bytes"),
    "inflates": (
        http("200 OK", gzip.compress(json.dumps(ALLOW).encode() + b" " * (8 * MIB)), "Content-Encoding: gzip"),
        DECODE,
    ),
    "gzip": (http("200 OK", gzip.compress(json.dumps(ALLOW).encode()), "Content-Encoding: gzip"), DECODE),
}
"""What any answer can be like, and how the refusal goes on after its context; `{url}` is what was asked."""

NO_DECISION: dict[str, tuple[Reply, str]] = {
    "no isAllowed": (ok({"reason": "", "gatewayAppId": ""}), "missing field `isAllowed`"),
    "no reason": (ok({"isAllowed": True, "gatewayAppId": ""}), "missing field `reason`"),
    "no gatewayAppId": (ok({"isAllowed": True, "reason": ""}), "missing field `gatewayAppId`"),
    "isAllowed is a string": (ok({**ALLOW, "isAllowed": "true"}), "expected a boolean for `isAllowed`"),
    "isAllowed is a number": (ok({**ALLOW, "isAllowed": 1}), "expected a boolean for `isAllowed`"),
    "isAllowed is a list": (ok({**ALLOW, "isAllowed": [True]}), "expected a boolean for `isAllowed`"),
    "isAllowed is null": (ok({**ALLOW, "isAllowed": None}), "invalid type: null, expected a boolean for `isAllowed`"),
    "isAllowed twice": (raw('{"isAllowed":false,' + json.dumps(ALLOW)[1:]), "duplicate field `isAllowed`"),
    "is_allowed": (ok({"is_allowed": True, "reason": "", "gatewayAppId": ""}), "missing field `isAllowed`"),
    "half a character in the reason": (
        raw(json.dumps({**ALLOW, "reason": "\ud800"})),
        "lone surrogate in `reason`, Unicode expected",
    ),
    "half a character in gatewayAppId": (
        raw(json.dumps({**ALLOW, "gatewayAppId": "x\udfff"})),
        "lone surrogate in `gatewayAppId`, Unicode expected",
    ),
    "half a character in a name": (
        raw(json.dumps({**ALLOW, "\ud800": 1})),
        "lone surrogate in the name of a member, Unicode expected",
    ),
    "reason is null": (ok({**ALLOW, "reason": None}), "invalid type: null, expected a string for `reason`"),
    "gatewayAppId is a number": (ok({**ALLOW, "gatewayAppId": 1}), "expected a string for `gatewayAppId`"),
}
"""JSON objects that are no decision, and how the refusal ends."""

SELF_CHECK = "KMS self authorization failed: Failed to call self KMS auth check: "


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    """A webhook that tests tell how to misbehave; it is sane again for the next one."""
    server = Webhook()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _sane(webhook: Webhook) -> Iterator[None]:
    yield
    webhook.replies.clear()


def kms_toml(folder: Path, stack: RunningStack, webhook_url: str) -> Path:
    """Write the configuration of a KMS on a free port, its keys in `folder`/certs."""
    certs = folder / "certs"
    path = folder / "kms.toml"
    path.write_text(
        f"""
[rpc]
address = "127.0.0.1"
port = 0
tls = {{ key = "{certs}/rpc.key", certs = "{certs}/rpc.crt", mutual = {{ ca_certs = "{certs}/tmp-ca.crt" }} }}
[core]
cert_dir = "{certs}"
[core.image]
verify = false
[core.attestation]
insecure_allow_external_trust_anchors = true
urls = {{ pccs = "{stack.services["pccs"]}" }}
root_ca = {{ tdx = "{stack.description["root_ca"]}" }}
[core.auth_api]
type = "webhook"
webhook = {{ url = "{webhook_url}" }}
[core.onboard]
address = "127.0.0.1"
port = 0
"""
    )
    return path


def copied_keys(folder: Path, stack: RunningStack) -> None:
    """Give a KMS the keys of the stack's."""
    shutil.copytree(Path(stack.description["kms_ca"]).parent, folder / "certs")


@pytest.fixture(scope="module")
def guest(ready_stack: RunningStack, webhook: Webhook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest before a KMS that asks this file's webhook; its agent may be taken for an app or for another KMS."""
    folder = tmp_path_factory.mktemp("kms")
    copied_keys(folder, ready_stack)
    with running_kms(kms_toml(folder, ready_stack, webhook.url), ready_stack.services["agent-src"]) as url:
        yield Guest.of(url, ready_stack.description["app"]["dstack_sock"])


def only_refuses(answer: Answer) -> str:
    """The text of a refusal that has nothing else in it; no text of a key either."""
    assert "PRIVATE KEY" not in answer.error
    return answer.error


@pytest.mark.parametrize("name", [*MISBEHAVIOURS, *NO_DECISION])
def test_getappkey_refused_without_a_decision(webhook: Webhook, guest: Guest, name: str) -> None:
    reply, said = {**MISBEHAVIOURS, **NO_DECISION}[name]
    with foreign.kms(guest.kms_url, identity=guest.identity(), root_ca=guest.root_ca) as connection:
        for question, context in (("kms", SELF_CHECK), ("app", "App not allowed: ")):
            url = webhook.url_of(question)
            webhook.replies[question] = reply
            refusal = only_refuses(connection.call("GetAppKey", api_version=1))
            assert refusal.startswith(context)
            text = refusal.removeprefix(context)
            if name in NO_DECISION:
                assert text.startswith(DECODE.format(url=url))
                assert text.endswith(said)
            else:
                assert text.startswith(said.format(url=url))
            webhook.replies.clear()
            assert connection.call("GetAppKey", api_version=1).value["gateway_app_id"] == "0xgateway"


@pytest.mark.parametrize("name", ["500", "302", "not JSON", "null", "isAllowed is a string", "closes", "endless"])
@pytest.mark.parametrize("method", ["GetTempCaCert", "GetKmsKey", "GetAppEnvEncryptPubKey", "SignCert"])
def test_trusted_rpc_refused_without_a_decision(webhook: Webhook, guest: Guest, method: str, name: str) -> None:
    key = foreign.new_key()
    evidence = foreign.attest(guest.agent, foreign.spki_of(key))
    arguments: dict[str, Any] = {
        "GetAppEnvEncryptPubKey": {"app_id": "11" * 20},
        "SignCert": foreign.signing_request(key, evidence, "webhook.example.test"),
    }.get(method, {})
    reply, _ = {**MISBEHAVIOURS, **NO_DECISION}[name]
    with foreign.kms(guest.kms_url, identity=guest.temp_ca.issue(key, evidence)) as connection:
        webhook.replies["kms"] = reply
        refusal = only_refuses(connection.call(method, **arguments))
        assert refusal.startswith(SELF_CHECK)
        assert webhook.url_of("kms") in refusal
        webhook.replies.clear()
        assert connection.call(method, **arguments).status == 200
        if method == "SignCert":
            webhook.replies["app"] = reply
            assert webhook.url_of("app") in only_refuses(connection.call(method, **arguments))
            webhook.replies.clear()
            assert connection.call(method, **arguments).status == 200


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_getmeta_refused_without_an_answer_of_the_webhook(webhook: Webhook, guest: Guest, name: str) -> None:
    reply, _ = MISBEHAVIOURS[name]
    with foreign.kms(guest.kms_url) as connection:
        webhook.replies["info"] = reply
        assert webhook.url in only_refuses(connection.call("GetMeta"))
        assert connection.get("/health").status == 200
        webhook.replies.clear()
        meta = connection.call("GetMeta").value
    assert (meta["chain_id"], meta["gateway_app_id"]) == (31337, "0xgateway")


@pytest.mark.parametrize("key", ["status", "kmsContractAddr", "gatewayAppId", "chainId", "appImplementation"])
def test_getmeta_refused_with_an_incomplete_answer(webhook: Webhook, guest: Guest, key: str) -> None:
    with foreign.kms(guest.kms_url) as connection:
        webhook.replies["info"] = ok({name: value for name, value in INFO.items() if name != key})
        assert only_refuses(connection.call("GetMeta")).endswith(f"missing field `{key}`")
        webhook.replies["info"] = ok({**INFO, key: [INFO[key]]})
        assert f"for `{key}`" in only_refuses(connection.call("GetMeta"))
        webhook.replies.clear()
        assert connection.call("GetMeta").value["chain_id"] == 31337


def test_bootstrap_refused_without_a_decision(ready_stack: RunningStack, webhook: Webhook, tmp_path: Path) -> None:
    config = kms_toml(tmp_path, ready_stack, webhook.url)
    context = "KMS is not allowed to bootstrap: failed to call KMS auth check: "
    with running_kms(config, ready_stack.services["agent-dst"]) as url, foreign.kms(url) as fresh:
        for reply, _ in {**MISBEHAVIOURS, **NO_DECISION}.values():
            webhook.replies["kms"] = reply
            refusal = only_refuses(fresh.call("Bootstrap", domain="kms.test"))
            assert refusal.startswith(context)
            assert webhook.url_of("kms") in refusal
            assert not list((tmp_path / "certs").iterdir())
        webhook.replies["info"] = MISBEHAVIOURS["500"][0]
        assert fresh.call("GetAttestationInfo").value["kms_contract_address"] == ""
        webhook.replies.clear()
        assert fresh.call("GetAttestationInfo").value["kms_contract_address"] == "0xcontract"
        assert fresh.call("Bootstrap", domain="kms.test").status == 200


def test_onboarding_refused_without_a_decision(
    ready_stack: RunningStack, webhook: Webhook, guest: Guest, tmp_path: Path
) -> None:
    """The receiver asks a webhook of its own about the source, the source asks this file's about both."""
    own = Webhook()
    config = kms_toml(tmp_path, ready_stack, own.url)
    question = {"source_url": guest.kms_url, "domain": "kms.test"}
    context = "Failed to onboard: Source KMS is not allowed for onboarding: failed to call KMS auth check: "
    try:
        with running_kms(config, ready_stack.services["agent-dst"]) as url, foreign.kms(url) as fresh:
            for name in ("500", "302", "null", "closes", "isAllowed is a number"):
                own.replies["kms"] = {**MISBEHAVIOURS, **NO_DECISION}[name][0]
                refusal = only_refuses(fresh.call("Onboard", **question))
                assert refusal.startswith(context)
                assert own.url_of("kms") in refusal
                assert not list((tmp_path / "certs").iterdir())
            own.replies.clear()
            webhook.replies["kms"] = MISBEHAVIOURS["500"][0]
            refusal = only_refuses(fresh.call("Onboard", **question))
            assert SELF_CHECK in refusal
            assert webhook.url_of("kms") in refusal
            webhook.replies.clear()
            assert fresh.call("Onboard", **question).status == 200
    finally:
        own.close()


def test_webhook_that_is_down_is_named_and_found_again(webhook: Webhook, guest: Guest) -> None:
    with foreign.kms(guest.kms_url, identity=guest.identity()) as connection:
        assert connection.call("GetAppKey", api_version=1).status == 200
        webhook.close()
        try:
            refusal = only_refuses(connection.call("GetAppKey", api_version=1))
            assert refusal == f"{SELF_CHECK}{SENDING}Connection refused".format(url=webhook.url_of("kms"))
        finally:
            webhook.listen()
        assert connection.call("GetAppKey", api_version=1).status == 200


@pytest.mark.parametrize("says", ["nothing", "a little, and a little more"])
async def test_webhook_that_hangs_is_given_up(
    ready_stack: RunningStack, webhook: Webhook, tmp_path: Path, says: str
) -> None:
    released = threading.Event()

    def hang(out: BufferedIOBase) -> None:
        if says != "nothing":
            out.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not released.wait(0.02):
            if says != "nothing":
                out.write(b"1\r\n \r\n")

    copied_keys(tmp_path, ready_stack)
    kms = KmsServer(
        KmsConfig.load(kms_toml(tmp_path, ready_stack, webhook.url)),
        ready_stack.services["agent-src"],
        entropy=os.urandom,
        clock=lambda: int(time.time()),
        auth=WebhookAuth(webhook.url, timeout=1.0),
    )
    await kms.start()
    try:
        guest = await asyncio.to_thread(Guest.of, kms.url, ready_stack.services["app"])
        identity = await asyncio.to_thread(guest.identity)
        for question, context in (("kms", SELF_CHECK), ("app", "App not allowed: ")):
            webhook.replies[question] = hang
            answer = await asyncio.to_thread(guest.get_app_key, identity)
            refusal = SENDING.format(url=webhook.url_of(question)) + "no answer within 1 s"
            assert only_refuses(answer) == context + refusal
            webhook.replies.clear()
            assert (await asyncio.to_thread(guest.get_app_key, identity)).status == 200
    finally:
        released.set()
        await kms.stop()


def test_silent_webhook_is_given_up_after_the_configured_time(
    ready_stack: RunningStack, webhook: Webhook, tmp_path: Path
) -> None:
    released = threading.Event()
    copied_keys(tmp_path, ready_stack)
    path = kms_toml(tmp_path, ready_stack, webhook.url)
    path.write_text(path.read_text().replace(f'"{webhook.url}"', f'"{webhook.url}", timeout = "1s"'))
    webhook.replies["info"] = lambda out: _wait(released)
    try:
        with running_kms(path, ready_stack.services["agent-src"]) as url, foreign.kms(url) as connection:
            refusal = connection.call("GetMeta").error
            webhook.replies.clear()
            assert connection.call("GetMeta").status == 200
        assert refusal == SENDING.format(url=webhook.url) + "no answer within 1 s"
    finally:
        released.set()


@pytest.mark.parametrize(
    ("field", "size", "said"),
    [
        ("compose_hash", 31, "compose_hash must be 32 bytes"),
        ("compose_hash", 0, "compose_hash must be 32 bytes"),
        ("instance_id", 19, "instance_id must be 20 bytes or empty"),
        ("instance_id", 32, "instance_id must be 20 bytes or empty"),
    ],
)
async def test_identity_of_another_width_is_not_asked_about_in_0_6(field: str, size: int, said: str) -> None:
    changed: dict[str, Any] = {field: bytes(size)}
    odd = replace(BOOT_INFO, **changed)
    old, new = (_auth_of(name) for name in ("0.5", "0.6"))
    assert (await old.decide(odd, is_kms=False)).is_allowed
    with pytest.raises(NotAttestedError, match=f"^{said}$"):
        await new.decide(odd, is_kms=False)
    assert (await new.decide(BOOT_INFO, is_kms=False)).is_allowed


async def test_app_without_an_instance_id_is_asked_about_in_0_6() -> None:
    auth = _auth_of("0.6")
    assert (await auth.decide(BOOT_INFO, is_kms=False)).is_allowed
    assert (await auth.decide(replace(BOOT_INFO, instance_id=b""), is_kms=True)).is_allowed


BOOT_INFO = BootInfo(
    mr_aggregated=b"a" * 32,
    os_image_hash=b"o" * 32,
    mr_system=b"s" * 32,
    app_id=b"i" * 20,
    compose_hash=b"c" * 32,
    instance_id=b"n" * 20,
    device_id=b"d" * 32,
    key_provider_info=b"",
    tcb_status="UpToDate",
    advisory_ids=(),
)


def _wait(event: threading.Event) -> None:
    event.wait(60)


def _auth_of(release_name: str) -> AuthApi:
    """What decides for a KMS of a release whose auth_api is `dev`, which allows everyone."""
    config = KmsConfig.from_document({"core": {"auth_api": {"type": "dev"}}}, "kms.toml")
    options: dict[str, Any] = {"entropy": os.urandom, "clock": lambda: 0, "issue_clock": None, "auth": None}
    instruments, of = KmsInstruments(), release(release_name)
    return KmsDependencies.build(config, "unix:/nowhere", **options, instruments=instruments, release=of).auth
