"""A client of a VMM, which asks with the requests of vmm-cli.py of 312dc605, by curl."""

import hashlib
import json
import os
import subprocess
from typing import Any, TypeVar

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
    """Asks a VMM over HTTP, as vmm-cli.py does, with curl."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, *arguments: str) -> tuple[int, bytes]:
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
        command = ["curl", "-sS", "--max-time", PATIENCE, "-w", "\n%{http_code}", "--data-binary", "@-"]
        command += ["-H", "Content-Type: application/octet-stream", f"{self.url}/prpc/{method}"]
        given = request.SerializeToString()
        out = subprocess.run(command, input=given, capture_output=True, timeout=100, check=True).stdout
        body, _, status = out.rpartition(b"\n")
        return int(status), body

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
        content = ("-H", "Content-Type: application/json", "-d", json.dumps(body))
        status, answer = self.ask(f"/prpc/{method}?json", *content)
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
            pass


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
