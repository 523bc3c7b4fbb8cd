"""A machine's container behind the gateway, at the port that its compose file publishes.

It runs if DSTACK_EMU_CONTAINERS is set, as `.ci/run` sets it where a container engine answers.
"""

import os
import subprocess

import pytest

from dstack_emu.testing import LiveStack
from tests.test_vmm_docker import Deployer, app_compose
from tests.vmm import PATIENCE

IMAGE = os.environ.get("BASE_IMAGE") or "python:3.11-slim-bookworm"

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DSTACK_EMU_CONTAINERS"), reason="DSTACK_EMU_CONTAINERS is not set"),
    pytest.mark.timeout(600),
]


def test_published_port_of_a_container_is_reached_and_another_is_not() -> None:
    web = {
        "image": IMAGE,
        "command": ["python3", "-m", "http.server", "8000"],
        "ports": ["8080:8000"],
        "healthcheck": {
            "test": ["CMD", "python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 8000))"],
            "interval": "1s",
        },
    }
    with LiveStack(vmm=True, vmm_workload="docker", gateway=True) as stack:
        deployer = Deployer(stack)
        vm_id = deployer.deploy(app_compose({"web": web}, gateway_enabled=True))
        info = deployer.vmm.booted(vm_id)
        assert (info["boot_error"], info["boot_progress"]) == ("", "done")
        curl = ["curl", "-s", "--max-time", PATIENCE, "--cacert", str(stack.gateway.ca)]
        fetched = [*curl, stack.gateway.url_of(info["app_id"], 8080)]
        page = subprocess.run(fetched, capture_output=True, timeout=100, check=True).stdout
        assert b"Directory listing for /" in page
        closed = subprocess.run([*curl, stack.gateway.url_of(info["app_id"], 8000)], timeout=100, check=False)
        assert closed.returncode != 0
        deployer.vmm.gone(vm_id)
