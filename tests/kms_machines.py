"""KMS in machines: the compose files that they are deployed with, and their ports."""

import json
from typing import Any

from tests.ports import free_port

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


def kms_service(image: str = "registry.example/dstacktee/dstack-kms:0.5.5@sha256:00", **more: Any) -> dict[str, Any]:
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


def app_compose(services: dict[str, Any], kms_toml: str = KMS_TOML, root: str = "", **more: Any) -> str:
    """An app-compose.json of these services, with keys of the host, as `vmm-cli.py compose` writes it.

    `root` is the content of the config `root`, which a service can mount.
    """
    compose = {
        "services": services,
        "volumes": {"kms-volume": None},
        "configs": {"kms_config": {"content": kms_toml}, **({"root": {"content": root}} if root else {})},
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


def mapping(vm_port: int, host_port: int | None = None, protocol: str = "tcp") -> dict[str, Any]:
    """A port mapping as `--port tcp:PORT:VM_PORT` sends it."""
    port = free_port() if host_port is None else host_port
    return {"protocol": protocol, "host_address": "127.0.0.1", "host_port": port, "vm_port": vm_port}
