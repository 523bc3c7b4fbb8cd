"""Machines without containers: the programs of dstack's own deployments run in them, by their compose files."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from dstack_emu.testing import LiveStack
from tests.ports import free_port
from tests.vmm import VmmClient

KMS_TOML = """
[rpc]
address = "0.0.0.0"
port = 8000

[rpc.tls]
key = "/kms/certs/rpc.key"
certs = "/kms/certs/rpc.crt"

[rpc.tls.mutual]
ca_certs = "/kms/certs/tmp-ca.crt"
mandatory = false

[core]
cert_dir = "/kms/certs"

[core.image]
verify = true
cache_dir = "/kms/images"
download_url = "http://localhost/{OS_IMAGE_HASH}.tar.gz"

[core.auth_api]
type = "webhook"

[core.auth_api.webhook]
url = "${AUTH_WEBHOOK_URL:-http://auth-api:8000}"

[core.onboard]
enabled = true
auto_bootstrap_domain = ""
address = "0.0.0.0"
port = 8000
"""
"""Its keys are those of the compose files that dstack deploys a KMS with."""


def kms_service(image: str = "docker.io/dstacktee/dstack-kms:0.5.5@sha256:00", **more: Any) -> dict[str, Any]:
    """The service of a KMS, as dstack's compose files have it."""
    return {
        "image": image,
        "volumes": ["kms-volume:/kms", "/var/run/dstack.sock:/var/run/dstack.sock"],
        "ports": ["8000:8000"],
        "restart": "unless-stopped",
        "configs": [{"source": "kms_config", "target": "/kms/kms.toml"}],
        "command": "sh -c 'mkdir -p /kms/certs /kms/images && exec dstack-kms -c /kms/kms.toml'",
        **more,
    }


def app_compose(services: dict[str, Any], kms_toml: str = KMS_TOML, **more: Any) -> str:
    """An app-compose.json of these services, with keys of the host, as `vmm-cli.py compose` writes it."""
    compose = {
        "services": services,
        "volumes": {"kms-volume": None},
        "configs": {"kms_config": {"content": kms_toml}},
    }
    document = {
        "manifest_version": 2,
        "name": "kms",
        "runner": "docker-compose",
        "docker_compose_file": json.dumps(compose),  # JSON is YAML
        "kms_enabled": False,
        "gateway_enabled": False,
        "local_key_provider_enabled": True,
        "allowed_envs": [],
        "no_instance_id": True,
        "secure_time": False,
        **more,
    }
    return json.dumps(document, indent=4)


AUTH_MOCK = {"image": "registry.example:5000/kms/auth-mock", "environment": ["PORT=8000"]}


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    with LiveStack(vmm=True) as live:
        yield live


@pytest.fixture
def vmm(stack: LiveStack) -> Iterator[VmmClient]:
    client = VmmClient(stack.services["vmm"])
    yield client
    for vm in client.rpc("Status")["vms"]:
        client.gone(vm["id"])


def mapping(vm_port: int, host_port: int | None = None, protocol: str = "tcp") -> dict[str, Any]:
    """A port mapping as `--port tcp:PORT:VM_PORT` sends it."""
    port = free_port() if host_port is None else host_port
    return {"protocol": protocol, "host_address": "127.0.0.1", "host_port": port, "vm_port": vm_port}


def kms_rpc(url: str, method: str, **body: Any) -> Any:
    """Call an RPC of a KMS with curl."""
    command = ["curl", "-sSk", "--max-time", "20", "-d", json.dumps(body), f"{url}/prpc/{method}?json"]
    return json.loads(subprocess.run(command, capture_output=True, timeout=30, check=True).stdout)


def test_kms_runs_in_a_machine_with_its_webhook_and_keeps_its_keys(vmm: VmmClient) -> None:
    port = mapping(8000)
    services = {"kms": kms_service(), "auth-api": AUTH_MOCK, "web": {"image": "nginx"}}
    vm_id = vmm.deploy(compose_file=app_compose(services), ports=[port])
    info = vmm.booted(vm_id)
    assert (info["boot_progress"], info["boot_error"]) == ("done", "")
    assert "not started: web" in [event["body"] for event in info["events"]]
    where = f"127.0.0.1:{port['host_port']}"
    measured = kms_rpc(f"http://{where}", "Onboard.GetAttestationInfo")
    assert len(measured["mr_aggregated"]) == 64
    made = kms_rpc(f"http://{where}", "Onboard.Bootstrap", domain="kms.example.test")
    subprocess.run(["curl", "-sS", f"http://{where}/finish"], check=True, timeout=30, capture_output=True)
    assert kms_rpc(f"https://{where}", "KMS.GetMeta")["k256_pubkey"] == made["k256_pubkey"]
    assert set(kms_rpc(f"https://{where}", "KMS.GetTempCaCert")) == {"temp_ca_cert", "temp_ca_key", "ca_cert"}
    vmm.rpc("StopVm", id=vm_id)
    vmm.rpc("StartVm", id=vm_id)
    assert vmm.booted(vm_id)["boot_progress"] == "done"
    assert kms_rpc(f"https://{where}", "KMS.GetMeta")["k256_pubkey"] == made["k256_pubkey"]
