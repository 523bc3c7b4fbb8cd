"""Who sets up a KMS whose onboard phase or whose source wants a token: `setup`, `runbook` and a stack's control.

The KMS are processes of their own beside a stack, or that stack's; a program that repeats what it was sent is this
file's. No token is in an error, a log, a journal or an archive.
"""

import base64
import json
import re
import tarfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from dstack_emu.transport.secrets import REDACTED, Secrets
from tests.commands import run_command, usage_error
from tests.kms_files import write_kms_toml
from tests.running import RunningStack, running_kms

ONBOARD_TOKEN = 'the/onboard+token "of" both KMS'
SOURCE_TOKEN = "the-token-of-the-sources-admin-listener"
WRONG = "another-token"
VARIABLES = {"DSTACK_KMS_ONBOARD_TOKEN": ONBOARD_TOKEN, "DSTACK_KMS_SOURCE_TOKEN": SOURCE_TOKEN}


@contextmanager
def guarded(stack: RunningStack, folder: Path, release: str = "0.6") -> Iterator[dict[str, Any]]:
    """Two separate KMS beside a fresh stack, each with a token; the source's keys are on its admin listener."""
    described: dict[str, Any] = {**stack.description, "services": dict(stack.services), "grpc": {}}
    with ExitStack() as stack_of_kms:
        for side in ("src", "dst"):
            (folder / side).mkdir()
            path = write_kms_toml(folder / side, stack, webhook=stack.services[f"auth-{side}"])
            certs = folder / side / "certs"
            more = f"auth_token = {json.dumps(ONBOARD_TOKEN)}\npublic_key_handover = {str(side == 'dst').lower()}\n"
            more += "[emulator.grpc]\nenabled = true\nport = 0\nmtls_port = 0\nadmin_port = 0\n"
            if side == "src":
                more += f'[core.admin]\nenabled = true\nport = 0\nauth_token = "{SOURCE_TOKEN}"\n[core.admin.tls]\n'
                more += f'key = "{certs}/rpc.key"\ncerts = "{certs}/rpc.crt"\n'
            path.write_text(path.read_text() + more)
            said: dict[str, Any] = {}
            running = running_kms(path, stack.services[f"agent-{side}"], said, "--release", release)
            described["services"][f"kms-{side}"] = stack_of_kms.enter_context(running)
            for key, name in (("port", "grpc"), ("mtls_port", "grpc-mtls")):
                described["grpc"][f"kms-{side}-{name}"] = said["grpc"][key]
            if side == "src":
                described["source_url"] = f"{said['admin_url']}/prpc"
        yield described


def has_a_secret(text: str | bytes) -> bool:
    """Tell whether a text contains a token in any form in which it was sent."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    spelled = [form for token in (ONBOARD_TOKEN, SOURCE_TOKEN) for form in forms(token)]
    return any(form in text for form in spelled)


def forms(token: str) -> list[str]:
    """A token as it is, in JSON, in JSON within JSON, percent-encoded, and in Basic as user or as password."""
    escaped = json.dumps(token)[1:-1]
    basic = [base64.b64encode(pair.encode()).decode() for pair in (f"{token}:", f":{token}", f"u:{token}", token)]
    return [token, escaped, json.dumps(escaped)[1:-1], quote(token, safe=""), quote(token), quote_plus(token), *basic]


# ---- setup


def test_guarded_kms_are_set_up_with_their_tokens(fresh_stack: RunningStack, tmp_path: Path) -> None:
    with guarded(fresh_stack, tmp_path) as described:
        urls, policies = described["services"], str(fresh_stack.policies["src"].parent)
        words = ["setup", "--kms-src", urls["kms-src"], "--kms-dst", urls["kms-dst"], "--policies", policies]
        words += ["--source-url", described["source_url"].removesuffix("/prpc")]
        said = (
            "Error: kms-src: GetAttestationInfo: status 401: the KMS expects the token of its core.onboard.auth_token"
        )
        for more, last in (
            ([], f"{said}, and none was given"),
            (["--onboard-token", WRONG], f"{said}, and another token was given"),
            (["--onboard-token", ONBOARD_TOKEN, "--source-token", WRONG], "status=401 Unauthorized"),
        ):
            done = run_command(*words, *more)
            assert done.returncode == 2
            assert last in done.stderr.decode().splitlines()[-1]
            assert not has_a_secret(done.stderr + done.stdout)
            assert WRONG not in done.stderr.decode()
        done = run_command(*words, environment=VARIABLES)
        assert done.returncode == 0, done.stderr
        assert not has_a_secret(done.stderr + done.stdout)
    certs = [tmp_path / side / "certs" / "root-k256.key" for side in ("src", "dst")]
    assert certs[0].read_bytes() == certs[1].read_bytes()


@pytest.mark.parametrize(("command", "option"), [("setup", "--onboard-token"), ("runbook", "--source-token")])
def test_token_that_no_header_can_hold_is_refused_without_showing_it(command: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{}")
    needed = {
        "setup": ["--kms-src", "http://127.0.0.1:9", "--kms-dst", "http://127.0.0.1:9", "--policies", str(tmp_path)],
        "runbook": ["--against", str(tmp_path / "stack.json")],
    }
    said = usage_error(command, *needed[command], option, "a\nb-secret")
    assert said == f"{option}: printable ASCII characters expected, got others"


# ---- the runbook


@pytest.mark.parametrize("transport", ["prpc", "grpc"])
def test_runbook_judges_guarded_kms_with_their_tokens(
    fresh_stack: RunningStack, tmp_path: Path, transport: str
) -> None:
    with guarded(fresh_stack, tmp_path) as described:
        (tmp_path / "stack.json").write_text(json.dumps(described))
        archive = tmp_path / "evidence.tar.gz"
        words = ["runbook", "--against", str(tmp_path / "stack.json"), "--transport", transport, "--wait", "20"]
        for given in ([], ["--onboard-token", WRONG]):
            done = run_command(*words, *given)
            shown = {"prpc": "401", "grpc": "UNAUTHENTICATED"}[transport]
            said = f"answered {shown}: the token of its core.onboard.auth_token is expected; give it by --onboard-token"
            assert (done.returncode, said in done.stderr.decode()) == (2, True), done.stderr
        done = run_command(*words, "--json", "--evidence", str(archive), environment=VARIABLES)
    failed = [s for case in json.loads(done.stdout)["cases"] for s in case["steps"] if s["ok"] is False]
    assert not [(step["name"], step["got"], step["expected"]) for step in failed]
    assert done.returncode == 0
    assert f"source_token={REDACTED}" in done.stdout.decode()
    assert not has_a_secret(done.stdout + done.stderr)
    assert not any(has_a_secret(text) for text in contents(archive))


def contents(archive: Path) -> list[bytes]:
    """The files of an archive."""
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member) for member in tar.getmembers()]
        return [file.read() for file in files if file is not None]


KEY = "5e" * 32


class Repeating(BaseHTTPRequestHandler):
    """A server in the place of a KMS: it repeats what it is sent, and an earlier private key, in many forms."""

    def do_POST(self) -> None:
        """Answer with an error, or at first with what the runbook needs to go on."""
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        sent = [form for each in (token, json.loads(body or "{}").get("source_token", "")) for form in forms(each)]
        repeated = {"error": f"{body} {json.dumps({'head': dict(self.headers)})} {' '.join(sent)} {KEY}"}
        if "GetAttestationInfo" in self.path:
            measured = dict.fromkeys(("mr_aggregated", "os_image_hash", "device_id"), "ab" * 32)
            self._answer(200, {**measured, "tee_variant": "dstack-tdx", "ppid": "", "site_name": " ".join(sent)})
        elif "Bootstrap" in self.path:
            ok = {
                "ca_pubkey": "aa",
                "k256_pubkey": "bb",
                "attestation": "cc",
                "ca_key": KEY,
                **dict.fromkeys(sent, KEY),
            }
            self._answer(*((200, ok) if self.server.is_willing else (400, repeated)))  # type: ignore[attr-defined]
            self.server.is_willing = True  # type: ignore[attr-defined]
        else:
            self._answer(400, repeated)

    def do_GET(self) -> None:
        """Repeat the head."""
        self._answer(400, {"error": str(self.headers)})

    def _answer(self, status: int, document: Any) -> None:
        answer = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def test_archive_has_no_secret_that_a_foreign_kms_repeats(fresh_stack: RunningStack, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Repeating) as server:
        server.is_willing = False  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        services = {**fresh_stack.services, "kms-src": url, "kms-dst": url}
        (tmp_path / "stack.json").write_text(json.dumps({**fresh_stack.description, "services": services}))
        archive = tmp_path / "evidence.tar.gz"
        words = ["runbook", "--against", str(tmp_path / "stack.json"), "--wait", "0", "--evidence", str(archive)]
        done = run_command(*words, environment=VARIABLES)
        server.shutdown()
        thread.join()
    assert done.returncode == 1, done.stderr
    kept = contents(archive)
    assert sum(text.count(REDACTED.encode()) for text in kept) > 20, "the KMS was asked, and repeated it"
    assert not any(map(has_a_secret, (*kept, done.stdout, done.stderr)))
    assert not any(KEY.encode() in text for text in kept)


def test_what_is_no_secret_stays_as_it_is() -> None:
    secrets = Secrets(ONBOARD_TOKEN, "")
    plain = f'{{"mr": "{"ab" * 32}", "words": "the onboard token of both KMS"}}'
    assert secrets.redact(plain) == plain
    assert [secrets.redact(form) for form in forms(ONBOARD_TOKEN)][:6] == [REDACTED] * 6


# ---- control


def control(stack: RunningStack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST to the control API."""
    url, kind = stack.services["control"] + path, {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), kind), timeout=30) as answer:
        parsed: dict[str, Any] = json.load(answer)
        return parsed


def refusal(stack: RunningStack, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """POST what is refused; return status and error."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        control(stack, path, body)
    return refused.value.code, json.load(refused.value)["error"]


def test_kms_of_a_stack_is_onboarded_with_both_tokens(ready_stack: RunningStack) -> None:
    stack = ready_stack
    certs = Path(stack.description["state"], "kms-keeper", "certs")
    admin = {"enabled": True, "port": 0, "auth_token": SOURCE_TOKEN}
    admin["tls"] = {"key": str(certs / "rpc.key"), "certs": str(certs / "rpc.crt")}
    guard = {"auth_token": ONBOARD_TOKEN}
    keeper = {"admin": admin, "onboard": {**guard, "public_key_handover": False}}
    for name, settings in (("keeper", keeper), ("taker", {"onboard": guard})):
        control(stack, "/kms", {"name": name, "webhook": "src", "settings": settings})
        control(stack, "/policies/src/allow", {"guest": f"kms-{name}"})
    control(stack, "/kms/keeper/onboard", {"source": "src"})
    path = "/kms/taker/onboard"
    disabled, unauthorized = "use the admin listener", "status=401 Unauthorized"
    for body, status, said in (
        (
            {"source": "keeper", "onboard_token": WRONG},
            403,
            "kms-taker: Onboard: status 401: the KMS expects the token",
        ),
        ({"source": "keeper"}, 403, disabled),
        ({"source": "keeper", "source_token": WRONG}, 403, unauthorized),
        ({"source": "src", "source_token": SOURCE_TOKEN}, 400, "source_token: kms-src has no admin listener"),
        ({"source": "keeper", "source_token": f"{SOURCE_TOKEN}\n"}, 400, "token: printable ASCII characters expected"),
    ):
        code, error = refusal(stack, path, body)
        assert (code, said in error, has_a_secret(error), WRONG in error) == (status, True, False, False), error
    assert control(stack, path, {"source": "keeper", "source_token": SOURCE_TOKEN})["phase"] == "runtime"
    with urllib.request.urlopen(f"{stack.services['control']}/journal", timeout=30) as answer:
        journal = answer.read()
    assert b"Onboard" in journal
    assert not has_a_secret(journal)
    assert not has_a_secret(stack.said())
    health = json.loads(urllib.request.urlopen(f"{stack.services['control']}/stack/health", timeout=30).read())
    assert not any(problem for problem in re.findall("answered 401", json.dumps(health)))
    stack.reset()
