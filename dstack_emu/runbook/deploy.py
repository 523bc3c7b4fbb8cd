"""The runbook's first step: two KMS, deployed by the requests of a VMM, each in a machine of its own.

What is sent is what `vmm-cli.py deploy` sends for the compose file that dstack deploys a KMS with: its webhook runs on
the host at 10.0.2.2, its onboard and runtime phase are at one mapped port. Source: the runbook, and dstack
`kms/dstack-app/compose-simple.yaml` and `vmm/src/vmm-cli.py` at 312dc605.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.deployment.guest_network import HOST_IN_GUEST, LOOPBACK
from dstack_emu.deployment.kms_toml import toml_text
from dstack_emu.kms_emu.cert_dir import TMP_CA_CERT
from dstack_emu.runbook.errors import RunbookError
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.listen import bind_tcp

KMS_PORT: Final = 8000
"""The port of a KMS in its machine."""
IMAGE: Final = "dstacktee/dstack-kms:latest"
PAUSE: Final = 0.05
"""Seconds between two questions whether a machine has booted, or is gone."""
TIMEOUT: Final = 60.0
_MAX_LOG: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DeployedKms:
    """A KMS in a machine: the machine's id, and the port of this host that leads to the KMS."""

    vm_id: str
    port: int

    @property
    def url(self) -> str:
        """Its URL on this host, in its onboard phase."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def source_url(self) -> str:
        """Its URL for another machine, in its runtime phase."""
        return f"https://{HOST_IN_GUEST}:{self.port}/prpc"


class Vmm:
    """A client of one VMM. Close it."""

    def __init__(self, url: str, patience: float) -> None:
        self._url, self._patience = url, patience
        self._client = PrpcClient(f"{url}/prpc", timeout=TIMEOUT)
        self._pages = HttpClient(timeout=TIMEOUT, max_answer=_MAX_LOG)

    async def deploy(self, name: str, webhook: str, port: int) -> DeployedKms:
        """Deploy a KMS that asks a webhook of this host (its URL), at a port of this host (0: a free one).

        Returns once it has booted; raises `RunbookError` if it does not.
        """
        images = (await self._call("ListImages", Empty(), pb.ImageListResponse)).images
        if not images:
            raise RunbookError(f"the VMM at {self._url} has no OS image")
        port = port or _free_port()
        auth = f"http://{HOST_IN_GUEST}:{urlsplit(webhook).port}"
        request = pb.VmConfiguration(
            name=name,
            image=images[0].name,
            compose_file=app_compose(name, auth),
            vcpu=1,
            memory=2048,
            disk_size=20,
            ports=[pb.PortMapping(protocol="tcp", host_address=LOOPBACK, host_port=port, vm_port=KMS_PORT)],
        )
        deployed = DeployedKms((await self._call("CreateVm", request, pb.Id)).id, port)
        await self._booted(name, deployed.vm_id)
        return deployed

    async def _booted(self, name: str, vm_id: str) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            info = (await self._call("GetInfo", pb.Id(id=vm_id), pb.GetInfoResponse)).info
            if info.boot_error:
                raise RunbookError(f"the machine {name} does not boot: {info.boot_error}")
            if info.boot_progress == "done":
                return
            if time.monotonic() > deadline:
                raise RunbookError(f"the machine {name} has not booted; its last step: {info.boot_progress}")
            await asyncio.sleep(PAUSE)

    async def log(self, vm_id: str) -> list[str]:
        """Return the lines of a machine's log, without those that have the time of a boot."""
        answer = await self._pages.send("GET", f"{self._url}/logs?id={vm_id}&follow=false&ansi=false&lines=10000")
        lines = answer.body.decode(errors="replace").splitlines()
        return [line for line in lines if not line.startswith("===== boot @ ")]

    async def remove(self, vm_id: str) -> None:
        """Remove a machine, and wait until it is gone; raise `RunbookError`."""
        await self._call("RemoveVm", pb.Id(id=vm_id), Empty)
        deadline = time.monotonic() + self._patience
        while (await self._call("GetInfo", pb.Id(id=vm_id), pb.GetInfoResponse)).found:
            if time.monotonic() > deadline:
                raise RunbookError(f"the machine {vm_id} is not removed")
            await asyncio.sleep(PAUSE)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await self._pages.close()

    async def _call(self, method: str, request: Any, answer: Any) -> Any:
        try:
            return await self._client.call(method, request, answer)
        except (TransportError, RpcError, AttestError) as error:
            raise RunbookError(f"the VMM's {method}: {error}") from error


def app_compose(name: str, webhook: str) -> str:
    """Return the app-compose.json of a KMS whose webhook is at a URL, as `vmm-cli.py compose` writes one."""
    document = {
        "manifest_version": 2,
        "name": name,
        "runner": "docker-compose",
        "docker_compose_file": docker_compose(webhook),
        "kms_enabled": False,
        "gateway_enabled": False,
        "local_key_provider_enabled": True,
        "public_logs": True,
        "public_sysinfo": True,
        "allowed_envs": [],
        "no_instance_id": True,
        "secure_time": False,
    }
    return json.dumps(document, indent=4, ensure_ascii=False)


def docker_compose(webhook: str) -> str:
    """Return the docker-compose.yaml of a KMS, as JSON, which is YAML."""
    service = {
        "image": IMAGE,
        "volumes": ["kms-volume:/kms", "/var/run/dstack.sock:/var/run/dstack.sock"],
        "ports": [f"{KMS_PORT}:{KMS_PORT}"],
        "restart": "unless-stopped",
        "configs": [{"source": "kms_config", "target": "/kms/kms.toml"}],
        "command": "sh -c 'mkdir -p /kms/certs /kms/images && exec dstack-kms -c /kms/kms.toml'",
    }
    document = {
        "services": {"kms": service},
        "volumes": {"kms-volume": {}},
        "configs": {"kms_config": {"content": kms_toml(webhook)}},
    }
    return json.dumps(document, indent=2)


def kms_toml(webhook: str) -> str:
    """Return the kms.toml that the runbook requires."""
    where = {"address": "0.0.0.0", "port": KMS_PORT}  # noqa: S104 - in the machine
    certs = "/kms/certs"
    return toml_text(
        {
            "rpc": {
                **where,
                "tls": {
                    "key": f"{certs}/rpc.key",
                    "certs": f"{certs}/rpc.crt",
                    "mutual": {"ca_certs": f"{certs}/{TMP_CA_CERT}", "mandatory": False},
                },
            },
            "core": {
                "cert_dir": certs,
                "image": {"verify": True, "cache_dir": "/kms/images"},
                "auth_api": {"type": "webhook", "webhook": {"url": webhook}},
                "onboard": {"enabled": True, "auto_bootstrap_domain": "", **where},
            },
        }
    )


def _free_port() -> int:
    with bind_tcp(LOOPBACK, 0, listen=False) as sock:
        port: int = sock.getsockname()[1]
    return port
