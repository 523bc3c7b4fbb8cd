"""The VMM: machines that are deployed by its RPCs, with the requests of vmm-cli.py, and refused with upstream's texts.

The requests have the members that vmm-cli.py of 312dc605 sends, recorded from it.
"""

import hashlib
import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dstack_sdk import DstackClient

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import DEFAULT
from dstack_emu.testing import LiveStack
from tests.ports import free_port

COMPOSE = json.dumps(
    {
        "manifest_version": 2,
        "name": "app1",
        "runner": "docker-compose",
        "docker_compose_file": "services: {}",
        "kms_enabled": True,
        "gateway_enabled": False,
        "allowed_envs": [],
        "secure_time": False,
    },
    indent=4,
    ensure_ascii=False,
)
"""As vmm-cli.py writes it."""

APP_ID = hashlib.sha256(COMPOSE.encode()).hexdigest()[:40]
IMAGE = f"dstack-emu-{DEFAULT.version}"


class VmmClient:
    """Asks a VMM over HTTP, as vmm-cli.py does, with curl."""

    def __init__(self, stack: LiveStack) -> None:
        self.stack, self.url = stack, stack.services["vmm"]

    def ask(self, path: str, *arguments: str) -> tuple[int, bytes]:
        command = ["curl", "-sS", "--max-time", "20", "-o", "-", "-w", "\n%{http_code}", *arguments, self.url + path]
        out = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
        body, _, status = out.rpartition(b"\n")
        return int(status), body

    def rpc(self, method: str, **body: Any) -> Any:
        """Call one RPC in JSON that succeeds."""
        status, answer = self.call(method, **body)
        assert status == 200, answer
        return answer

    def call(self, method: str, **body: Any) -> tuple[int, Any]:
        content = ("-H", "Content-Type: application/json", "-d", json.dumps(body))
        status, answer = self.ask(f"/prpc/{method}?json", *content)
        return status, json.loads(answer)

    def refused(self, method: str, **body: Any) -> str:
        """Call one RPC in JSON that is refused with 400; return the text."""
        status, answer = self.call(method, **body)
        assert status == 400, answer
        assert list(answer) == ["error"]
        text: str = answer["error"]
        return text

    def deploy(self, **changed: Any) -> str:
        """Create a machine; return its id."""
        vm_id: str = self.rpc("CreateVm", **configuration(**changed))["id"]
        return vm_id

    def info(self, vm_id: str) -> Any:
        return self.rpc("GetInfo", id=vm_id)["info"]

    def booted(self, vm_id: str, boots: int = 1) -> Any:
        """Follow a machine's log until its boot of that number has ended; return its info."""
        follow = ["curl", "-sSN", "--max-time", "20", f"{self.url}/logs?id={vm_id}&follow=true"]
        with subprocess.Popen(follow, stdout=subprocess.PIPE) as follower:
            assert follower.stdout is not None
            ends = (line for line in follower.stdout if line.startswith((b"[dstack] done", b"error: ")))
            assert len(list(itertools.islice(ends, boots))) == boots
            follower.kill()
        return self.info(vm_id)

    def gone(self, vm_id: str) -> None:
        """Remove a machine, and wait until it is gone."""
        assert self.rpc("RemoveVm", id=vm_id) is None
        while self.rpc("GetInfo", id=vm_id)["found"]:
            pass


def configuration(**changed: Any) -> dict[str, Any]:
    """Return the request of `vmm-cli.py deploy`."""
    return {
        "name": "app1",
        "image": IMAGE,
        "compose_file": COMPOSE,
        "vcpu": 1,
        "memory": 1024,
        "disk_size": 20,
        "app_id": None,
        "user_config": "",
        "ports": [],
        "hugepages": False,
        "pin_numa": False,
        "stopped": False,
        "no_tee": False,
        "swap_size": 0,
    } | changed


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    with LiveStack(vmm=True) as live:
        yield live


@pytest.fixture
def vmm(stack: LiveStack) -> Iterator[VmmClient]:
    """The VMM of the stack, which allows the app; every machine is removed afterwards."""
    client = VmmClient(stack)
    yield client
    for vm in client.rpc("Status")["vms"]:
        client.gone(vm["id"])


def allow(stack: LiveStack) -> None:
    """Allow the app in the policy of the source KMS."""
    policy = stack.control.policy("src")
    compose_hash = hashlib.sha256(COMPOSE.encode()).hexdigest()
    policy["apps"][f"0x{APP_ID}"] = {"composeHashes": [f"0x{compose_hash}"], "devices": [], "allowAnyDevice": True}
    stack.control.set_policy("src", policy)


def test_app_that_is_not_allowed_does_not_boot_and_boots_once_it_is(vmm: VmmClient) -> None:
    vm_id = vmm.deploy()
    info = vmm.booted(vm_id)
    assert "App not allowed: Boot denied: app not registered" in info["boot_error"]
    assert (info["status"], info["boot_progress"], info["app_id"]) == ("exited", "requesting app keys", APP_ID)
    allow(vmm.stack)
    assert vmm.rpc("StartVm", id=vm_id) is None
    info = vmm.booted(vm_id, 2)
    assert (info["status"], info["boot_progress"], info["boot_error"]) == ("running", "done", "")
    assert [event["body"] for event in info["events"] if event["event"] == "boot.progress"][-1] == "done"


def test_deployed_app_gets_its_keys_on_its_sockets_and_its_mapped_port(vmm: VmmClient) -> None:
    allow(vmm.stack)
    port = free_port()
    mapping = {"protocol": "tcp", "host_address": "127.0.0.1", "host_port": port, "vm_port": 8090}
    vm_id = vmm.deploy(ports=[mapping])
    info = vmm.booted(vm_id)
    assert info["boot_progress"] == "done"
    socket = Path(vmm.stack.description["state"]) / "vms" / vm_id / "run" / "dstack.sock"
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
    assert vmm.booted(vm_id, 2)["instance_id"] == info["instance_id"]


def test_guest_that_powers_off_is_stopped(vmm: VmmClient) -> None:
    allow(vmm.stack)
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
    ({"image": "../x"}, "Failed to load VM: Invalid image name"),
    ({"image": "none"}, "Failed to load VM: Failed to load image: "),
    ({"compose_file": "{}"}, "Failed to load VM: Failed to read compose file: "),
]


@pytest.mark.parametrize(("changed", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_request_that_is_refused_leaves_nothing_behind(vmm: VmmClient, changed: dict[str, Any], text: str) -> None:
    said = vmm.refused("CreateVm", **configuration(**changed))
    assert said.startswith(text)
    assert vmm.rpc("Status")["total"] == 0
    assert list((Path(vmm.stack.description["state"]) / "vms").iterdir()) == []
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


def test_resize_needs_a_machine_that_does_not_run(vmm: VmmClient) -> None:
    allow(vmm.stack)
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
        ("Vmm.Status", "Service not found: Vmm.Status"),
    ],
)
def test_machine_or_method_that_does_not_exist_is_refused(vmm: VmmClient, method: str, text: str) -> None:
    assert vmm.refused(method, id="x") == text
    assert vmm.rpc("GetInfo", id="x") == {"found": False, "info": None}


async def test_machines_run_again_after_a_restart_of_the_stack(short_folder: Path) -> None:
    settings: dict[str, Any] = {"vmm": True, "state": short_folder, "seed": "again"}
    with LiveStack(**settings) as live:
        vmm = VmmClient(live)
        allow(live)
        running, stopped = vmm.deploy(), vmm.deploy(stopped=True)
        before = vmm.booted(running)
        assert before["boot_progress"] == "done"
    (short_folder / "vms" / ".new-half").mkdir()
    with LiveStack(**settings) as live:
        vmm = VmmClient(live)
        after = vmm.booted(running, 2)
        assert (after["boot_progress"], after["instance_id"]) == ("done", before["instance_id"])
        assert vmm.info(stopped)["status"] == "stopped"
        assert not (short_folder / "vms" / ".new-half").exists()
