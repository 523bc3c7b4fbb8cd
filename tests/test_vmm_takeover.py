"""A run folder that a VMM of 0.5.11 has left, and what a VMM of each release makes of it."""

import asyncio
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.attest.release import RELEASES, Release
from dstack_emu.deployment.standalone_vmm import StandaloneVmm, VmmSettings
from dstack_emu.testing import LiveStack
from dstack_emu.vmm.config import CvmSection, ImageSection, VmmConfig
from tests.commands import run_command
from tests.ports import free_port
from tests.vmm import APP_ID, COMPOSE, VmmClient, allow

RUNNING, STOPPED, REMOVED, HALF_REMOVED = (f"{number}84e5240-0000-4000-8000-00000000000{number}" for number in range(4))
IMAGE = "dstack-0.5.11"
SEED = "11" * 20
INSTANCE = hashlib.sha256(bytes.fromhex(SEED) + bytes.fromhex(APP_ID)).digest()[:20].hex()
WITHOUT_KMS = COMPOSE.replace('"kms_enabled": true', '"kms_enabled": false')


def port_map(host_port: int) -> dict[str, Any]:
    return {"address": "127.0.0.1", "protocol": "tcp", "from": host_port, "to": 80}


def manifest(vm_id: str, number: int, **changed: Any) -> str:
    """Return a manifest as 0.5.11 writes it: in the order of its members, without spaces."""
    members = {
        "id": vm_id,
        "name": f"vm {number}",
        "app_id": APP_ID,
        "vcpu": 2,
        "memory": 2048,
        "disk_size": 20,
        "image": IMAGE,
        "port_map": [port_map(18080 + number)],
        "created_at_ms": 1_767_225_600_000 + number,
        "hugepages": False,
        "pin_numa": False,
        "gpus": {"attach_mode": "listed", "gpus": [], "bridges": []},
        "kms_urls": [],
        "gateway_urls": [],
        "no_tee": False,
    }
    return json.dumps(members | changed, separators=(",", ":"))


def write_machine(folder: Path, text: str, *, started: bool, compose: str = COMPOSE) -> None:
    shared = folder / "shared"
    shared.mkdir(parents=True)
    (folder / "vm-manifest.json").write_text(text)
    (folder / "vm-state.json").write_text(json.dumps({"started": started}, separators=(",", ":")))
    (folder / "qemu.pid").write_text(f"{2**22 + 1}\n")
    (folder / "hda.img").write_bytes(b"QFI\xfb")
    (folder / "serial.log").write_text("the boot before\n")
    (folder / "serial.history.log").write_text("\n===== boot @ 2026-01-01T00:00:00Z =====\n\nan older boot\n")
    (folder / "serial.pty").symlink_to("/dev/pts/none")
    (shared / "app-compose.json").write_text(compose)
    (shared / ".user-config").write_text("mine")
    (shared / ".sys-config.json").write_text('{"kms_urls":[],"vm_config":"{}"}')
    info = {"instance_id_seed": SEED, "instance_id": INSTANCE, "app_id": APP_ID} if started else {"app_id": APP_ID}
    (shared / ".instance_info").write_text(json.dumps(info, separators=(",", ":")))


def write_run_folder(runs: Path) -> None:
    """Write machines that run, that are stopped, and that were being removed, and what else may lie there."""
    network = {"mode": "bridge", "bridge": "", "forward_service_enabled": False, "mac_prefix": "", "net": ""}
    network |= {"dhcp_start": "", "restrict": False, "netdev": ""}
    ports = [port_map(free_port())]  # it listens there
    write_machine(runs / RUNNING, manifest(RUNNING, 1, networking=network, port_map=ports), started=True)
    gpus = {"attach_mode": "listed", "gpus": [{"slot": "18:00.0"}], "bridges": [{"slot": "05:00.0"}]}
    write_machine(runs / STOPPED, manifest(STOPPED, 2, gpus=gpus), started=False)
    (runs / STOPPED / "guest-ip").write_text("192.0.2.7")
    write_machine(runs / REMOVED, manifest(REMOVED, 3), started=True)
    (runs / REMOVED / ".removing").write_text("")
    (runs / HALF_REMOVED / "shared").mkdir(parents=True)
    (runs / HALF_REMOVED / ".removing").write_text("")
    (runs / "half-made").mkdir()
    (runs / f"{STOPPED}.bak").mkdir()
    shutil.copytree(runs / STOPPED, runs / "copy", symlinks=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    assert run_command("image", "build", f"{folder}/{IMAGE}", "--version", "0.5.11").returncode == 0
    return folder


def settings(folder: Path, images: Path, stack: LiveStack | None, release: Release) -> VmmSettings:
    kms = () if stack is None else (stack.services["kms-src"],)
    config = VmmConfig(
        address="127.0.0.1:0", run_path=folder / "vms", image=ImageSection(path=images), cvm=CvmSection(kms_urls=kms)
    )
    seed = "vmm" if stack is None else stack.description["seed"]
    pccs = "http://127.0.0.1:1" if stack is None else stack.services["pccs"]
    return VmmSettings(config, release, seed, pccs, folder / "discovery")


async def test_machines_of_0_5_11_are_what_they_were(short_folder: Path, images: Path, vmm_stack: LiveStack) -> None:
    allow(vmm_stack)
    policy = vmm_stack.control.policy("src")
    policy["osImages"].append(f"0x{hashlib.sha256((images / IMAGE / 'sha256sum.txt').read_bytes()).hexdigest()}")
    vmm_stack.control.set_policy("src", policy)
    write_run_folder(short_folder / "vms")

    def check(vmm: VmmClient) -> None:
        assert [each["id"] for each in vmm.rpc("Status")["vms"]] == [RUNNING, STOPPED]
        running, stopped = vmm.booted(RUNNING), vmm.info(STOPPED)
        assert (running["status"], running["boot_progress"], running["boot_error"]) == ("running", "done", "")
        assert running["instance_id"] == INSTANCE
        assert (stopped["status"], stopped["instance_id"], stopped["boot_progress"]) == ("stopped", None, "")
        found = running["configuration"]
        assert (found["compose_file"], found["user_config"], found["image"]) == (COMPOSE, "mine", IMAGE)
        assert found["networks"] == [{"mode": "bridge", "bridge_name": ""}]
        assert stopped["configuration"]["gpus"] == {"gpus": [{"slot": "18:00.0"}], "attach_mode": "listed"}
        assert stopped["configuration"]["ports"][0]["host_port"] == 18082
        assert running["image_version"] == "0.5.11"
        assert vmm.ask(f"/logs?id={STOPPED}") == (200, b"the boot before\n")
        assert vmm.rpc("ReloadVms") == {"loaded": 0, "updated": 0, "removed": 0}
        assert vmm.rpc("ResizeVm", id=STOPPED, memory=4096) is None
        vmm.gone(RUNNING)

    async with StandaloneVmm(settings(short_folder, images, vmm_stack, RELEASES["0.6"])) as vmm:
        await asyncio.to_thread(check, VmmClient(vmm.url))
    left = await asyncio.to_thread(lambda: sorted(path.name for path in (short_folder / "vms").iterdir()))
    assert left == sorted([STOPPED, "half-made", f"{STOPPED}.bak", "copy"])
    kept = json.loads((short_folder / "vms" / STOPPED / "vm-manifest.json").read_text())
    assert (kept["memory"], kept["gpus"]["bridges"]) == (4096, [{"slot": "05:00.0"}])


async def test_folder_of_0_5_11_is_taken_over_by_0_5_and_its_network_stays_readable_there(
    short_folder: Path, images: Path
) -> None:
    runs = short_folder / "vms"
    write_machine(runs / STOPPED, manifest(STOPPED, 1, networking={"mode": "user"}, gpus=None), started=False)

    def check(vmm: VmmClient) -> Any:
        assert vmm.rpc("ResizeVm", id=STOPPED, vcpu=4) is None
        return vmm.info(STOPPED)["configuration"]["networking"]

    async with StandaloneVmm(settings(short_folder, images, None, RELEASES["0.5"])) as vmm:
        assert await asyncio.to_thread(check, VmmClient(vmm.url)) == {"mode": "user"}
    kept = json.loads((runs / STOPPED / "vm-manifest.json").read_text())
    assert (kept["vcpu"], kept["networking"]["mode"], len(kept["networks"])) == (4, "user", 1)


@contextmanager
def process_named(name: str, folder: Path) -> Iterator[int]:
    """Run a program of that name; yield its process id.

    Linux closes the pipe by which `Popen` sees that the program has begun before it gives the process its name.
    An answer of the program shows that the name is there.
    """
    program = folder / name
    shutil.copy(shutil.which("cat") or "/bin/cat", program)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"!")
        assert process.stdout.read(1) == b"!"
        yield process.pid
        process.kill()


async def test_machine_whose_qemu_still_runs_is_not_started_a_second_time(short_folder: Path, images: Path) -> None:
    runs = short_folder / "vms"
    write_machine(runs / RUNNING, manifest(RUNNING, 1, port_map=[]), started=True, compose=WITHOUT_KMS)
    with process_named("qemu-system-x86", short_folder) as pid:
        (runs / RUNNING / "qemu.pid").write_text(f"{pid}\n")

        def check(vmm: VmmClient) -> None:
            text = f"QEMU runs this machine, as process {pid}: stop it with the VMM that started it"
            info = vmm.info(RUNNING)
            assert (info["status"], info["boot_error"]) == ("exited", text)
            assert vmm.refused("StartVm", id=RUNNING) == f"Failed to start VM: {text}"
            (runs / RUNNING / "qemu.pid").unlink()
            assert vmm.rpc("StartVm", id=RUNNING) is None
            assert vmm.booted(RUNNING)["boot_progress"] == "done"

        async with StandaloneVmm(settings(short_folder, images, None, RELEASES["0.6"])) as vmm:
            await asyncio.to_thread(check, VmmClient(vmm.url))


async def test_instance_id_of_an_app_without_key_provider_is_new_at_each_boot(short_folder: Path, images: Path) -> None:
    runs = short_folder / "vms"
    write_machine(runs / RUNNING, manifest(RUNNING, 1, port_map=[]), started=True, compose=WITHOUT_KMS)

    def check(vmm: VmmClient) -> list[str]:
        found = [vmm.booted(RUNNING)["instance_id"]]
        vmm.rpc("StopVm", id=RUNNING)
        vmm.rpc("StartVm", id=RUNNING)
        return [*found, vmm.booted(RUNNING)["instance_id"]]

    async with StandaloneVmm(settings(short_folder, images, None, RELEASES["0.6"])) as vmm:
        first, second = await asyncio.to_thread(check, VmmClient(vmm.url))
    assert len({INSTANCE, first, second}) == 3
