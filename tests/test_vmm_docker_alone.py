"""A VMM without a stack whose machines have containers: what it makes on the engine, and what it takes away.

As tests/test_vmm_docker.py, it runs only where DSTACK_EMU_CONTAINERS is set.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dstack_emu.testing import LiveStack
from tests.commands import usage_error
from tests.repository import ROOT
from tests.test_containers_app import docker, image
from tests.test_vmm_docker import KEY, KINDS, app_compose
from tests.vmm import VmmClient, app_id_of

__all__ = ["image"]

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DSTACK_EMU_CONTAINERS"), reason="DSTACK_EMU_CONTAINERS is not set"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    with LiveStack() as live:
        yield live


@contextmanager
def vmm_process(folder: Path, stack: LiveStack) -> Iterator[tuple[VmmClient, "subprocess.Popen[str]"]]:
    """Run `dstack-emu vmm` with containers, against the KMS of a stack."""
    kms, pccs = stack.services["kms-src"], stack.services["pccs"]
    (folder / "vmm.toml").write_text(f'run_path = "{folder}/vms"\n[cvm]\nkms_urls = ["{kms}"]\n')
    options = ["--listen", "127.0.0.1:0", "--pccs", pccs, "--seed", stack.description["seed"]]
    options += ["--vmm-workload", "docker"]
    command = [sys.executable, "-m", "dstack_emu", "vmm", "-c", f"{folder}/vmm.toml", *options, "--json"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        yield VmmClient(json.loads(process.stdout.readline())["url"]), process
        if process.poll() is None:
            process.terminate()
            assert process.wait(60) == 0


def made(folder: Path) -> dict[str, list[str]]:
    """Return what the machines of a run folder have on the engine, by kind."""
    label = f"label=dstack-emu.vmm={folder}/vms"
    return {
        kind: docker(kind, "ls", "--quiet", *(("--all",) if kind == "container" else ()), "--filter", label).split()
        for kind in KINDS
    }


def test_containers_of_a_vmm_alone_have_the_key_and_the_pccs_and_end_with_it(
    short_folder: Path, stack: LiveStack, image: str
) -> None:
    port = stack.services["pccs"].rpartition(":")[2]
    ask = f"import socket; socket.create_connection(('10.0.2.2', {port}), 20); print('reached yes', flush=True)"
    service = {
        "image": image,
        "command": ["python3", "-c", f"{KEY}\n{ask}\nimport time; time.sleep(600)"],
        "init": True,
        "volumes": ["/var/run/dstack.sock:/var/run/dstack.sock", "kept:/kept"],
    }
    compose_file = app_compose({"wallet": service}, volumes=("kept",))
    policy = stack.control.policy("src")
    hashes = [f"0x{hashlib.sha256(compose_file.encode()).hexdigest()}"]
    policy["apps"][f"0x{app_id_of(compose_file)}"] = {"composeHashes": hashes, "devices": [], "allowAnyDevice": True}
    stack.control.set_policy("src", policy)
    with vmm_process(short_folder, stack) as (vmm, process):
        vm_id = vmm.deploy(compose_file=compose_file)
        info = vmm.booted(vm_id)
        assert (info["boot_progress"], info["boot_error"]) == ("done", "")
        said = ""
        while "reached" not in said:
            said = vmm.ask(f"/logs?id={vm_id}&ch=stdout")[1].decode()
        (key,) = re.findall(r"key ([0-9a-f]{64})$", said, re.MULTILINE)
        assert len(made(short_folder)["container"]) == 1
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    with vmm_process(short_folder, stack) as (vmm, _):
        assert vmm.booted(vm_id)["boot_error"] == ""
        said = ""
        while "key " not in said:
            said = vmm.ask(f"/logs?id={vm_id}&ch=stdout")[1].decode()
        assert f"key {key}" in said
        assert {kind: len(names) for kind, names in made(short_folder).items()}["container"] == 1
    left = made(short_folder)
    assert (left["container"], left["network"], len(left["volume"])) == ([], [], 1)
    with vmm_process(short_folder, stack) as (vmm, _):
        vmm.gone(vm_id)
        assert made(short_folder) == {kind: [] for kind in KINDS}


def test_vmm_alone_without_an_engine_says_what_is_missing(short_folder: Path) -> None:
    environment = {**os.environ, "DOCKER_HOST": f"unix://{short_folder}/none.sock"}
    said = usage_error("vmm", "--listen", "127.0.0.1:0", "--vmm-workload", "docker", environment=environment)
    assert said.startswith("vmm: ")
