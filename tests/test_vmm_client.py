"""vmm-cli.py of dstack: its recorded requests, always; the program itself, where DSTACK_VMM_CLI names it.

`DSTACK_VMM_CLI` is the path of vmm-cli.py (312dc605), or a command that runs it, such as `/venv/bin/python vmm-cli.py`:
it needs the packages cryptography, eth-keys, eth-utils and eth-hash[pycryptodome]. The requests were recorded from it:
their headers, and their members in its order.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.testing import LiveStack
from tests.ports import free_port
from tests.repository import ROOT
from tests.vmm import APP_ID, COMPOSE, IMAGE, VmmClient, allow

CLI = os.environ.get("DSTACK_VMM_CLI", "")
RUNTIME = Path(f"/run/user/{os.getuid()}")
"""Where the program looks for VMMs of this user, whatever XDG_RUNTIME_DIR says."""
AS_CLIENT = ["-H", "Content-Type: application/json", "-H", "Host: localhost", "-H", "Accept-Encoding: identity"]


@pytest.fixture(scope="module", autouse=True)
def _allowed(vmm_stack: LiveStack) -> None:
    allow(vmm_stack)


# ---- recorded requests


def asked(vmm: VmmClient, method: str, body: str) -> Any:
    """Send a recorded request; return the answer, which succeeds."""
    status, answer = vmm.ask(f"/prpc/{method}?json", *AS_CLIENT, "-d", body)
    assert status == 200, answer
    return json.loads(answer)


def create_request(port: int) -> str:
    """Return the body of `deploy`, its members in the client's order."""
    ports = f'[{{"protocol": "tcp", "host_address": "127.0.0.1", "host_port": {port}, "vm_port": 80}}]'
    return (
        f'{{"name": "app1", "image": "{IMAGE}", "compose_file": {json.dumps(COMPOSE)}, "vcpu": 1, "memory": 1024, '
        f'"disk_size": 20, "app_id": null, "user_config": "", "ports": {ports}, "hugepages": false, '
        f'"pin_numa": false, "stopped": false, "no_tee": false, "swap_size": 0}}'
    )


def test_recorded_requests_have_the_answers_that_the_client_reads(vmm: VmmClient) -> None:
    port = free_port()
    vm_id = asked(vmm, "CreateVm", create_request(port))["id"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", vm_id)
    vmm.booted(vm_id)
    status = asked(vmm, "Status", "{}")
    (listed,) = status["vms"]
    assert (status["port_mapping_enabled"], status["total"]) == (True, 1)
    shown = ("id", "name", "status", "app_url", "app_id", "exited_at", "boot_progress", "boot_error", "image_version")
    assert [listed[name] for name in shown][:5] == [vm_id, "app1", "running", None, APP_ID]
    assert [listed[name] for name in shown][5:8] == ["never", "done", ""]
    assert {event["event"] for event in listed["events"]} == {"boot.progress", "instance.info"}
    assert asked(vmm, "GetInfo", f'{{"id": "{vm_id}"}}')["info"]["configuration"] == listed["configuration"]
    assert asked(vmm, "GetInfo", '{"id": "none"}') == {"found": False, "info": None}
    ports = '[{"protocol": "tcp", "host_address": "0.0.0.0", "host_port": 8081, "vm_port": 80}]'
    update = f'{{"id": "{vm_id}", "update_ports": true, "ports": {ports}}}'
    assert asked(vmm, "UpgradeApp", update) == {"id": ""}
    assert asked(vmm, "UpgradeApp", f'{{"id": "{vm_id}", "user_config": "x"}}') == {"id": ""}
    other = COMPOSE + " "
    answer = asked(vmm, "UpgradeApp", f'{{"id": "{vm_id}", "compose_file": {json.dumps(other)}}}')
    assert answer == {"id": hashlib.sha256(other.encode()).hexdigest()[:40]}
    assert asked(vmm, "StopVm", f'{{"id": "{vm_id}"}}') is None
    assert asked(vmm, "ResizeVm", f'{{"id": "{vm_id}", "vcpu": 2, "memory": 2048}}') is None
    logs = f"/logs?id={vm_id}&follow=false&ansi=false&lines=5"
    found, text = vmm.ask(logs, "-H", "Content-Type: application/json")
    assert (found, len(text.splitlines())) == (200, 5)
    assert [image["name"] for image in asked(vmm, "ListImages", "{}")["images"]] == [IMAGE]
    assert asked(vmm, "ListGpus", "{}") == {"gpus": [], "allow_attach_all": True}
    assert asked(vmm, "RemoveVm", f'{{"id": "{vm_id}"}}') is None
    while asked(vmm, "GetInfo", f'{{"id": "{vm_id}"}}')["found"]:
        pass
    status_, said = vmm.ask("/prpc/RemoveVm?json", *AS_CLIENT, "-d", f'{{"id": "{vm_id}"}}')
    assert (status_, json.loads(said)) == (400, {"error": "Failed to remove VM: VM not found"})


# ---- the client itself


class VmmCli:
    """Runs vmm-cli.py with a home of its own."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.command = [sys.executable, CLI] if Path(CLI).is_file() else shlex.split(CLI)
        self.environment = {**os.environ, "HOME": str(home), **variables}
        self.home = home

    def run(self, *words: str, answer: str = "") -> str:
        """Run a subcommand that succeeds; return what it prints."""
        done = subprocess.run(
            [*self.command, *words],
            cwd=self.home,
            env=self.environment,
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.mark.skipif(not CLI, reason="DSTACK_VMM_CLI is not set: vmm-cli.py of dstack was not run")
def test_real_client_with_each_of_its_subcommands(vmm: VmmClient, vmm_stack: LiveStack, tmp_path: Path) -> None:
    cli = VmmCli(tmp_path, DSTACK_VMM_URL=vmm_stack.services["vmm"])
    (tmp_path / "compose.yaml").write_text("services: {}\n")
    (tmp_path / "env").write_text("A=1\nB=2\n")
    (tmp_path / "user").write_text("mine")
    kms = vmm_stack.services["kms-src"].replace("http://", "https://")
    assert "Compose hash: " in cli.run(
        *("compose", "--name", "app1", "--docker-compose", "compose.yaml", "--kms", "--env-file", "env"),
        *("--output", "app.json"),
    )
    compose = (tmp_path / "app.json").read_text()
    compose_hash = hashlib.sha256(compose.encode()).hexdigest()
    policy = vmm_stack.control.policy("src")
    rule = {"composeHashes": [f"0x{compose_hash}"], "devices": [], "allowAnyDevice": True}
    policy["apps"][f"0x{compose_hash[:40]}"] = rule
    vmm_stack.control.set_policy("src", policy)
    port = f"tcp:127.0.0.1:{free_port()}:8090"
    deploy = ("deploy", "--name", "app1", "--image", IMAGE, "--compose", "app.json", "--port", port)
    said = cli.run(*deploy, "--env-file", "env", "--kms-url", kms, "--user-config", "user", answer="y\n")
    vm_id = said.split("Created VM with ID: ")[1].split()[0]
    info = vmm.booted(vm_id)
    assert (info["boot_progress"], info["boot_error"]) == ("done", "")
    assert vm_id[:8] in cli.run("lsvm")
    assert "running" in cli.run("lsvm", "-v")
    assert json.loads(cli.run("lsvm", "--json"))[0]["id"] == vm_id
    assert "Boot Progress: done" in re.sub(r" +", " ", cli.run("info", vm_id))
    assert json.loads(cli.run("info", vm_id, "--json"))["app_id"] == compose_hash[:40]
    assert "[dstack] done" in cli.run("logs", vm_id, "-n", "5")
    assert IMAGE in cli.run("lsimage")
    cli.run("lsgpu")
    cli.run("kms", "add", "02" + "11" * 32)
    assert "11" * 32 in cli.run("kms", "list")
    cli.run("kms", "remove", "02" + "11" * 32)
    cli.run("update-env", vm_id, "--env-file", "env", "--kms-url", kms, answer="y\n")
    cli.run("update-user-config", vm_id, "user")
    cli.run("update-app-compose", vm_id, "app.json")
    cli.run("update-ports", vm_id, "--port", f"tcp:127.0.0.1:{free_port()}:8090")
    cli.run("stop", vm_id)
    while vmm.info(vm_id)["status"] != "stopped":
        pass
    cli.run("resize", vm_id, "--vcpu", "2", "--memory", "4G", "--disk", "30G")
    cli.run("update", vm_id, "--vcpu", "3", "--user-config", "user")
    cli.run("start", vm_id)
    assert vmm.booted(vm_id)["configuration"]["vcpu"] == 3
    cli.run("stop", "-f", vm_id)
    cli.run("remove", vm_id)
    while vmm.rpc("GetInfo", id=vm_id)["found"]:
        pass
    assert "No VMs found" in cli.run("lsvm")


@pytest.mark.skipif(not CLI, reason="DSTACK_VMM_CLI is not set: vmm-cli.py of dstack was not run")
@pytest.mark.skipif(not RUNTIME.is_dir(), reason=f"there is no {RUNTIME}: vmm-cli.py finds a VMM there alone")
def test_real_client_finds_a_vmm_and_switches_to_it(short_folder: Path) -> None:
    (short_folder / "vmm.toml").write_text(f'run_path = "{short_folder}/vms"\nnode_name = "{short_folder.name[:12]}"\n')
    command = [sys.executable, "-m", "dstack_emu", "vmm", "-c", f"{short_folder}/vmm.toml", "--listen", "127.0.0.1:0"]
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    with subprocess.Popen([*command, "--json"], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        cli = VmmCli(short_folder)
        found = next(each for each in json.loads(cli.run("vmm", "ls", "--json")) if each["pid"] == process.pid)
        assert f"http://{found['address']}" == ready["url"]
        assert short_folder.name[:12] in cli.run("vmm", "ls")
        assert f"Switched to VMM {found['id'][:8]} ({ready['url']})" in cli.run("vmm", "switch", found["id"])
        assert "No VMs found" in cli.run("lsvm")
        process.terminate()
        assert process.wait(20) == 0
    assert found["id"] not in cli.run("vmm", "ls")
