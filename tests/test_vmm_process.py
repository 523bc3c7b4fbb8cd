"""Machines without containers: the programs of dstack's own deployments run in them, by their compose files."""

import asyncio
import json
import os
import re
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from dstack_sdk import DstackClient

from dstack_emu.deployment.compose_file import ComposeFile
from dstack_emu.deployment.guest_network import ContainerFiles
from dstack_emu.deployment.guest_programs import program_for
from dstack_emu.simulator.errors import GuestError
from dstack_emu.testing import LiveStack
from tests.kms_machines import AUTH_MOCK, KMS_TOML, app_compose, kms_service, mapping
from tests.recorded import intel_root
from tests.vmm import VmmClient, allow

MACHINES = int(os.environ.get("DSTACK_EMU_MACHINES", "20"))
"""How many are deployed at once; `make machines` deploys more."""


def kms_rpc(url: str, method: str, **body: Any) -> Any:
    """Call an RPC of a KMS with curl."""
    command = ["curl", "-sSk", "--max-time", "20", "-d", json.dumps(body), f"{url}/prpc/{method}?json"]
    return json.loads(subprocess.run(command, capture_output=True, timeout=30, check=True).stdout)


def test_kms_runs_in_a_machine_with_its_webhook_and_keeps_its_keys(vmm: VmmClient) -> None:
    port = mapping(8000)
    services = {"kms": kms_service(), "auth-api": AUTH_MOCK, "web": {"image": "nginx"}}
    vm_id = vmm.deploy(compose_file=app_compose(services), ports=[port])
    info = vmm.booted(vm_id)
    assert (info["boot_progress"], info["boot_error"]) == ("done", "")
    assert "not started: web" in [event["body"] for event in info["events"]]
    where = f"127.0.0.1:{port['host_port']}"
    measured = kms_rpc(f"http://{where}", "Onboard.GetAttestationInfo")
    assert len(measured["mr_aggregated"]) == 64
    made = kms_rpc(f"http://{where}", "Onboard.Bootstrap", domain="kms.example.test")
    subprocess.run(["curl", "-sS", f"http://{where}/finish"], check=True, timeout=30, capture_output=True)
    assert kms_rpc(f"https://{where}", "KMS.GetMeta")["k256_pubkey"] == made["k256_pubkey"]
    assert set(kms_rpc(f"https://{where}", "KMS.GetTempCaCert")) == {"temp_ca_cert", "temp_ca_key", "ca_cert"}
    vmm.rpc("StopVm", id=vm_id)
    vmm.rpc("StartVm", id=vm_id)
    assert vmm.booted(vm_id)["boot_progress"] == "done"
    assert kms_rpc(f"https://{where}", "KMS.GetMeta")["k256_pubkey"] == made["k256_pubkey"]


def deployed_kms(vmm: VmmClient, domain: str, kms_toml: str = KMS_TOML) -> dict[str, Any]:
    """Deploy a KMS with a webhook that allows everything, and bootstrap it; return its port mapping."""
    port = mapping(8000)
    services = {"kms": kms_service(), "auth-api": AUTH_MOCK}
    assert vmm.booted(vmm.deploy(compose_file=app_compose(services, kms_toml), ports=[port]))["boot_progress"] == "done"
    where = f"http://127.0.0.1:{port['host_port']}"
    assert "k256_pubkey" in kms_rpc(where, "Onboard.Bootstrap", domain=domain)
    subprocess.run(["curl", "-sS", f"{where}/finish"], check=True, timeout=30, capture_output=True)
    return port


def test_app_gets_its_keys_from_a_kms_in_a_machine_whose_certificate_has_the_name_of_the_host(vmm: VmmClient) -> None:
    other, own = deployed_kms(vmm, "kms.example.test"), deployed_kms(vmm, "10.0.2.2")
    vm_id = vmm.deploy(kms_urls=[f"https://10.0.2.2:{other['host_port']}"])
    assert "not valid for '10.0.2.2'" in vmm.booted(vm_id)["boot_error"]
    vmm.rpc("UpdateVm", id=vm_id, update_kms_urls=True, kms_urls=[f"https://10.0.2.2:{own['host_port']}/prpc"])
    vmm.rpc("StartVm", id=vm_id)
    assert vmm.booted(vm_id)["boot_progress"] == "done"


def test_app_gets_its_keys_from_the_kms_of_the_stack_at_the_address_of_the_host(
    vmm: VmmClient, vmm_stack: LiveStack
) -> None:
    allow(vmm_stack)
    vm_id = vmm.deploy(kms_urls=[f"https://10.0.2.2:{vmm_stack.services['kms-src'].rpartition(':')[2]}"])
    assert vmm.booted(vm_id)["boot_progress"] == "done"


def test_service_reaches_the_host_at_its_address_and_not_at_loopback(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    policy_port = vmm_stack.services["auth-src"].rpartition(":")[2]
    for host, text in (("127.0.0.1", "Connection refused"), ("10.0.2.2", "OS image is not allowed")):
        port = mapping(8000)
        toml = KMS_TOML.replace("${AUTH_WEBHOOK_URL:-http://auth-api:8000}", f"http://{host}:{policy_port}")
        vmm.booted(vmm.deploy(compose_file=app_compose({"kms": kms_service()}, toml), ports=[port]))
        vmm_stack.control.set_policy("src", {"osImages": [], "kms": {"mrAggregated": [], "devices": []}, "apps": {}})
        said = kms_rpc(f"http://127.0.0.1:{port['host_port']}", "Onboard.Bootstrap", domain="kms.example.test")
        assert text in said["error"], said


FAULTS = {
    "key": (KMS_TOML.replace("cert_dir", "cert_dirs"), "/kms/kms.toml: core.cert_dirs"),
    "syntax": ("[core", "/kms/kms.toml is not TOML"),
    "variable": (
        KMS_TOML + "\n[core.metrics]\nenabled = ${ENABLED:?say it}",
        "variable ENABLED is missing a value: say it",
    ),
}


@pytest.mark.parametrize(("kms_toml", "text"), FAULTS.values(), ids=FAULTS)
def test_error_in_a_kms_toml_is_a_boot_error_and_the_corrected_one_runs(
    vmm: VmmClient, kms_toml: str, text: str
) -> None:
    agent = mapping(8090)
    vm_id = vmm.deploy(compose_file=app_compose({"kms": kms_service()}, kms_toml), ports=[agent])
    info = vmm.booted(vm_id)
    assert info["boot_error"].startswith("failed to start containers: ")
    assert text in info["boot_error"]
    assert (info["status"], info["boot_progress"]) == ("running", "starting containers")
    assert DstackClient(f"http://127.0.0.1:{agent['host_port']}").info().app_id == info["app_id"]
    vmm.rpc("StopVm", id=vm_id)
    vmm.rpc("UpgradeApp", id=vm_id, compose_file=app_compose({"kms": kms_service()}))
    vmm.rpc("StartVm", id=vm_id)
    assert vmm.booted(vm_id)["boot_progress"] == "done"


def test_kms_whose_file_names_the_root_of_intel_does_not_run(vmm: VmmClient) -> None:
    toml = KMS_TOML.replace(
        "[core.image]",
        "[core.attestation]\ninsecure_allow_external_trust_anchors = true\n"
        '[core.attestation.root_ca]\ntdx = "/kms/root.pem"\n[core.image]',
    )
    configs = [*kms_service()["configs"], {"source": "root", "target": "/kms/root.pem"}]
    document = app_compose({"kms": kms_service(configs=configs)}, toml, intel_root().decode())
    said = vmm.booted(vmm.deploy(compose_file=document))["boot_error"]
    assert "kms: the root certificate is Intel's own, and this KMS is an emulator" in said, said


def test_port_of_the_host_that_is_taken_is_a_boot_error_that_names_it(vmm: VmmClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = mapping(8090, taken.getsockname()[1])
        vm_id = vmm.deploy(compose_file=app_compose({}), ports=[port])
        info = vmm.booted(vm_id)
        assert info["status"] == "exited"
        assert info["boot_error"] == (
            f"cannot listen on 127.0.0.1:{port['host_port']}: the address is in use "
            "(set by the port mapping to tcp port 8090 of the machine)"
        )
    vmm.rpc("StartVm", id=vm_id)
    assert vmm.booted(vm_id)["boot_progress"] == "done"


def test_mapped_port_passes_on_the_end_of_one_direction_and_resets_where_nothing_listens(vmm: VmmClient) -> None:
    agent, nothing = mapping(8090), mapping(7)
    vmm.booted(vmm.deploy(compose_file=app_compose({}), ports=[agent, nothing]))
    with socket.create_connection(("127.0.0.1", agent["host_port"]), timeout=20) as client:
        client.sendall(b"GET /prpc/Worker.Version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 200")
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", nothing["host_port"]), timeout=20) as client,
    ):
        client.recv(1)


def test_machines_deployed_at_once_leave_nothing_behind(vmm: VmmClient, vmm_stack: LiveStack) -> None:
    def left() -> tuple[int, int, int, int]:
        tasks = vmm_stack.in_thread(lambda _: len(asyncio.all_tasks()))
        children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
        folders = os.listdir(Path(vmm_stack.description["state"]) / "vms")
        return len(os.listdir("/proc/self/fd")), tasks, len(folders), len(children)

    def deploy(number: int) -> None:
        ports = [mapping(8000) for _ in range(number)]
        ids = [vmm.deploy(compose_file=app_compose({"kms": kms_service()}), ports=[port]) for port in ports]
        booting = ids
        while booting:
            vms = vmm.rpc("Status", brief=True)["vms"]
            assert [vm["boot_error"] for vm in vms if vm["boot_error"]] == []
            booting = [vm["id"] for vm in vms if vm["boot_progress"] != "done"]
        for vm_id in ids:
            assert vmm.rpc("RemoveVm", id=vm_id) is None
        while vmm.rpc("Status")["total"]:
            vmm.ask("/prpc/Version")  # the start of a process, which leaves the VMM time to remove them
        for port in ports:
            socket.create_server(("127.0.0.1", port["host_port"])).close()

    deploy(1)
    before = left()
    deploy(MACHINES)
    while any(now > then for now, then in zip(left(), before, strict=True)):  # the last connection may be closing
        assert vmm.rpc("Status")["total"] == 0


IMAGES = {
    "dstacktee/dstack-kms": True,
    "registry.example/dstack-tee/dstack-kms@sha256:00": True,
    "registry.example:5000/dstack-kms:fixed": True,
    "dstacktee/kms:1": True,
    "localhost/dstack-auth-simple:latest": True,
    "kms/auth-mock": True,
    "nsmithuk/local-kms": False,
    "example/kms": False,
    "example/auth-simple-ui": False,
    "": False,
}


@pytest.mark.parametrize(("image", "known"), IMAGES.items())
def test_programs_are_found_by_the_name_of_their_image(image: str, known: bool) -> None:
    assert (program_for(image, ()) is not None) is known


def test_other_programs_of_the_image_of_a_kms_are_not_taken_for_it() -> None:
    image = "registry.example/dstack-tee/dstack-kms:1"
    assert program_for(image, ("node", "/opt/auth-eth/dist/main.js")) is None
    assert program_for(image, ("sh", "-c", "mkdir -p /kms/certs && exec dstack-kms -c /kms/kms.toml")) is not None


VARIABLES = {
    "${SET}/$SET": "value/value",
    "${EMPTY-a}${EMPTY:-b}${UNSET-c}${UNSET:-d}": "bcd",
    "${SET:-a}${SET+b}${EMPTY:+c}${EMPTY+d}${UNSET}": "valuebd",
    "$$SET $${SET}": "$SET ${SET}",
    "${UNSET:-$SET}": "value",
}


@pytest.mark.parametrize(("text", "expected"), VARIABLES.items())
def test_variables_are_replaced_as_compose_does_it(text: str, expected: str) -> None:
    file = ComposeFile.parse(json.dumps({"services": {"a": {"image": text}}}), {"SET": "value", "EMPTY": ""})
    assert file.image("a") == expected


BAD_FILES = {
    "a: [": "docker-compose.yaml is not YAML: ",
    "[]": "docker-compose.yaml: a table expected, got list",
    "services: {..: {}}": "docker-compose.yaml: services: a name expected, got '..'",
    "services: {a: {ports: [x:1]}}": "services.a.ports: a port expected, got 'x'",
    "services: {a: {ports: ['1-2:3']}}": "services.a.ports: HOST:CONTAINER[/tcp|/udp] expected, got '1-2:3'",
    "services: {a: {volumes: ['../x y:z']}}": "services.a.volumes: an absolute path of the container expected",
    "services: {a: {volumes: ['x/y:/z']}}": "services.a.volumes: the name of a volume or a path expected, got 'x/y'",
    "services: {a: {configs: [c]}}": "services.a.configs: undefined config 'c'",
    "services: {a: {environment: {A: []}}}": "services.a.environment: text expected, got list",
    "services: {a: {environment: ['A=${']}}": 'services.a.environment: invalid interpolation format: "${"',
    'services: {a: {command: "\'"}}': "services.a.command: No closing quotation",
    "x: &x [1,1,1,1,1,1,1,1,1]\ny: &y [*x,*x,*x,*x,*x,*x,*x,*x]\nz: &z [*y,*y,*y,*y,*y,*y,*y,*y]\n"
    "w: &w [*z,*z,*z,*z,*z,*z,*z,*z]\nservices: {a: {x: [*w,*w,*w,*w,*w,*w]}}": "services.a: at most 20000 values",
    "# " + "x" * (1 << 20): "docker-compose.yaml: at most 1048576 bytes are read",
}


@pytest.mark.parametrize(("text", "error"), BAD_FILES.items(), ids=range(len(BAD_FILES)))
def test_compose_file_that_cannot_be_used_says_why(text: str, error: str) -> None:
    with pytest.raises(GuestError, match="^" + re.escape(error)):
        ComposeFile.parse(text, {}).service("a")
    good = ComposeFile.parse("services: {a: {ports: ['127.0.0.1:1-2:3-4', 5, '6:7/udp']}}", {}).service("a")
    assert good.ports == {("tcp", 1): 3, ("tcp", 2): 4, ("udp", 6): 7}


def test_paths_of_a_container_lead_nowhere_else(tmp_path: Path) -> None:
    service = ComposeFile.parse(
        "services: {a: {volumes: ['v:/data', '/var/run/dstack.sock:/var/run/dstack.sock', '/../../x:/y']}}", {}
    ).service("a")
    files = ContainerFiles.of(service, tmp_path, tmp_path / "run")
    assert files.locate("/data/../data/k") == tmp_path / "volumes" / "v" / "k"
    assert files.locate("/var/run/dstack.sock") == tmp_path / "run" / "dstack.sock"
    assert files.locate("../../etc/passwd", "/kms") == tmp_path / "containers" / "a" / "root" / "etc/passwd"
    assert files.locate("/y") == tmp_path / "root" / "x"


@pytest.mark.parametrize("restart", ["unless-stopped", "no"])
def test_kms_that_ends_runs_again_if_its_service_says_so(vmm: VmmClient, restart: str) -> None:
    port = mapping(8000)
    services = {"kms": kms_service(restart=restart), "auth-api": AUTH_MOCK}
    vm_id = vmm.deploy(compose_file=app_compose(services), ports=[port])
    vmm.booted(vm_id)
    where = f"http://127.0.0.1:{port['host_port']}"
    subprocess.run(["curl", "-sS", f"{where}/finish"], check=True, timeout=30, capture_output=True)  # without keys
    while b"kms ended: Failed to onboard" not in vmm.ask(f"/logs?id={vm_id}&lines=100")[1]:
        pass
    command = ["curl", "-s", "--retry", "20", "--retry-all-errors", "--retry-delay", "1", f"{where}/finish"]
    if restart == "no":
        assert subprocess.run(command[:2] + command[-1:], timeout=30, check=False).returncode != 0
        return
    assert subprocess.run(command, timeout=30, check=True, capture_output=True).stdout == b"OK"
