"""`dstack-emu vmm check-config` and `run --dry-run`: what they accept, what they refuse, and what they leave behind."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.attest.release import DEFAULT
from dstack_emu.deployment.standalone_vmm import VmmSettings, prepare_machine
from dstack_emu.transport.errors import ConfigError
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.config_check import faults
from dstack_emu.vmm.errors import VmmError
from tests.commands import run_command, usage_error
from tests.vmm import APP_ID, COMPOSE, IMAGE, configuration

LISTENER = 'address = "127.0.0.1"\nport = 8085\n'
EVERYTHING = """
image_path = "./images"
unknown = 1
[cvm]
platform = "amd-sev-snp"
host_share_mode = "vvfat"
unknown = [1]
pccs_url = "https://[::1]:8081"
nvidia_attestation_proxy_url = ""
product = { sys_vendor = "x" }
instance_id = "a"
[cvm.network_filter]
mode = "libvirt"
parameters = { a = "b" }
[cvm.networking]
mode = "custom"
netdev = "user"
mac_prefix = "02:ab"
[cvm.gpu]
listing = []
include = ["1"]
exclude = ["2"]
[cvm.log]
max_backups = 0
check_interval_secs = 1
[supervisor]
exe = ""
auto_start = false
[host_api]
address = "vsock:0x2"
[key_provider]
address = "::1"
[netd]
socket = "/run/x"
"""


def check(folder: Path, text: str) -> list[str]:
    """Return what is wrong with a vmm.toml, either at each start or for `check-config` alone."""
    file = folder / "vmm.toml"
    file.write_text(text)
    try:
        return faults(VmmConfig.load(file))
    except ConfigError as error:
        return [str(error).removeprefix(f"{file}: ")]


# ---- check-config


def test_check_config_accepts_a_file_with_address_and_port_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "vmm.toml").write_text(LISTENER + EVERYTHING)
    done = run_command("vmm", "-c", f"{tmp_path}/vmm.toml", "check-config")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"configuration is valid\n", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["vmm.toml"]


def test_check_config_refuses_a_file_without_port_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "vmm.toml").write_text('address = "unix:./vmm.sock"\n')
    done = run_command("vmm", "-c", f"{tmp_path}/vmm.toml", "check-config")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"Error: port: check-config wants one beside address")
    done = run_command("vmm", "-c", f"{tmp_path}/none.toml", "check-config")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == f"Error: cannot read {tmp_path}/none.toml: No such file or directory\n".encode()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('cvm.platform = "sgx"', "cvm.platform: Input should be 'auto', 'tdx' or 'amd-sev-snp'"),
        ("cvm.platform = 1", "cvm.platform: "),
        ('cvm.networking.mode = "none"', "cvm.networking.mode: "),
        ('cvm.networking.mac_prefix = "02:not-hex"', "cvm.networking.mac_prefix: "),
        ('cvm.networking.mode = "bridge"', "cvm.networking.bridge: the mode bridge needs one, got nothing"),
        ('cvm.networking.mode = "custom"', "cvm.networking.netdev: the mode custom needs one, got nothing"),
        ('cvm.network_filter.mode = "x"', "cvm.network_filter.mode: "),
        ('cvm.gpu.listing = "10de:2335"', "cvm.gpu.listing: "),
        ("cvm.gpu.listing = [1]", "cvm.gpu.listing.0: "),
        ('key_provider.address = "localhost"', "key_provider.address: Value error, an IP address expected"),
        ('host_api.address = "127.0.0.1"', "host_api.address: Value error, vsock:CID expected"),
        ('host_api.address = "vsock:x"', "host_api.address: Value error, vsock:CID expected"),
        ("host_api.port = 0", "host_api.port: "),
        ('run_path = ["x"]', "run_path: "),
        ('image_path = ["x"]', "image_path: "),
        ('image.path = ["x"]', "image.path: "),
        ("cvm.cid_start = 2", "cvm.cid_start: "),
        ("cvm.cid_pool_size = 0", "cvm.cid_pool_size: "),
        ("cvm.cid_start = 4294967295", "cvm.cid_pool_size: CIDs above 4294967295"),
        ('cvm.host_share_mode = "nfs"', "cvm.host_share_mode: 9p, vhd, vvfat expected, got 'nfs'"),
        ('cvm.port_mapping.address = "x"', "cvm.port_mapping.address: Value error, an IP address expected"),
        ('cvm.port_mapping.range = [{protocol = "tcp", from = 2, to = 1}]', "cvm.port_mapping.range.0: "),
        ("cvm.auto_restart.interval = 0", "cvm.auto_restart: "),
        ("cvm.auto_restart.initial_backoff = 0", "cvm.auto_restart: "),
        ("cvm.auto_restart.max_backoff = 4", "cvm.auto_restart: "),
        ('cvm.kms_urls = ["https://kms", "kms"]', "cvm.kms_urls: an http or https URL with a host expected, got 'kms'"),
        ('cvm.gateway_urls = ["ftp://x"]', "cvm.gateway_urls: an http or https URL with a host expected"),
        ('cvm.pccs_url = "http://"', "cvm.pccs_url: an http or https URL with a host expected"),
        ('cvm.nvidia_attestation_proxy_url = "x"', "cvm.nvidia_attestation_proxy_url: an http"),
        ('supervisor.sock = " "', "supervisor.sock: a path expected, got nothing"),
        ('supervisor.exe = ""', "supervisor.exe: a path expected, got nothing"),
        ("address = 1", "address: "),
        ("port = 65536", "port: "),
    ],
)
def test_check_config_names_the_key_that_is_wrong(tmp_path: Path, line: str, fault: str) -> None:
    listener = {"address": 'address = "127.0.0.1"\n', "port": "port = 8085\n"}
    listener.pop(line.partition(" ")[0], None)
    (found,) = check(tmp_path, "".join(listener.values()) + line)
    assert found.startswith(fault)


def test_older_name_of_the_image_folder_counts_unless_the_newer_is_there(tmp_path: Path) -> None:
    for lines, path in {'image_path = "a"': "a", 'image_path = "a"\nimage.path = "b"': "b"}.items():
        assert check(tmp_path, LISTENER + lines) == []
        assert VmmConfig.load(tmp_path / "vmm.toml").image.path == Path(path)


# ---- run --dry-run


def dry_run(folder: Path, **changed: Any) -> Any:
    """Run it with a changed request; return the finished command."""
    (folder / "vm.json").write_text(json.dumps(configuration(**changed)))
    return run_command("vmm", "run", f"{folder}/vm.json", "--workdir", f"{folder}/work", "--dry-run")


async def refusal(folder: Path, **changed: Any) -> str:
    """Return how a dry run refuses a changed request, empty if it does not."""
    (folder / "vm.json").write_text(json.dumps(configuration(**changed)))
    settings = VmmSettings(VmmConfig(), DEFAULT, "vmm", "http://127.0.0.1:1", folder)
    try:
        await prepare_machine(settings, folder / "vm.json", folder / "work")
    except VmmError as error:
        return str(error)
    return ""


def test_dry_run_writes_the_folder_of_a_machine_and_describes_it(tmp_path: Path) -> None:
    done = dry_run(
        tmp_path,
        user_config="u",
        encrypted_env="0102",
        kms_urls=["http://kms"],
        networks=[{"mode": "bridge", "bridge_name": "lo"}, {"mode": "user"}],
    )
    assert (done.returncode, done.stderr) == (0, b"")
    said = dict(line.removeprefix("# ").split(": ", 1) for line in done.stdout.decode().splitlines() if ": " in line)
    assert said["Compose hash"] == hashlib.sha256(COMPOSE.encode()).hexdigest()
    assert (said["App ID"], said["CID"], said["Working directory"]) == (APP_ID, "1000", f"{tmp_path}/work")
    (line,) = (line for line in done.stdout.decode().splitlines() if line.startswith("{"))
    machine = json.loads(line)
    assert [(each["mode"], each.get("bridge")) for each in machine["interfaces"]] == [("bridge", "lo"), ("user", None)]
    digests = [hashlib.sha256(f"{said['VM ID']}{number}".encode()).digest() for number in ("", ":1")]
    macs = [bytes([digest[0] & 0xFE | 2, *digest[1:6]]).hex(":") for digest in digests]
    assert [each["mac"] for each in machine["interfaces"]] == macs
    folder = tmp_path / "work"
    assert json.loads((folder / "vm-manifest.json").read_text())["id"] == said["VM ID"]
    assert json.loads((folder / "vm-state.json").read_text()) == {"started": False}
    assert (folder / "shared/app-compose.json").read_text() == COMPOSE
    assert (folder / "shared/.encrypted-env").read_bytes() == b"\x01\x02"
    assert (folder / "shared/.user-config").read_text() == "u"
    assert json.loads((folder / "shared/.instance_info").read_text())["app_id"] == APP_ID
    surroundings = json.loads((folder / "shared/.sys-config.json").read_text())
    assert surroundings["kms_urls"] == ["http://kms"]
    assert json.loads(surroundings["vm_config"]) == machine["vm_config"]


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"networking": None},
        {"networks": [{"mode": "user"}]},
        {"networks": [{"mode": "bridge", "bridge_name": "lo"}]},
    ],
    ids=["none", "null", "user", "bridge"],
)
async def test_dry_run_accepts_a_network(tmp_path: Path, network: dict[str, Any]) -> None:
    assert await refusal(tmp_path, **network) == ""


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"networks": [{"mode": "bridge", "bridge_name": "no-such-bridge"}]},
            "bridge interface 'no-such-bridge' does not exist",
        ),
        ({"networks": [{"mode": "bridge"}]}, "bridge networking requested but no bridge is configured"),
        (
            {"networks": [{"mode": "user", "bridge_name": "lo"}]},
            "bridge_name is only valid for bridge networking mode",
        ),
        ({"networks": [{"mode": "custom"}]}, "custom networking mode is manifest-only"),
        ({"name": "a/b"}, "Invalid name: a/b"),
        ({"image": "none"}, "Failed to load image: "),
        ({"image": "../x"}, "Invalid image name"),
        ({"compose_file": ""}, "invalid app compose JSON: "),
        ({"compose_file": "{}"}, "Failed to parse compose_file as AppCompose: "),
        ({"vcpu": "x"}, "Failed to parse VM configuration from: "),
    ],
)
async def test_dry_run_that_is_refused_writes_nothing(tmp_path: Path, changed: dict[str, Any], text: str) -> None:
    assert (await refusal(tmp_path, **changed)).startswith(text)
    assert os.listdir(tmp_path) == ["vm.json"]
    assert await refusal(tmp_path) == ""


def test_run_of_a_file_that_is_missing_or_empty_has_status_1(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    for name, text in {"none": "Failed to read VM configuration file: ", "empty": "Failed to parse VM config"}.items():
        done = run_command("vmm", "run", f"{tmp_path}/{name}", "--dry-run", folder=tmp_path)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode().startswith(f"Error: {text}")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_run_without_a_folder_makes_one_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "vm.json").write_text(json.dumps(configuration(image=IMAGE, name="a b")))
    assert run_command("vmm", "run", "vm.json", "--dry-run", folder=tmp_path).returncode == 0
    (folder,) = tmp_path.glob("dstack-oneshot-a b-*")
    assert (folder / "vm-manifest.json").exists()


def test_run_that_would_start_qemu_is_wrong_use(tmp_path: Path) -> None:
    assert usage_error("vmm", "run", f"{tmp_path}/vm.json").startswith("run: only with --dry-run")
    assert "the following arguments are required: FILE" in usage_error("vmm", "run")
