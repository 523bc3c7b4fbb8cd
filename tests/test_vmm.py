"""The VMM: machines that are deployed by its RPCs as vmm-cli.py does, and refused with upstream's texts."""

import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dstack_sdk import DstackClient

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.cli.stack_summary import summary
from dstack_emu.testing import LiveStack
from tests.ports import free_port
from tests.vmm import APP_ID, COMPOSE, IMAGE, VmmClient, allow, configuration


def test_what_up_prints_has_the_vmm(vmm_stack: LiveStack) -> None:
    line = rf"  vmm +{vmm_stack.services['vmm']} +VMM, which deploys machines\n"
    assert re.search(line, summary(vmm_stack.description, 1.0))


def test_app_that_is_not_allowed_does_not_boot_and_boots_once_it_is(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    vm_id = vmm.deploy()
    info = vmm.booted(vm_id)
    assert info["boot_error"].startswith("Failed to request app keys: failed to get app keys from KMS: https://")
    assert "App not allowed: Boot denied: app not registered" in info["boot_error"]
    assert (info["status"], info["boot_progress"], info["app_id"]) == ("exited", "requesting app keys", APP_ID)
    environment = Path(vmm_stack.description["state"]) / "vms" / vm_id / ".decrypted-env"
    environment.write_text("LEFT=by a stack that was killed")
    allow(vmm_stack)
    assert vmm.rpc("StartVm", id=vm_id) is None
    info = vmm.booted(vm_id)
    assert (info["status"], info["boot_progress"], info["boot_error"]) == ("running", "done", "")
    assert steps_of(info)[1:] == [
        *("requesting app keys", "initializing data disk", "data disk ready", "setting up dstack-gateway"),
        *("setting up docker", "starting containers", "done"),
    ]
    assert not environment.exists()
    assert vmm.rpc("StopVm", id=vm_id) is None
    assert vmm.rpc("StartVm", id=vm_id) is None
    assert steps_of(vmm.booted(vm_id))[8:11] == ["requesting app keys", "mounting data disk", "data disk ready"]


def steps_of(info: Any) -> list[str]:
    """Return the steps of all boots."""
    return [event["body"] for event in info["events"] if event["event"] == "boot.progress"]


def test_deployed_app_gets_its_keys_on_its_sockets_and_its_mapped_port(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    allow(vmm_stack)
    port = free_port()
    mapping = {"protocol": "tcp", "host_address": "127.0.0.1", "host_port": port, "vm_port": 8090}
    vm_id = vmm.deploy(ports=[mapping])
    info = vmm.booted(vm_id)
    assert info["boot_progress"] == "done"
    socket = Path(vmm_stack.description["state"]) / "vms" / vm_id / "run" / "dstack.sock"
    for endpoint in (str(socket), f"http://127.0.0.1:{port}"):
        client = DstackClient(endpoint)
        found = client.info()
        assert (found.app_id, found.instance_id) == (APP_ID, info["instance_id"])
        assert len(client.get_key("a", "b").decode_key()) == 32
    assert vmm.rpc("StopVm", id=vm_id) is None
    stopped = vmm.info(vm_id)
    assert (stopped["status"], stopped["instance_id"]) == ("stopped", info["instance_id"])
    assert not socket.exists()
    # The seed of its instance id is kept, as on a machine whose key provider is a KMS.
    vmm.rpc("StartVm", id=vm_id)
    assert vmm.booted(vm_id)["instance_id"] == info["instance_id"]


def test_machine_may_be_stopped_or_removed_while_it_boots(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    allow(vmm_stack)
    vm_id, other = vmm.deploy(), vmm.deploy()
    folder = Path(vmm_stack.description["state"]) / "vms"
    assert vmm.rpc("RemoveVm", id=other) is None
    assert vmm.rpc("StopVm", id=vm_id) is None
    assert vmm.info(vm_id)["status"] == "stopped"
    while vmm.rpc("GetInfo", id=other)["found"]:
        pass
    assert [path.name for path in folder.iterdir()] == [vm_id]
    assert not (folder / vm_id / "run").exists()
    vmm.rpc("StartVm", id=vm_id)
    assert vmm.booted(vm_id)["boot_progress"] == "done"


def test_guest_that_powers_off_is_stopped(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    allow(vmm_stack)
    vm_id = vmm.deploy()
    vmm.booted(vm_id)
    assert vmm.rpc("ShutdownVm", id=vm_id) is None
    while (info := vmm.info(vm_id))["status"] != "stopped":
        assert info["status"] in ("running", "stopping")
    assert info["shutdown_progress"] == "powering off"
    assert vmm.refused("ShutdownVm", id=vm_id) == f"vm {vm_id} is not running"
    assert vmm.rpc("StopVm", id=vm_id) is None


def test_json_and_protobuf_store_the_same(vmm: VmmClient) -> None:
    as_json = vmm.deploy(stopped=True, user_config="x")
    request = pb.VmConfiguration(
        name="app1", image=IMAGE, compose_file=COMPOSE, vcpu=1, memory=1024, disk_size=20, user_config="x", stopped=True
    )
    body = ("-H", "Content-Type: application/octet-stream", "--data-binary", "@-")
    done = subprocess.run(
        ["curl", "-sS", *body, f"{vmm.url}/prpc/Teepod.CreateVm"],
        input=request.SerializeToString(),
        capture_output=True,
        timeout=30,
        check=True,
    )
    as_protobuf = pb.Id.FromString(done.stdout).id
    assert vmm.info(as_json)["configuration"] == vmm.info(as_protobuf)["configuration"]
    assert vmm.rpc("Status", ids=[as_json], brief=True) == {
        "vms": [vmm.info(as_json) | {"configuration": None}],
        "port_mapping_enabled": True,
        "total": 1,
    }


VOLUME = {"source": "a.img", "verity_root": "11" * 32, "target": "/v"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "a/b"}, "Invalid name: a/b"),
    ({"ports": [{"protocol": "tcp", "host_port": 0, "vm_port": 1}]}, "Port mapping is not allowed for tcp:0"),
    ({"ports": [{"protocol": "sctp", "host_port": 1, "vm_port": 1}]}, "Port mapping is not allowed for sctp:1"),
    (
        {"ports": [{"protocol": "tcp", "host_port": 70000, "vm_port": 1}]},
        "Invalid host port: out of range integral type conversion attempted",
    ),
    (
        {"ports": [{"protocol": "tcp", "host_port": 1, "vm_port": 1, "host_address": "localhost"}]},
        "Invalid host address: invalid IP address syntax",
    ),
    (
        {"ports": [{"protocol": "tcp", "host_port": 2, "vm_port": port} for port in (1, 2)]},
        "duplicate host port mapping: tcp 127.0.0.1:2",
    ),
    ({"gpus": {"attach_mode": "all"}}, "GPU is not enabled"),
    ({"gpus": {"attach_mode": "some"}}, "Invalid GPU attach mode: some"),
    ({"networks": [{"mode": ""}]}, "networking mode is required"),
    ({"networking": {"mode": "", "bridge_name": "b"}}, "networking mode is required when bridge is set"),
    ({"networking": {"mode": "custom"}}, "custom networking mode is manifest-only"),
    ({"networking": {"mode": "x"}}, "unsupported networking mode 'x'"),
    ({"networking": {"mode": "user", "bridge_name": "b"}}, "bridge_name is only valid for bridge networking mode"),
    ({"simulated_tee": ""}, "unsupported TEE variant: "),
    ({"simulated_tee": "dstack-tdx"}, "tee simulator credentials are not configured on this VMM"),
    ({"compose_file": "{"}, "invalid app compose JSON: "),
    ({"compose_file": '{"key_provider": 1}'}, "invalid key_provider: 1, expected one of `none`, "),
    ({"compose_file": json.dumps({"verity_volumes": [VOLUME]})}, "volumes requested but cvm.volumes_dir is not"),
    ({"compose_file": json.dumps({"verity_volumes": [VOLUME, VOLUME]})}, "duplicate verity volume target /v"),
    ({"compose_file": json.dumps({"verity_volumes": [VOLUME | {"target": "v"}]})}, "invalid verity_volumes in app-com"),
    ({"compose_file": json.dumps({"verity_volumes": [VOLUME | {"verity_root": "00"}]})}, "invalid verity_volumes in "),
    ({"image": "../x"}, "Failed to load VM: Invalid image name"),
    ({"image": "none"}, "Failed to load VM: Failed to load image: "),
    ({"compose_file": "{}"}, "Failed to load VM: Failed to read compose file: "),
]


@pytest.mark.parametrize(("changed", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_request_that_is_refused_leaves_nothing_behind(
    vmm: VmmClient, vmm_stack: LiveStack, changed: dict[str, Any], text: str
) -> None:
    said = vmm.refused("CreateVm", **configuration(**changed))
    assert said.startswith(text)
    assert vmm.rpc("Status")["total"] == 0
    assert list((Path(vmm_stack.description["state"]) / "vms").iterdir()) == []
    good = {"stopped": True, **({"networking": None} if "networking" in changed else {})}
    assert vmm.info(vmm.deploy(**good))["status"] == "stopped"


def test_ports_of_another_machine_are_taken_until_it_gives_them_up(vmm: VmmClient) -> None:
    port = {"protocol": "tcp", "host_address": "127.0.0.1", "host_port": 7777, "vm_port": 80}
    first = vmm.deploy(stopped=True, ports=[port])
    said = vmm.refused("CreateVm", **configuration(ports=[port | {"host_address": "0.0.0.0"}]))
    assert said == f"host port mapping conflicts with VM {first}: tcp 0.0.0.0:7777"
    second = vmm.deploy(stopped=True)
    said = vmm.refused("UpgradeApp", id=second, update_ports=True, ports=[port])
    assert said == f"host port mapping conflicts with VM {first}: tcp 127.0.0.1:7777"
    assert vmm.rpc("UpgradeApp", id=first, update_ports=True, ports=[]) == {"id": ""}
    assert vmm.rpc("UpgradeApp", id=second, update_ports=True, ports=[port]) == {"id": ""}
    assert vmm.info(second)["configuration"]["ports"] == [port]


def test_update_that_is_refused_changes_nothing(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(stopped=True)
    before = vmm.info(vm_id)
    other = COMPOSE.replace("services: {}", "services: {a: {}}")
    said = vmm.refused("UpdateVm", id=vm_id, compose_file=other, user_config="new", disk_size=1)
    assert said == "Cannot shrink disk size"
    assert vmm.info(vm_id) == before
    assert vmm.refused("UpdateVm", id=vm_id, compose_file="{").startswith("Invalid compose file: ")
    assert vmm.refused("UpdateVm", id="x", compose_file=other) == "The instance x not found"
    answer = vmm.rpc("UpdateVm", id=vm_id, compose_file=other, user_config="new", disk_size=30)
    assert answer == {"id": hashlib.sha256(other.encode()).hexdigest()[:40]}
    after = vmm.info(vm_id)["configuration"]
    assert (after["compose_file"], after["user_config"], after["disk_size"]) == (other, "new", 30)
    assert vmm.info(vm_id)["app_id"] == APP_ID


def test_resize_needs_a_machine_that_does_not_run(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    allow(vmm_stack)
    vm_id = vmm.deploy()
    vmm.booted(vm_id)
    assert vmm.refused("ResizeVm", id=vm_id, vcpu=2) == f"vm should be stopped before resize: {vm_id}"
    vmm.rpc("StopVm", id=vm_id)
    assert vmm.refused("ResizeVm", id=vm_id) == "resize request contains no updates"
    assert vmm.refused("ResizeVm", id=vm_id, memory=0) == "memory must be greater than zero"
    assert vmm.refused("ResizeVm", id="x", vcpu=2) == "vm not found"
    assert vmm.rpc("ResizeVm", id=vm_id, vcpu=2, memory=4096) is None
    after = vmm.info(vm_id)["configuration"]
    assert (after["vcpu"], after["memory"], after["disk_size"]) == (2, 4096, 20)


def test_logs_are_found_by_id_and_channel(vmm: VmmClient) -> None:
    vm_id = vmm.deploy()
    vmm.booted(vm_id)
    status, text = vmm.ask(f"/logs?id={vm_id}&follow=false&ansi=false&lines=100")
    assert (status, text.startswith(b"===== boot @ "), b"[dstack] requesting app keys\n" in text) == (200, True, True)
    assert vmm.ask(f"/logs?id={vm_id}&lines=1") == (200, text.splitlines(keepends=True)[-1])
    assert vmm.ask(f"/logs?id={vm_id}&ch=stdout") == (200, b"")
    assert vmm.ask(f"/logs?id={vm_id}&ch=x") == (400, b"Unknown channel x")
    assert vmm.ask("/logs?id=../x") == (404, b"VM not found")
    assert vmm.ask(f"/logs?id={vm_id}&follow=maybe")[0] == 404


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("StartVm", "Failed to start VM: VM not found"),
        ("StopVm", "Failed to stop VM: VM not found"),
        ("RemoveVm", "Failed to remove VM: VM not found"),
        ("ShutdownVm", "vm not found"),
    ],
)
def test_machine_that_does_not_exist_is_refused(vmm: VmmClient, method: str, text: str) -> None:
    assert vmm.refused(method, id="x") == text
    assert vmm.call("Vmm.Status") == (404, {"error": "Service not found: Vmm.Status"})
    assert vmm.rpc("GetInfo", id="x") == {"found": False, "info": None}


async def test_machines_run_again_after_a_restart_of_the_stack(short_folder: Path) -> None:
    settings: dict[str, Any] = {"vmm": True, "state": short_folder, "seed": "again"}
    with LiveStack(**settings) as live:
        vmm = VmmClient(live.services["vmm"])
        allow(live)
        running, stopped = vmm.deploy(), vmm.deploy(stopped=True)
        before = vmm.booted(running)
        assert before["boot_progress"] == "done"
    (short_folder / "vms" / ".new-half").mkdir()
    with LiveStack(**settings) as live:
        vmm = VmmClient(live.services["vmm"])
        after = vmm.booted(running)
        assert (after["boot_progress"], after["instance_id"]) == ("done", before["instance_id"])
        assert vmm.info(stopped)["status"] == "stopped"
        assert not (short_folder / "vms" / ".new-half").exists()
        assert vmm.deploy(stopped=True) not in (running, stopped)  # though the seed gives their ids again


def test_key_for_an_environment_is_that_of_the_kms(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    answer = vmm.rpc("GetAppEnvEncryptPubKey", app_id=APP_ID)
    kms = f"{vmm_stack.services['kms-src']}/prpc/GetAppEnvEncryptPubKey?json"
    content = ("-H", "Content-Type: application/json", "-d", json.dumps({"app_id": APP_ID}))
    done = subprocess.run(["curl", "-sSk", *content, kms], capture_output=True, timeout=30, check=True)
    assert answer["public_key"] == json.loads(done.stdout)["public_key"]
    assert len(bytes.fromhex(answer["signature_v1"])) == 65
