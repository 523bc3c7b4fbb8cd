"""The RPCs of the VMM beside deployment: processes, images, guests, reloading; and how requests are read."""

import hashlib
import http.client
import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dstack_emu.attest.proto import guest_api_pb2, vmm_pb2
from dstack_emu.testing import LiveStack
from tests.vmm import APP_ID, COMPOSE, IMAGE, VmmClient, allow, configuration

WITHOUT_ARGUMENTS = ["ListImages", "Version", "GetMeta", "ListGpus", "ReloadVms", "SvList", "ListRegistryImages"]


@pytest.fixture(scope="module", autouse=True)
def _allowed(vmm_stack: LiveStack) -> None:
    allow(vmm_stack)


def run_path(vmm_stack: LiveStack) -> Path:
    return Path(vmm_stack.description["state"]) / "vms"


def images(vmm_stack: LiveStack) -> Path:
    return Path(vmm_stack.description["state"]) / "vm-images"


# ---- how requests are read


@pytest.mark.parametrize("method", WITHOUT_ARGUMENTS)
def test_call_without_arguments_reads_no_body(vmm: VmmClient, method: str) -> None:
    path = f"/prpc/{method}"
    expected = vmm.ask(f"{path}?json")
    assert expected[0] == 200
    as_json = ("-H", "Content-Type: application/json")
    assert vmm.ask(f"{path}?json", *as_json, "-d", "{not json") == expected
    assert vmm.ask(f"{path}?json", *as_json, "-d", '{"other": 1}') == expected
    assert vmm.ask(path, "--data-binary", "\x01\x02")[0] == 200
    assert vmm.call(f"{method}s") == (404, {"error": f"Service not found: {method}s"})


JUNK: list[Any] = [None, [], "x", 1, {"id": 1}, {"id": None}, {"ports": {}}, {"gpus": []}, {"compose_file": "\ud800"}]
SERVICES = {
    "/prpc": vmm_pb2.DESCRIPTOR.services_by_name["Vmm"],
    "/guest": guest_api_pb2.DESCRIPTOR.services_by_name["ProxiedGuestApi"],
}


@pytest.mark.parametrize("mount", SERVICES)
def test_call_with_any_body_is_answered_or_refused_with_a_reason(vmm: VmmClient, mount: str) -> None:
    url = urlsplit(vmm.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    sent = [("?json", json.dumps(body).encode(), "application/json") for body in JUNK]
    sent += [("?json", body, "application/json") for body in (b"", b"{", b"\xff", b"[" * 10_000)]
    sent += [("", body, "application/octet-stream") for body in (b"\x08", b"\x0a\xff", b"\xff" * 20, b"\x0a\x01\xff")]
    for method, (query, body, kind) in itertools.product(SERVICES[mount].methods, sent):
        connection.request("POST", f"{mount}/{method.name}{query}", body, {"Content-Type": kind})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status in (200, 400), (method.name, body, text)
        assert b"internal error" not in text, (method.name, body, text)
    connection.close()
    assert vmm.rpc("Status")["vms"] == []
    assert vmm.info(vmm.deploy(stopped=True))["status"] == "stopped"


def test_get_is_a_transport_of_every_call(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(stopped=True)
    status, answer = vmm.ask(f"/prpc/GetInfo?id={vm_id}")
    assert (status, json.loads(answer)) == (200, {"found": True, "info": vmm.info(vm_id)})
    assert vmm.ask(f"/prpc/StopVm?id={vm_id}") == (200, b"null")


def test_names_are_read_in_snake_case_alone(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(stopped=True)
    before = vmm.info(vm_id)
    assert vmm.rpc("UpdateVm", id=vm_id, composeFile=COMPOSE + " ", userConfig="x") == {"id": ""}
    assert vmm.info(vm_id) == before
    assert vmm.refused("UpdateVm", id=vm_id, gpus={"attachMode": "listed"}) == "Invalid GPU attach mode: "
    assert vmm.rpc("UpdateVm", id=vm_id, gpus={"attach_mode": "listed"}) == {"id": ""}
    assert before["configuration"]["gpus"] == {"gpus": [], "attach_mode": "listed"}


def test_same_update_has_the_same_answer(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(stopped=True)
    other = COMPOSE + "\n"
    expected = {"id": hashlib.sha256(other.encode()).hexdigest()[:40]}
    for method in ("UpdateVm", "UpgradeApp", "UpdateVm"):
        assert vmm.rpc(method, id=vm_id, compose_file=other) == expected


# ---- starts and stops


def test_start_of_a_running_machine_and_stop_of_a_stopped_one_succeed(vmm: VmmClient) -> None:
    vm_id = vmm.deploy()
    vmm.booted(vm_id)
    assert vmm.rpc("StartVm", id=vm_id) is None
    assert vmm.info(vm_id)["boot_progress"] == "running"
    for _ in range(2):
        assert vmm.rpc("StopVm", id=vm_id, force=True) is None
        assert vmm.info(vm_id)["status"] == "stopped"
    vmm.gone(vm_id)
    assert vmm.refused("RemoveVm", id=vm_id) == "Failed to remove VM: VM not found"


def test_resize_of_a_machine_that_never_ran_is_recorded_and_can_be_repeated(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(stopped=True)
    for _ in range(2):
        assert vmm.rpc("ResizeVm", id=vm_id, disk_size=30) is None
    before = vmm.info(vm_id)
    assert before["configuration"]["disk_size"] == 30
    assert vmm.refused("ResizeVm", id=vm_id, vcpu=4, disk_size=1) == "Cannot shrink disk size"
    assert vmm.refused("ResizeVm", id=vm_id, image="none").startswith("Failed to load VM: Failed to load image: ")
    assert vmm.info(vm_id) == before


def test_process_of_a_machine_is_listed_from_its_first_start_until_it_is_removed(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(stopped=True)
    assert vmm.rpc("SvList") == {"processes": []}
    vmm.rpc("StartVm", id=vm_id)
    vmm.booted(vm_id)
    (process,) = vmm.rpc("SvList")["processes"]
    assert (process["id"], process["name"], process["status"]) == (vm_id, "app1", "running")
    assert vmm.refused("SvRemove", id=vm_id) == "Process is running"
    assert vmm.rpc("SvStop", id=vm_id) is None
    assert vmm.rpc("SvList")["processes"][0]["status"] == "stopped"
    assert vmm.info(vm_id)["status"] == "exited"
    assert vmm.rpc("SvRemove", id=vm_id) is None
    for method in ("SvStop", "SvRemove"):
        assert vmm.refused(method, id=vm_id) == "Supervisor process not found"
    assert vmm.rpc("SvList") == {"processes": []}


# ---- the folder of machines


def test_folder_that_appears_is_loaded_as_a_stopped_machine(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    vm_id = vmm.deploy()
    vmm.booted(vm_id)
    copy, half = run_path(vmm_stack) / "copied", run_path(vmm_stack) / "half"
    shutil.copytree(run_path(vmm_stack) / vm_id, copy, ignore=shutil.ignore_patterns("*.sock"))
    manifest = json.loads((copy / "vm-manifest.json").read_text())
    (copy / "vm-manifest.json").write_text(json.dumps(manifest | {"id": "copied", "name": "copied"}))
    half.mkdir()
    assert vmm.rpc("ReloadVms") == {"loaded": 1, "updated": 0, "removed": 0}
    assert vmm.info("copied")["status"] == "stopped"
    assert vmm.rpc("ReloadVms") == {"loaded": 0, "updated": 0, "removed": 0}
    assert vmm.rpc("Status")["total"] == 2
    half.rmdir()
    shutil.rmtree(copy)
    assert vmm.rpc("ReloadVms") == {"loaded": 0, "updated": 0, "removed": 1}


def test_guest_is_told_of_its_surroundings(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    vm_id = vmm.deploy(vcpu=3, memory=4096, kms_urls=["https://kms.example.test"])
    shared = run_path(vmm_stack) / vm_id / "shared"
    config = json.loads((shared / ".sys-config.json").read_text())
    assert config["kms_urls"] == ["https://kms.example.test"]
    assert config["host_api_url"] == "vsock://2:10000/api"
    assert config["collateral_urls"] == {"pccs": vmm_stack.services["pccs"]}
    vm_config = json.loads(config["vm_config"])
    assert (vm_config["cpu_count"], vm_config["memory_size"]) == (3, 4096 * 1024**2)
    assert (vm_config["image"], vm_config["spec_version"]) == (IMAGE, 1)
    assert (shared / "app-compose.json").read_text() == COMPOSE
    assert not (shared / ".user-config").exists()


@pytest.mark.parametrize(
    ("changes", "memory", "variant", "swtpm"),
    [
        ({}, 2048, "lite", None),
        ({"requirements": {"tdx_measure_acpi_tables": True}}, 2048, None, None),
        ({"requirements": {"tdx_measure_acpi_tables": False}}, 4096, "lite", None),
        ({"key_provider": "tpm", "kms_enabled": False}, 2048, "lite", True),
    ],
)
def test_app_decides_the_variant_of_attestation_and_the_tpm(
    vmm: VmmClient, vmm_stack: LiveStack, changes: dict[str, Any], memory: int, variant: str | None, swtpm: bool | None
) -> None:
    compose = json.dumps(json.loads(COMPOSE) | {"manifest_version": "3"} | changes)
    vm_id = vmm.deploy(compose_file=compose, memory=memory)
    config = json.loads((run_path(vmm_stack) / vm_id / "shared" / ".sys-config.json").read_text())
    vm_config = json.loads(config["vm_config"])
    assert (vm_config.get("tdx_attestation_variant"), vm_config.get("swtpm")) == (variant, swtpm)
    assert vm_config["tdx_measurement"]["measurement"]  # in either variant


# ---- images


def test_image_is_listed_until_it_is_deleted_and_no_machine_uses_it(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    known = vmm.rpc("ListImages")["images"]
    assert [image["name"] for image in known] == [IMAGE]
    folder = images(vmm_stack)
    made = folder / "other-1"
    made.mkdir(parents=True)
    (made / "metadata.json").write_text(known[0]["description"])
    (folder / "broken").mkdir()
    (folder / "broken" / "metadata.json").write_text("{")
    assert [image["name"] for image in vmm.rpc("ListImages")["images"]] == [IMAGE, "other-1"]
    for name in ("", "a/b", "../vms"):
        assert vmm.refused("DeleteImage", id=name) == "invalid image name"
    assert vmm.refused("DeleteImage", id="none") == "image 'none' not found"
    vmm.deploy(stopped=True)
    assert vmm.refused("DeleteImage", id=IMAGE) == f"cannot delete image '{IMAGE}': in use by VM 'app1'"
    assert vmm.rpc("DeleteImage", id="other-1") is None
    assert vmm.rpc("ListImages")["images"] == known
    shutil.rmtree(folder)


def test_image_without_the_measurement_of_the_lite_variant_cannot_be_used(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    folder = images(vmm_stack) / "old-1"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(vmm.rpc("ListImages")["images"][0]["description"])
    said = vmm.refused("CreateVm", **configuration(image="old-1"))
    assert said.startswith("Failed to load VM: Failed to load image: ")
    assert vmm.rpc("Status")["vms"] == []
    shutil.rmtree(images(vmm_stack))


def test_nothing_is_pulled_without_a_registry(vmm: VmmClient) -> None:
    assert vmm.refused("PullRegistryImage", tag="dstack-0.6.0") == "image registry is not configured"
    assert vmm.rpc("ListRegistryImages") == {"images": []}


# ---- guests


def test_guest_answers_for_its_machine_alone(vmm: VmmClient) -> None:
    first, other = vmm.deploy(vcpu=2, memory=4096), vmm.deploy(name="other")
    ids = {vm_id: vmm.booted(vm_id)["instance_id"] for vm_id in (first, other)}
    for vm_id, instance_id in ids.items():
        found = vmm.rpc("../guest/Info", id=vm_id)
        assert (found["app_id"], found["instance_id"]) == (APP_ID, instance_id)
        assert "-----BEGIN CERTIFICATE-----" in found["app_cert"]
        assert json.loads(found["tcb_info"])["app_compose"] == COMPOSE
    system = vmm.rpc("../guest/SysInfo", id=first)
    assert (system["num_cpus"], system["total_memory"]) == (2, 4096 * 1024**2)
    network = vmm.rpc("../guest/NetworkInfo", id=first)
    assert (network["gateways"], network["dns_servers"]) == ([{"address": "10.0.2.2"}], ["10.0.2.3"])
    assert vmm.rpc("../guest/ListContainers", id=first) == {"containers": []}
    body = guest_api_pb2.Id(id=first).SerializeToString()
    asked = ["curl", "-sS", "--data-binary", "@-", "-H", "Content-Type: application/octet-stream"]
    done = subprocess.run([*asked, f"{vmm.url}/guest/Info"], input=body, capture_output=True, timeout=30, check=True)
    assert guest_api_pb2.GuestInfo.FromString(done.stdout).instance_id.hex() == ids[first]
    assert vmm.rpc("../guest/Shutdown", id=first) is None
    while vmm.info(first)["status"] != "stopped":
        pass
    assert vmm.refused("../guest/Info", id=first) == f"vm {first} is not running"
    assert vmm.refused("../guest/Info", id="x") == "vm not found"
    assert vmm.info(other)["status"] == "running"
    vmm.rpc("StartVm", id=first)
    assert vmm.booted(first)["instance_id"] == ids[first]
    assert vmm.rpc("../guest/Info", id=first)["instance_id"] == ids[first]


# ---- what describes it


def test_openapi_document_has_every_public_route_and_is_always_the_same(vmm: VmmClient) -> None:
    status, document = vmm.ask("/api-docs/openapi.json")
    assert (status, vmm.ask("/api-docs/openapi.json")[1]) == (200, document)
    described = json.loads(document)
    rpcs = {f"/prpc/{method.name}" for method in vmm_pb2.DESCRIPTOR.services_by_name["Vmm"].methods}
    guest = guest_api_pb2.DESCRIPTOR.services_by_name["ProxiedGuestApi"]
    rpcs |= {f"/guest/{method.name}" for method in guest.methods}
    assert set(described["paths"]) == rpcs | {"/", "/health", "/logs", "/api-docs/openapi.json"}
    version = vmm.rpc("Version")
    assert described["info"]["version"] == f"v{version['version']} (git:{version['rev']})"
    schemas = described["components"]["schemas"]
    assert schemas["VmConfiguration"]["properties"]["ports"]["items"] == {"$ref": "#/components/schemas/PortMapping"}
    info = schemas["GetInfoResponse"]["properties"]["info"]
    assert info == {"anyOf": [{"$ref": "#/components/schemas/VmInfo"}, {"type": "null"}]}
    assert vmm.rpc("GetInfo", id="") == {"found": False, "info": None}
    refused = described["paths"]["/prpc/GetInfo"]["post"]["responses"]["400"]["content"]
    assert set(refused) == {"application/json", "application/octet-stream"}


def test_page_lists_machines_without_script(vmm: VmmClient) -> None:
    port = {"protocol": "tcp", "host_address": "127.0.0.1", "host_port": 7778, "vm_port": 80}
    vm_id = vmm.deploy(stopped=True, name="a (b)", ports=[port], app_id="<b>&")
    status, answer = vmm.ask("/", "-i")
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert (status, "Content-Security-Policy: default-src 'none'" in head) == (200, True)
    assert f'<a href="/logs?id={vm_id}&amp;ch=serial">serial</a>' in body
    assert "tcp 127.0.0.1:7778 to 80" in body
    assert "<td>&lt;b&gt;&amp;</td>" in body
    assert "<script" not in body


def test_health_of_the_stack_has_that_of_its_vmm(vmm_stack: LiveStack) -> None:
    assert set(vmm_stack.control.health().values()) == {"ok"}


def test_app_id_that_is_no_hex_ends_the_boot_and_is_corrected_by_another_machine(vmm: VmmClient) -> None:
    vm_id = vmm.deploy(app_id="zz")
    assert vmm.booted(vm_id)["boot_error"] == "app id: hex expected, got 'zz'"
    assert vmm.booted(vmm.deploy())["boot_progress"] == "done"


def test_configuration_has_the_members_of_the_request(vmm: VmmClient) -> None:
    found = vmm.info(vmm.deploy(stopped=True, hugepages=True, pin_numa=True, no_tee=True))["configuration"]
    request = configuration(stopped=True, hugepages=True, pin_numa=True, no_tee=True, app_id=APP_ID)
    assert {name: found[name] for name in request if name != "swap_size"} == {
        name: value for name, value in request.items() if name != "swap_size"
    }
