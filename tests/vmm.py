"""A client of a VMM, which asks with the requests of vmm-cli.py of 312dc605, by http.client and curl."""

import hashlib
import http.client
import json
import os
import subprocess
from contextlib import closing
from posixpath import normpath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import Message

from dstack_emu.attest.release import DEFAULT
from dstack_emu.testing import LiveStack

M = TypeVar("M", bound=Message)
COMPOSE = json.dumps(
    {
        "manifest_version": 2,
        "name": "app1",
        "runner": "docker-compose",
        "docker_compose_file": "services: {}",
        "kms_enabled": True,
        "gateway_enabled": False,
        "allowed_envs": [],
        "secure_time": False,
    },
    indent=4,
    ensure_ascii=False,
)
"""As vmm-cli.py writes it."""

APP_ID = hashlib.sha256(COMPOSE.encode()).hexdigest()[:40]
IMAGE = f"dstack-emu-{DEFAULT.version}"
PATIENCE = "90"
"""How long an answer may take, in seconds: containers of a machine that is stopped may need long on a busy engine."""


class VmmClient:
    """Asks a VMM over HTTP: RPCs with http.client, which costs a fraction of a process, and all else with curl."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, *arguments: str) -> tuple[int, bytes]:
        """Ask with curl and its arguments."""
        command = [
            "curl",
            "-sS",
            "--max-time",
            PATIENCE,
            "-o",
            "-",
            "-w",
            "\n%{http_code}",
            *arguments,
            self.url + path,
        ]
        out = subprocess.run(command, capture_output=True, timeout=100, check=True).stdout
        body, _, status = out.rpartition(b"\n")
        return int(status), body

    def send(self, method: str, request: Message) -> tuple[int, bytes]:
        """Call one RPC in protobuf."""
        return self.post(f"/prpc/{method}", request.SerializeToString(), "application/octet-stream")

    def post(self, path: str, content: bytes, content_type: str) -> tuple[int, bytes]:
        """Ask over a connection of its own; `..` in the path is resolved, as curl does."""
        where = urlsplit(self.url)
        with closing(http.client.HTTPConnection(where.hostname or "", where.port, timeout=int(PATIENCE))) as connection:
            connection.request("POST", where.path + normpath(path), content, {"Content-Type": content_type})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def sent(self, method: str, request: Message, answer: type[M]) -> M:
        """Call one RPC in protobuf that succeeds."""
        status, body = self.send(method, request)
        assert status == 200, body
        return answer.FromString(body)

    def rpc(self, method: str, **body: Any) -> Any:
        """Call one RPC in JSON that succeeds."""
        status, answer = self.call(method, **body)
        assert status == 200, answer
        return answer

    def call(self, method: str, **body: Any) -> tuple[int, Any]:
        status, answer = self.post(f"/prpc/{method}?json", json.dumps(body).encode(), "application/json")
        return status, json.loads(answer)

    def refused(self, method: str, **body: Any) -> str:
        """Call one RPC in JSON that is refused with 400; return the text."""
        status, answer = self.call(method, **body)
        assert status == 400, answer
        assert list(answer) == ["error"]
        text: str = answer["error"]
        return text

    def deploy(self, **changed: Any) -> str:
        """Create a machine; return its id."""
        vm_id: str = self.rpc("CreateVm", **configuration(**changed))["id"]
        return vm_id

    def info(self, vm_id: str) -> Any:
        return self.rpc("GetInfo", id=vm_id)["info"]

    def booted(self, vm_id: str) -> Any:
        """Follow a machine's log until its last boot has ended; return its info."""
        follow = ["curl", "-sSN", "--max-time", PATIENCE, f"{self.url}/logs?id={vm_id}&follow=true"]
        with subprocess.Popen(follow, stdout=subprocess.PIPE) as follower:
            assert follower.stdout is not None
            ends = (line for line in follower.stdout if line.startswith((b"[dstack] done", b"error: ")))
            assert next(ends, None)
            follower.kill()
        return self.info(vm_id)

    def gone(self, vm_id: str) -> None:
        """Remove a machine, and wait until it is gone."""
        assert self.rpc("RemoveVm", id=vm_id) is None
        while self.rpc("GetInfo", id=vm_id)["found"]:
            self.ask("/prpc/Version")  # the start of a process, which leaves the VMM time to remove it


def configuration(**changed: Any) -> dict[str, Any]:
    """Return the request of `vmm-cli.py deploy`."""
    return {
        "name": "app1",
        "image": IMAGE,
        "compose_file": COMPOSE,
        "vcpu": 1,
        "memory": 1024,
        "disk_size": 20,
        "app_id": None,
        "user_config": "",
        "ports": [],
        "hugepages": False,
        "pin_numa": False,
        "stopped": False,
        "no_tee": False,
        "swap_size": 0,
    } | changed


def app_id_of(compose_file: str) -> str:
    """Return the id that an app without one gets (hex)."""
    return hashlib.sha256(compose_file.encode()).hexdigest()[:40]


def sealed(variables: dict[str, str], public_key: bytes) -> str:
    """Encrypt an environment as vmm-cli.py does (hex), with the key (32 bytes) that a KMS names for the app."""
    text = json.dumps({"env": [{"key": name, "value": value} for name, value in variables.items()]}).encode()
    ephemeral, iv = X25519PrivateKey.generate(), os.urandom(12)
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public_key))
    return (ephemeral.public_key().public_bytes_raw() + iv + AESGCM(shared).encrypt(iv, text, None)).hex()


def allow(stack: LiveStack, compose_file: str = COMPOSE) -> None:
    """Allow an app in the policy of the source KMS."""
    policy = stack.control.policy("src")
    compose_hash = hashlib.sha256(compose_file.encode()).hexdigest()
    app = {"composeHashes": [f"0x{compose_hash}"], "devices": [], "allowAnyDevice": True}
    policy["apps"][f"0x{app_id_of(compose_file)}"] = app
    stack.control.set_policy("src", policy)
