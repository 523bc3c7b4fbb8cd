"""The checks of the VMM's requests: each with its text, in upstream's order, and a request that passes it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import DEFAULT
from dstack_emu.testing import LiveStack
from tests.test_vmm_release import asked
from tests.vmm import APP_ID, COMPOSE, IMAGE, VmmClient, allow, configuration

PORT = {"protocol": "tcp", "host_address": "127.0.0.1", "host_port": 7781, "vm_port": 80}
TAKEN = {**PORT, "host_port": 7782}
WILDCARD = "0.0.0.0"
VOLUME = {"source": "a.img", "verity_root": "11" * 32, "target": "/v"}
TEXT_OF_IP = "Invalid host address: invalid IP address syntax"


def compose(**members: Any) -> str:
    """Return a compose file that is JSON and no app-compose.json."""
    return json.dumps(members)


CREATION: list[tuple[str, dict[str, Any]]] = [
    ("Invalid name: a/b", {"name": "a/b", "ports": [{**PORT, "host_port": 70000, "vm_port": 70000}]}),
    ("Invalid host port: out of range integral type conversion attempted", {"name": ""}),
    ("Invalid vm port: out of", {"ports": [{**PORT, "protocol": "sctp", "vm_port": 70000, "host_address": "x"}]}),
    ("Port mapping is not allowed for sctp:7781", {"ports": [{**PORT, "protocol": "sctp", "host_address": "x"}]}),
    (TEXT_OF_IP, {"ports": [{**PORT, "host_address": "x"}, PORT]}),
    ("duplicate host port mapping: tcp 127.0.0.1:7781", {"ports": [PORT, PORT]}),
    ("GPU is not enabled", {"ports": [TAKEN], "gpus": {"attach_mode": "all"}}),
    ("Invalid GPU attach mode: x", {"gpus": {"attach_mode": "x"}}),
    (
        "invalid verity_volumes in app-compose: ",
        {"gpus": None, "compose_file": compose(verity_volumes=[1], key_provider=1), "simulated_tee": "x"},
    ),
    ("duplicate verity volume target /v", {"compose_file": compose(verity_volumes=[VOLUME, VOLUME], key_provider=1)}),
    ("volumes requested but cvm", {"compose_file": compose(verity_volumes=[VOLUME], key_provider=1)}),
    ("unsupported TEE variant: x", {"compose_file": compose(key_provider=1)}),
    ("tee simulator credentials are not configured", {"simulated_tee": "dstack-tdx"}),
    ("invalid key_provider: 1", {"simulated_tee": None, "networks": [{"mode": "custom"}]}),
    ("custom networking mode is manifest-only", {"compose_file": compose()}),
    ("host port mapping conflicts with VM ", {"networks": [], "image": "../x"}),
    ("Failed to load VM: Invalid image name", {"ports": [PORT]}),
    ("Failed to load VM: Failed to load image: ", {"image": "none"}),
    ("Failed to load VM: Failed to read compose file: ", {"image": IMAGE}),
]
"""The text that is met, and the changes with which it is: each step corrects what the step before met."""


@pytest.fixture(autouse=True)
def _allowed(vmm_stack: LiveStack) -> None:
    allow(vmm_stack)


def test_checks_of_a_new_machine_come_in_the_order_of_upstream(vmm: VmmClient) -> None:
    other = vmm.deploy(stopped=True, ports=[{**TAKEN, "host_address": WILDCARD}])
    request = configuration(gpus=None)
    for text, changes in CREATION:
        request |= changes
        said = vmm.refused("CreateVm", **request)
        assert said.startswith(text), text
    assert [each["id"] for each in vmm.rpc("Status")["vms"]] == [other]
    found = vmm.info(vmm.rpc("CreateVm", **(request | {"compose_file": COMPOSE, "stopped": True}))["id"])
    assert (found["name"], found["configuration"]["ports"]) == ("", [PORT])


UPDATES: list[tuple[str, dict[str, Any]]] = [
    ("Invalid compose file: ", {"id": "x", "compose_file": "{}", "disk_size": 1}),
    ("The instance x not found", {"compose_file": COMPOSE}),
    ("Cannot shrink disk size", {"id": None, "gpus": {"attach_mode": "x"}}),
    ("Invalid GPU attach mode: x", {"disk_size": 20, "update_ports": True, "ports": [{**PORT, "host_address": ""}]}),
    (TEXT_OF_IP, {"gpus": None, "update_networking": True, "networks": [{"mode": ""}]}),
    ("Invalid protocol", {"ports": [{**PORT, "protocol": "sctp"}]}),
    ("Invalid host port: out of range", {"ports": [{**PORT, "host_port": 70000}]}),
    ("Invalid vm port: out of range", {"ports": [{**PORT, "vm_port": 70000}]}),
    ("duplicate host port mapping: tcp 127.0.0.1:7781", {"ports": [PORT, {**PORT, "vm_port": 81}]}),
    ("host port mapping conflicts with VM ", {"ports": [{**TAKEN, "host_address": WILDCARD}]}),
    ("networking mode is required", {"ports": [PORT]}),
]


def test_checks_of_an_update_come_in_the_order_of_upstream(vmm: VmmClient) -> None:
    vmm.deploy(stopped=True, name="other", ports=[TAKEN])
    vm_id = vmm.deploy(stopped=True, ports=[PORT])
    before, request = vmm.info(vm_id), dict[str, Any]()
    for text, changes in UPDATES:
        request |= changes
        request["id"] = request["id"] or vm_id
        assert vmm.refused("UpdateVm", **request).startswith(text), text
        assert vmm.info(vm_id) == before
    request |= {"networks": [{"mode": "user"}], "app_id": "00" * 20}
    assert vmm.rpc("UpdateVm", **request) == {"id": APP_ID}
    after = vmm.info(vm_id)
    # Its own port is no conflict, and an app id is no member of the request.
    assert (after["configuration"]["ports"], after["app_id"]) == ([PORT], APP_ID)
    assert after["configuration"]["networks"] == [{"mode": "user", "bridge_name": ""}]


def test_checks_of_a_resize_come_in_the_order_of_upstream(vmm: VmmClient) -> None:
    vm_id = vmm.deploy()
    zero: dict[str, Any] = {"vcpu": 0, "memory": 0, "disk_size": 0, "image": ""}
    assert vmm.refused("ResizeVm", id="x") == "resize request contains no updates"
    for name in ("vcpu", "memory", "disk_size"):
        assert vmm.refused("ResizeVm", id="x", **zero) == f"{name} must be greater than zero"
        zero[name] = 1
    assert vmm.refused("ResizeVm", id="x", **zero) == "image must not be empty"
    zero["image"] = "none"
    assert vmm.refused("ResizeVm", id="x", **zero) == "vm not found"
    assert vmm.refused("ResizeVm", id=vm_id, **zero) == f"vm should be stopped before resize: {vm_id}"
    vmm.rpc("StopVm", id=vm_id)
    assert vmm.refused("ResizeVm", id=vm_id, **zero) == "Cannot shrink disk size"
    zero["disk_size"] = 20
    assert vmm.refused("ResizeVm", id=vm_id, **zero).startswith("Failed to load VM: Failed to load image: ")
    assert vmm.rpc("ResizeVm", id=vm_id, **(zero | {"image": IMAGE})) is None


def test_update_to_no_cpu_is_not_checked_as_a_resize_is(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(stopped=True)
    assert vmm.rpc("UpdateVm", id=vm_id, vcpu=0) == {"id": ""}
    assert vmm.info(vm_id)["configuration"]["vcpu"] == 0
    vmm.rpc("StartVm", id=vm_id)
    assert vmm.booted(vm_id)["boot_progress"] == "done"


# ---- ids, hashes and addresses


def test_app_id_is_that_of_the_request_in_lower_case_or_the_hash_of_the_exact_bytes(vmm: VmmClient) -> None:
    given = vmm.deploy(stopped=True, app_id="0xABCDEF")
    assert vmm.info(given)["app_id"] == "abcdef"
    other = COMPOSE + " \n"
    digest = hashlib.sha256(other.encode()).hexdigest()
    assert vmm.info(vmm.deploy(stopped=True, compose_file=other))["app_id"] == digest[:40]
    assert vmm.rpc("GetComposeHash", name="a", compose_file=other) == {"hash": digest}
    assert vmm.refused("GetComposeHash", name="a/b", compose_file="{") == "Invalid name: a/b"
    assert vmm.refused("GetComposeHash", name="a", compose_file="{}").startswith("Invalid compose file: ")


def test_interfaces_have_the_mac_addresses_of_the_id(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(stopped=True, networks=[{"mode": "user"}, {"mode": "bridge", "bridge_name": "b"}])
    digests = [hashlib.sha256(text.encode()).digest() for text in (vm_id, f"{vm_id}:1")]
    macs = [bytes([digest[0] & 0xFE | 2, *digest[1:6]]).hex(":") for digest in digests]
    user, bridge = vmm.info(vm_id)["interfaces"]
    assert (user["backend"], user["mac"], user["bridge_name"], user["netdev_id"]) == ("slirp", macs[0], None, "net0")
    assert (bridge["backend"], bridge["mac"], bridge["bridge_name"]) == ("tap_bridge", macs[1], "b")
    assert [(each["vhost"], each["queues"], each["macvtap_mode"]) for each in (user, bridge)] == [(False, 1, None)] * 2
    assert vmm.info(vm_id)["running"] is False


def test_status_finds_by_keyword_and_status_and_in_pages(vmm: VmmClient) -> None:
    """Upstream: list_vms in vmm/src/app.rs, and pull request 1193, which filters before it counts."""
    ids = [vmm.deploy(stopped=True, name=f"vm {number}", app_id=f"0{number}") for number in range(3)]
    for keyword, found in (("vm 1", [ids[1]]), (ids[2], [ids[2]]), ("02", [ids[2]]), (IMAGE, ids), ("none", [])):
        answer = vmm.rpc("Status", keyword=keyword)
        assert set(found) <= {each["id"] for each in answer["vms"]}
        assert answer["total"] == len(answer["vms"])
    for status, found in (("stopped", ids), ("running", []), ("Stopped", []), ("", ids)):
        answer = vmm.rpc("Status", status=status, page=1, page_size=2)
        assert ([each["id"] for each in answer["vms"]], answer["total"]) == (found[:2], len(found))
    for page, size, shown in ((1, 2, ids[:2]), (2, 2, ids[2:]), (3, 2, []), (0, 2, ids), (2, 0, ids)):
        answer = vmm.rpc("Status", page=page, page_size=size)
        assert ([each["id"] for each in answer["vms"]], answer["total"]) == (shown, 3)


def test_request_that_fails_takes_no_port(vmm: VmmClient) -> None:
    assert vmm.refused("CreateVm", **configuration(ports=[PORT], image="none")).startswith("Failed to load VM: ")
    assert vmm.info(vmm.deploy(stopped=True, ports=[PORT]))["configuration"]["ports"] == [PORT]


# ---- simulated TEEs

VARIANTS = {
    "dstack-tdx": True,
    "dstack-gcp-tdx": False,
    "dstack-amd-sev-snp": True,
    "dstack-nitro-enclave": True,
    "dstack-aws-nitro-tpm": False,
}
"""Whether a machine of the variant gets a software TPM if its key provider is one."""


async def test_simulated_tees_live_side_by_side_without_tee_and_some_bring_a_tpm(tmp_path: Path) -> None:
    tpm = COMPOSE.replace('"manifest_version": 2', '"manifest_version": "3", "key_provider": "tpm"')

    def ask(vmm: VmmClient) -> tuple[list[Any], list[str]]:
        common = {"compose_file": tpm, "stopped": True}
        ids = [vmm.rpc("CreateVm", **configuration(simulated_tee=name, **common))["id"] for name in VARIANTS]
        refused = [vmm.refused("CreateVm", **configuration(simulated_tee=name)) for name in ("", "dstack", "tdx")]
        return [vmm.info(vm_id) for vm_id in ids], refused

    infos, refused = await asked(tmp_path, DEFAULT, ask, "[cvm.tee_simulator]")
    assert refused == [f"unsupported TEE variant: {name}" for name in ("", "dstack", "tdx")]
    assert [info["configuration"]["simulated_tee"] for info in infos] == list(VARIANTS)
    assert all(info["configuration"]["no_tee"] for info in infos)
    folders = [tmp_path / "vms" / info["id"] / "vm-manifest.json" for info in infos]
    assert [json.loads(file.read_text())["swtpm"] for file in folders] == list(VARIANTS.values())


# ---- the forms of a request


def test_protobuf_and_json_update_and_delete_the_same(vmm: VmmClient) -> None:
    first, second = vmm.deploy(stopped=True), vmm.deploy(stopped=True)
    asked_in_json = vmm.rpc("UpdateVm", id=first, vcpu=3, user_config="u", kms_urls=["http://k"], update_kms_urls=True)
    request = pb.UpdateVmRequest(id=second, vcpu=3, user_config="u", kms_urls=["http://k"], update_kms_urls=True)
    assert vmm.sent("UpdateVm", request, pb.Id).id == asked_in_json["id"] == ""
    assert vmm.info(first)["configuration"] == vmm.info(second)["configuration"]
    in_use = f"cannot delete image '{IMAGE}': in use by VM 'app1'"
    assert vmm.refused("DeleteImage", id=IMAGE) == in_use
    status, body = vmm.send("DeleteImage", pb.Id(id=IMAGE))
    assert (status, in_use.encode() in body) == (400, True)
