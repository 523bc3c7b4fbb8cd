"""Machines of a VMM whose containers run on the engine of this host: deployed by its RPCs, seen with `docker`.

They need Docker with Compose, so the suite runs them only where DSTACK_EMU_CONTAINERS is set, as `.ci/run` does.
BASE_IMAGE, BUILD_NETWORK and PIP_CA_FILE are those of docker-compose.yaml.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dstack_emu.testing import LiveStack
from tests.test_containers_app import docker, image
from tests.vmm import VmmClient

__all__ = ["image"]

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DSTACK_EMU_CONTAINERS"), reason="DSTACK_EMU_CONTAINERS is not set"),
    pytest.mark.timeout(120),
]

KEY = "from dstack_sdk import DstackClient; print('key', DstackClient().get_key('wallet').key, flush=True)"
ENVIRONMENT = (
    "import os; print('env', sorted(n + '=' + v for n, v in os.environ.items() if n.startswith('APP_')), flush=True)"
)
KINDS = ("container", "network", "volume", "image")


def app_compose(services: dict[str, Any], *, volumes: tuple[str, ...] = (), **members: Any) -> str:
    """Return an app-compose.json, as vmm-cli.py writes it."""
    compose = {"services": services, "volumes": {name: {} for name in volumes}}
    document = {
        "manifest_version": 2,
        "name": "app1",
        "runner": "docker-compose",
        "docker_compose_file": json.dumps(compose),
        "kms_enabled": True,
        "gateway_enabled": False,
        "allowed_envs": ["APP_TOKEN"],
        "secure_time": False,
    }
    return json.dumps(document | members, indent=4)


def app_id_of(compose_file: str) -> str:
    return hashlib.sha256(compose_file.encode()).hexdigest()[:40]


class Engine:
    """What is on the engine, by `docker`."""

    def __init__(self, stack: LiveStack) -> None:
        self.label = f"dstack-emu.vmm={stack.description['state']}/vms"

    def made(self) -> dict[str, list[str]]:
        """What the VMM's machines have there now."""
        listed = {}
        for kind in KINDS:
            every = ("--all",) if kind == "container" else ()
            listed[kind] = docker(kind, "ls", "--quiet", *every, "--filter", f"label={self.label}").split()
        return listed


class Deployer:
    """Deploys apps on a VMM, and encrypts their environments as vmm-cli.py does."""

    def __init__(self, stack: LiveStack) -> None:
        self.stack, self.vmm, self.engine = stack, VmmClient(stack.services["vmm"]), Engine(stack)

    def allow(self, compose_file: str) -> None:
        policy = self.stack.control.policy("src")
        compose_hash = hashlib.sha256(compose_file.encode()).hexdigest()
        app = {"composeHashes": [f"0x{compose_hash}"], "devices": [], "allowAnyDevice": True}
        policy["apps"][f"0x{app_id_of(compose_file)}"] = app
        self.stack.control.set_policy("src", policy)

    def deploy(self, compose_file: str, **changed: Any) -> str:
        """Create a machine of an app that is allowed."""
        self.allow(compose_file)
        return self.vmm.deploy(compose_file=compose_file, **changed)

    def encrypted(self, compose_file: str, variables: dict[str, str]) -> str:
        """Encrypt variables with the key that the KMS names for the app."""
        content = ("-H", "Content-Type: application/json", "-d", json.dumps({"app_id": app_id_of(compose_file)}))
        kms = self.stack.services["kms-src"]
        url = f"{kms}/prpc/KMS.GetAppEnvEncryptPubKey?json"
        command = ["curl", "-sS", "--insecure", "--max-time", "20", *content, url]
        answer = json.loads(subprocess.run(command, capture_output=True, timeout=30, check=True).stdout)
        return sealed(variables, bytes.fromhex(answer["public_key"]))

    def serial(self, vm_id: str, channel: str = "serial") -> str:
        return self.vmm.ask(f"/logs?id={vm_id}&ch={channel}")[1].decode()

    def line(self, vm_id: str, beginning: str, channel: str = "stdout") -> str:
        """Wait for a line that a container prints, and return the rest of it."""
        while True:
            found = re.findall(rf"{beginning} (.*)$", self.serial(vm_id, channel), re.MULTILINE)
            if found:
                return str(found[-1])


def sealed(variables: dict[str, str], public_key: bytes) -> str:
    text = json.dumps({"env": [{"key": name, "value": value} for name, value in variables.items()]}).encode()
    ephemeral, iv = X25519PrivateKey.generate(), os.urandom(12)
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public_key))
    return (ephemeral.public_key().public_bytes_raw() + iv + AESGCM(shared).encrypt(iv, text, None)).hex()


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    with LiveStack(vmm=True, vmm_workload="docker") as live:
        yield live


@pytest.fixture
def deployer(stack: LiveStack) -> Iterator[Deployer]:
    """A deployer; every machine is removed afterwards, and nothing of it is left on the engine."""
    made = Deployer(stack)
    yield made
    for vm in made.vmm.rpc("Status")["vms"]:
        made.vmm.gone(vm["id"])
    assert made.engine.made() == {kind: [] for kind in KINDS}
    assert "dstack-emu-host" not in docker("network", "ls", "--format", "{{.Name}}").split()


def test_app_gets_key_and_allowed_variables_as_another_user(deployer: Deployer, image: str) -> None:
    service = {
        "image": image,
        "user": "4711:4711",
        "command": ["python3", "-c", f"{KEY}\n{ENVIRONMENT}\nimport time; time.sleep(600)"],
        "init": True,
        "environment": {"APP_TOKEN": "${APP_TOKEN}", "APP_OTHER": "${APP_OTHER:-unset}"},
        "volumes": ["/var/run/dstack.sock:/var/run/dstack.sock"],
    }
    compose_file = app_compose({"wallet": service})
    token = 'it costs $5 "or" so'
    blob = deployer.encrypted(compose_file, {"APP_TOKEN": token, "APP_OTHER": "dropped"})
    vm_id = deployer.deploy(compose_file, encrypted_env=blob)
    info = deployer.vmm.booted(vm_id)
    assert (info["boot_progress"], info["boot_error"]) == ("done", "")
    steps = [event["body"] for event in info["events"] if event["event"] == "boot.progress"]
    assert steps[-3:] == ["setting up docker", "starting containers", "done"]
    assert len(deployer.line(vm_id, "key")) == 64
    assert deployer.line(vm_id, "env") == str(["APP_OTHER=unset", f"APP_TOKEN={token}"])
