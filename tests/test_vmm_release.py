"""A VMM of each release: what 0.5 does not have, or does otherwise, beside 0.6."""

import asyncio
import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import bcrypt
import pytest

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.proto import vmm_v05_pb2 as old
from dstack_emu.attest.release import RELEASES, Release
from dstack_emu.deployment.standalone_vmm import StandaloneVmm, VmmSettings
from dstack_emu.transport.events import EventLog
from dstack_emu.vmm.config import AutoRestartSection, VmmConfig
from dstack_emu.vmm.logs import HISTORY, MachineLogs
from dstack_emu.vmm.restarter import Restarter
from tests.vmm import COMPOSE, VmmClient, configuration

T = TypeVar("T")
BOTH = pytest.mark.parametrize("release", RELEASES.values(), ids=RELEASES)
PORT = {"protocol": "tcp", "host_address": "127.0.0.1", "host_port": 7777, "vm_port": 80}


async def asked(folder: Path, release: Release, ask: Callable[[VmmClient], T], document: str = "") -> T:
    """Return what a question to a VMM of a release is answered."""
    file = folder / "vmm.toml"
    file.write_text(f'address = "127.0.0.1:0"\nrun_path = "{folder}/vms"\n{document}')
    settings = VmmSettings(VmmConfig.load(file), release, "vmm", "http://127.0.0.1:1", folder / "discovery")
    async with StandaloneVmm(settings) as vmm:
        return await asyncio.to_thread(ask, VmmClient(vmm.url))


def is_old(release: Release) -> bool:
    return release is RELEASES["0.5"]


def request(release: Release, **changed: Any) -> dict[str, Any]:
    """Return a request to create a machine that does not start."""
    return configuration(**{"stopped": True, "image": f"dstack-emu-{release.version}", **changed})


def created(vmm: VmmClient, release: Release, **changed: Any) -> str:
    vm_id: str = vmm.rpc("CreateVm", **request(release, **changed))["id"]
    return vm_id


# ---- the wire


@BOTH
async def test_machine_has_networks_interfaces_and_a_simulated_tee_in_0_6_alone(
    tmp_path: Path, release: Release
) -> None:
    members = {"networks": [{"mode": "user"}, {"mode": "user"}], "simulated_tee": "dstack-tdx"}

    def ask(vmm: VmmClient) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
        vm_id = created(vmm, release, **members, networking={"mode": "user", "bridge_name": ""})
        binary = vmm.ask("/prpc/GetInfo", "--data-binary", f"\x0a\x24{vm_id}")[1]
        return vmm.info(vm_id), binary, vmm.rpc("GetMeta")

    info, binary, meta = await asked(tmp_path, release, ask, "[cvm.tee_simulator]")
    is_new = not is_old(release)
    assert ("interfaces" in info, "networking" in meta) == (is_new, is_new)
    assert ("running" in info, meta.get("networking", {}).get("max_queues")) == (
        (True, 16) if is_new else (False, None)
    )
    found = info["configuration"]
    assert ({"networks", "simulated_tee"} <= found.keys(), found["no_tee"]) == (is_new, is_new)
    assert found["networking"] == ({"mode": "user", "bridge_name": ""} if is_new else {"mode": "user"})
    in_binary = pb.GetInfoResponse.FromString(binary).info
    assert (len(in_binary.interfaces), len(in_binary.configuration.networks)) == ((2, 2) if is_new else (0, 0))
    assert old.GetInfoResponse.FromString(binary).info.configuration.name == "app1"


@BOTH
async def test_queues_are_those_of_the_vcpus_if_vhost_is_on(tmp_path: Path, release: Release) -> None:
    """Upstream: pull request 1145: one pair for each vCPU, 16 and cvm.max_net_queues at most, and none for `user`."""

    def ask(vmm: VmmClient) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        networks = [{"mode": "bridge", "bridge_name": "b"}, {"mode": "user"}]
        found = [vmm.info(created(vmm, release, vcpu=vcpu, networks=networks)) for vcpu in (2, 9)]
        return found, vmm.rpc("GetMeta"), vmm.rpc("Status", status="running")

    more = "[cvm]\nmax_net_queues = 8\n[cvm.networking]\nvhost = true\n"
    found, meta, running = await asked(tmp_path, release, ask, more)
    assert len(running["vms"]) == (2 if is_old(release) else 0), "in 0.5 an unknown member"
    if is_old(release):
        return
    told = [[(each["vhost"], each["queues"]) for each in info["interfaces"]] for info in found]
    assert told == [[(True, 2), (False, 1)], [(True, 8), (False, 1)]]
    assert (meta["networking"]["max_queues"], meta["networking"]["default_vhost"]) == (8, True)


@BOTH
async def test_update_of_networks_is_an_unknown_member_in_0_5(tmp_path: Path, release: Release) -> None:
    def ask(vmm: VmmClient) -> tuple[tuple[int, Any], str]:
        vm_id = created(vmm, release)
        changes = {"update_networking": True, "networks": [{"mode": "bridge", "bridge_name": "b"}]}
        answer = vmm.call("UpdateVm", id=vm_id, **changes)
        return answer, (tmp_path / f"vms/{vm_id}/vm-manifest.json").read_text()

    answer, manifest = await asked(tmp_path, release, ask)
    assert answer == (200, {"id": ""})
    assert [each["mode"] for each in json.loads(manifest)["networks"]] == (["bridge"] if not is_old(release) else [])


@BOTH
async def test_dhcp_leases_are_reported_to_0_5_alone_and_unknown_calls_have_the_status_of_the_release(
    tmp_path: Path, release: Release
) -> None:
    def ask(vmm: VmmClient) -> tuple[Any, ...]:
        lease = vmm.call("ReportDhcpLease", mac="02:00:00:00:00:01", ip="192.0.2.1")
        return lease, vmm.call("None"), vmm.ask("/guest/None", "-d", "{}")[0], vmm.ask("/api-docs/openapi.json")[1]

    lease, unknown, guest, document = await asked(tmp_path, release, ask)
    status = 400 if is_old(release) else 404
    assert lease == ((200, None) if status == 400 else (404, {"error": "Service not found: ReportDhcpLease"}))
    assert unknown == (status, {"error": "Service not found: None"})
    assert guest == status
    assert ("/prpc/ReportDhcpLease" in json.loads(document)["paths"]) == (status == 400)


# ---- who may call


async def test_0_5_asks_for_a_token_as_bearer_at_logs_alone(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"ann:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    document = f'[auth]\nenabled = true\ntokens = ["token1"]\nhtpasswd_file = "{users}"'
    basic = base64.b64encode(b"ann:secret").decode()

    def check(vmm: VmmClient) -> None:
        for path in ("/prpc/Version", "/", "/api-docs/openapi.json"):
            assert vmm.ask(path)[0] == 200
        wrong = ["X-Admin-Token: token1", f"Authorization: Basic {basic}", "Authorization: Bearer ", "X: y"]
        wrong += ["Authorization: bearer token1", "Authorization: Bearer token0"]
        for header in wrong:
            assert vmm.ask("/logs?id=x", "-H", header)[0] == 401
        assert vmm.ask("/logs?id=x&token=token1")[0] == 401
        assert vmm.ask("/logs?id=x", "-H", "Authorization: Bearer token1") == (200, b"VM not found")

    await asked(tmp_path, RELEASES["0.5"], check, document)


async def test_0_5_with_auth_and_no_token_admits_nobody_to_logs(tmp_path: Path) -> None:
    def check(vmm: VmmClient) -> None:
        assert vmm.ask("/logs?id=x", "-H", "Authorization: Bearer ")[0] == 401
        assert vmm.ask("/prpc/Version")[0] == 200

    await asked(tmp_path, RELEASES["0.5"], check, "[auth]\nenabled = true")


@BOTH
async def test_errors_of_logs_have_a_status_in_0_6_alone(tmp_path: Path, release: Release) -> None:
    def ask(vmm: VmmClient) -> list[tuple[int, bytes]]:
        vm_id = created(vmm, release)
        return [vmm.ask("/logs?id=x"), vmm.ask(f"/logs?id={vm_id}&ch=x"), vmm.ask(f"/logs?id={vm_id}")]

    statuses = (200, 200) if is_old(release) else (404, 400)
    texts = (b"VM not found", b"Unknown channel x")
    assert await asked(tmp_path, release, ask) == [*zip(statuses, texts, strict=True), (200, b"")]


# ---- checks

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "ports": ({"ports": [PORT, PORT]}, "duplicate host port mapping: tcp 127.0.0.1:7777"),
    "custom": ({"networking": {"mode": "custom"}}, "custom networking mode is manifest-only"),
    "unknown mode": ({"networking": {"mode": "x"}}, "unsupported networking mode 'x'"),
    "tee": ({"simulated_tee": "x"}, "unsupported TEE variant: x"),
    "volumes": (
        {"compose_file": json.dumps({**json.loads(COMPOSE), "verity_volumes": [1]})},
        "invalid verity_volumes in app-compose: ",
    ),
}


@BOTH
async def test_request_that_0_6_refuses_is_accepted_by_0_5(tmp_path: Path, release: Release) -> None:
    def ask(vmm: VmmClient) -> list[tuple[int, Any]]:
        return [vmm.call("CreateVm", **request(release, **changed)) for changed, _ in CHANGES.values()]

    answers = await asked(tmp_path, release, ask, "[cvm.port_mapping]\nenabled = true")
    for (status, answer), (_, text) in zip(answers, CHANGES.values(), strict=True):
        assert status == (200 if is_old(release) else 400)
        assert is_old(release) or answer["error"].startswith(text)


@BOTH
async def test_compose_file_is_refused_with_the_text_of_the_release(tmp_path: Path, release: Release) -> None:
    text = "Failed to load VM: Failed to read compose file: " if is_old(release) else "invalid app compose JSON: "

    def ask(vmm: VmmClient) -> tuple[str, Any]:
        return vmm.refused("CreateVm", **request(release, compose_file="{")), vmm.rpc("Status")

    said, after = await asked(tmp_path, release, ask)
    assert said.startswith(text)
    assert after["vms"] == []


@BOTH
async def test_mode_that_0_5_does_not_know_is_the_default(tmp_path: Path, release: Release) -> None:
    def ask(vmm: VmmClient) -> list[Any]:
        modes = ("user", "", "custom", "x") if is_old(release) else ("user", "")
        infos = [vmm.info(created(vmm, release, networking={"mode": mode})) for mode in modes]
        return [(info["configuration"]["networking"] or {}).get("mode") for info in infos]

    assert await asked(tmp_path, release, ask) == ["user", None, "custom", None][: 4 if is_old(release) else 2]


@BOTH
async def test_ports_of_another_machine_are_free_in_0_5(tmp_path: Path, release: Release) -> None:
    def ask(vmm: VmmClient) -> list[int]:
        created(vmm, release, ports=[PORT])
        second = created(vmm, release)
        taken = vmm.call("CreateVm", **request(release, ports=[PORT]))[0]
        return [taken, vmm.call("UpdateVm", id=second, update_ports=True, ports=[PORT])[0]]

    status = 200 if is_old(release) else 400
    assert await asked(tmp_path, release, ask, "[cvm.port_mapping]\nenabled = true") == [status, status]


@BOTH
async def test_resize_to_nothing_is_accepted_by_0_5(tmp_path: Path, release: Release) -> None:
    def ask(vmm: VmmClient) -> list[Any]:
        vm_id = created(vmm, release)
        none = vmm.call("ResizeVm", id=vm_id)
        zero = [vmm.call("ResizeVm", id=vm_id, **{name: 0}) for name in ("vcpu", "memory")]
        smaller = vmm.call("ResizeVm", id=vm_id, disk_size=0)
        return [none, *zero, smaller, vmm.call("ResizeVm", id=vm_id, image="")[0]]

    none, vcpu, memory, smaller, image = await asked(tmp_path, release, ask)
    if is_old(release):
        assert [none, vcpu, memory] == 3 * [(200, None)]
        assert smaller == (400, {"error": "Cannot shrink disk size"})
    else:
        assert none == (400, {"error": "resize request contains no updates"})
        texts = [f"{name} must be greater than zero" for name in ("vcpu", "memory", "disk_size")]
        assert [vcpu, memory, smaller] == [(400, {"error": text}) for text in texts]
    assert image == 400


# ---- what is written, and when machines start again


@BOTH
async def test_guest_is_told_collateral_urls_in_0_6_alone(tmp_path: Path, release: Release) -> None:
    def ask(vmm: VmmClient) -> Any:
        vm_id = created(vmm, release, stopped=False)
        return json.loads((tmp_path / f"vms/{vm_id}/shared/.sys-config.json").read_text())

    told = await asked(tmp_path, release, ask, '[cvm]\npccs_url = "http://pccs"')
    assert told["pccs_url"] == "http://pccs"
    assert told.get("collateral_urls") == (None if is_old(release) else {"pccs": "http://pccs"})


async def test_0_5_keeps_the_serial_log_of_earlier_boots_in_its_history(tmp_path: Path) -> None:
    logs = MachineLogs(tmp_path, max_bytes=1, max_backups=2, rotates=False, history_bytes=500)
    for boot in ("first", "second", "third"):
        logs.begin_boot(0)
        logs.append("serial", f"{boot}\n")
        logs.append("stdout", f"{boot} out\n")
    marker = "\n===== boot @ 1970-01-01T00:00:00Z =====\n\n"
    assert sorted(os.listdir(tmp_path)) == [HISTORY, "serial.log", "stdout.log"]
    assert logs.tail("serial", 100, ansi=True) == b"third\n"
    assert (tmp_path / HISTORY).read_text() == f"{marker}first\n{marker}second\n"
    assert logs.tail("stdout", 100, ansi=True).decode() == f"first out\n{marker}second out\n{marker}third out\n"
    logs.append("serial", "x" * 500 + "\nend\n")
    logs.begin_boot(0)
    assert (tmp_path / HISTORY).read_text() == "end\n"


class Ended:
    """A machine that ended by itself."""

    is_removing, is_started, is_alive, id = False, True, False, "vm-1"


async def test_0_5_starts_a_machine_that_ended_whenever_it_looks() -> None:
    started: list[Any] = []

    async def start(vm: Any) -> None:
        started.append(vm)

    vms: Any = {"vm-1": Ended()}
    restarter = Restarter(AutoRestartSection(max_retries=1), vms, start, EventLog("x"), backs_off=False)
    for now in range(7):
        await restarter.look(now)
    assert len(started) == 7
