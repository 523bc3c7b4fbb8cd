"""The lifecycle of machines: restarts, logs that begin anew, calls that meet, and folders that survive anything.

What runs a machine is an argument of the VMM; here it is a machine that runs nothing, so that a test decides when it
boots, ends, and stops.
"""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.protobuf.message import Message
from pydantic import ValidationError

from dstack_emu.attest.proto import guest_api_pb2 as guest_pb
from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import DEFAULT
from dstack_emu.vmm.config import AutoRestartSection, CvmSection, LogSection, VmmConfig
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.guest_service import PATIENCE, guest_table
from dstack_emu.vmm.logs import MachineLogs
from dstack_emu.vmm.machine import GuestConfig, HostApi, Launch
from dstack_emu.vmm.restart import Decision, RestartState
from dstack_emu.vmm.restarter import EXHAUSTED
from dstack_emu.vmm.service import VmmService
from tests.audited import calls, file_events
from tests.repository import ROOT

MEMORY = "/dev/shm"
COMPOSE = json.dumps({"manifest_version": 2, "name": "app1", "runner": "docker-compose"})


@dataclass
class IdleMachine:
    """A machine that runs nothing; it stops once `may_stop` is set."""

    host: HostApi
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    may_stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> None:
        await self.ended.wait()

    async def stop(self) -> None:
        await self.may_stop.wait()
        self.ended.set()

    async def shutdown(self) -> None:
        self.host.notify("shutdown.progress", "powering off")
        self.ended.set()

    async def guest_call(self, method: str) -> Message:
        if method == "Info":
            await asyncio.Event().wait()  # it never answers
        raise VmmError(method)


@dataclass
class IdleMachines:
    """Starts machines; `refusal` is why it does not."""

    started: list[IdleMachine] = field(default_factory=list)
    refusal: str = ""
    stops_at_once: bool = True

    def require_image(self, name: str) -> None:
        if name == "none":
            raise VmmError("no such image")

    def built_in_images(self) -> Mapping[str, bytes]:
        return {}

    def guest_config(self, launch: Launch) -> GuestConfig:
        return GuestConfig("{}")

    async def discard(self, vm_id: str) -> None:
        pass

    async def start(self, launch: Launch, host: HostApi) -> IdleMachine:
        if self.refusal:
            raise VmmError(self.refusal)
        machine = IdleMachine(host)
        if self.stops_at_once:
            machine.may_stop.set()
        self.started.append(machine)
        return machine


@pytest.fixture
def machines() -> IdleMachines:
    return IdleMachines()


RESTARTS = AutoRestartSection(interval=3600, max_retries=2, initial_backoff=5, max_backoff=8, reset_window=100)


@pytest.fixture
def make(tmp_path: Path, machines: IdleMachines) -> Callable[[], Fleet]:
    """Make a VMM of the same folder each time."""
    numbers = itertools.count(1)
    config = VmmConfig(run_path=tmp_path / "vms", cvm=CvmSection(auto_restart=RESTARTS, cid_pool_size=2))
    options = {"release": DEFAULT, "clock": lambda: 1_767_225_600.0, "new_id": lambda: f"vm-{next(numbers)}"}
    return lambda: Fleet(config, machines, entropy=os.urandom, **options)  # type: ignore[arg-type]


@pytest.fixture
async def fleet(make: Callable[[], Fleet]) -> AsyncIterator[Fleet]:
    fleet = make()
    await fleet.open()
    yield fleet
    await fleet.close()


def request(**changed: object) -> pb.VmConfiguration:
    given: dict[str, object] = {"name": "a", "image": "i", "compose_file": COMPOSE, "disk_size": 1, **changed}
    return pb.VmConfiguration(**given)  # type: ignore[arg-type]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def turns(number: int = 5) -> None:
    """Let other tasks run."""
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.fixture
async def large_fleet(tmp_path: Path, machines: IdleMachines) -> AsyncIterator[Fleet]:
    """A VMM with room for many machines."""
    numbers = itertools.count(1)
    options = {"release": DEFAULT, "clock": lambda: 0.0, "new_id": lambda: f"vm-{next(numbers)}"}
    config = VmmConfig(run_path=tmp_path / "vms")
    fleet = Fleet(config, machines, entropy=os.urandom, **options)  # type: ignore[arg-type]
    await fleet.open()
    yield fleet
    await fleet.close()


async def test_creating_a_machine_asks_no_more_of_the_disk_however_many_there_are(large_fleet: Fleet) -> None:
    counted = []
    for _ in range(12):
        with file_events() as events:
            await large_fleet.create(request())
        counted.append(events)
    assert counted[-1] == counted[1]
    assert counted[1]["open"] > 0
    assert counted[-1].keys().isdisjoint({"os.listdir", "os.scandir"})


async def test_status_of_some_machines_calls_no_more_however_many_others_there_are(large_fleet: Fleet) -> None:
    service, counted = VmmService(large_fleet), []
    asked = pb.StatusRequest(ids=["vm-2", "none", "vm-1", "vm-2"])
    for _ in range(12):
        await large_fleet.create(request(stopped=True))
        await service.status(asked)  # the first time fills caches
        with calls() as counts:
            answer = await service.status(asked)
        counted.append(counts)
    assert [vm.id for vm in answer.vms] == ["vm-1", "vm-2"]
    assert answer.total == 2
    assert counted[-1] == counted[1]


async def test_new_machine_has_no_id_of_a_folder_that_the_vmm_has_not_loaded(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "vms" / "vm-1").mkdir()
    assert await fleet.create(request()) == "vm-2"


# ---- restarts


def test_restarts_back_off_and_end() -> None:
    state = RestartState()
    decisions = [state.observe_exited(now, RESTARTS) for now in (0, 4, 5, 12, 13, 14, 22, 1000)]
    wait = Decision("wait")
    scheduled, first, second = Decision("scheduled", 5), Decision("restart", 1), Decision("restart", 2)
    assert decisions == [scheduled, wait, first, wait, second, Decision("exhausted", 2), wait, wait]
    assert not state.observe_running(1000, RESTARTS)
    assert not state.observe_running(1099, RESTARTS)
    assert state.observe_running(1100, RESTARTS)
    assert state.observe_exited(1200, RESTARTS) == scheduled


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"interval": 0}, "interval must be greater than zero when enabled"),
        ({"initial_backoff": 0}, "initial_backoff must be greater than zero when enabled"),
        ({"initial_backoff": 9, "max_backoff": 8}, "initial_backoff must not exceed max_backoff"),
    ],
)
def test_restarts_that_cannot_be_are_refused_unless_they_are_off(settings: dict[str, int], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        AutoRestartSection(**settings)  # type: ignore[arg-type]
    assert not AutoRestartSection(**settings, enabled=False).enabled


async def test_machine_that_ends_by_itself_is_started_again_until_that_is_given_up(
    fleet: Fleet, machines: IdleMachines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dstack_emu.vmm")
    vm = fleet.vms[await fleet.create(request())]
    stopped = await fleet.create(request(stopped=True))
    for now in range(0, 60):
        machines.started[-1].ended.set()
        await turns()
        await fleet.restarter.look(now)
    assert (len(machines.started), str(vm.status)) == (3, "exited")
    assert [event.event for event in vm.events] == [EXHAUSTED]
    assert fleet.vms[stopped].status == "stopped"
    said = [record.getMessage() for record in caplog.records]
    for text in ("automatic restart scheduled", "automatic restart attempt", "automatic restart retry limit exhausted"):
        assert any(text in line for line in said)
    await fleet.start(vm.id)
    machines.started[-1].ended.set()
    await turns()
    await fleet.restarter.look(100)
    await fleet.restarter.look(105)
    assert str(vm.status) == "running"
    await fleet.stop(vm.id)
    await fleet.restarter.look(106)
    await fleet.restarter.look(500)
    assert str(vm.status) == "stopped"


async def test_machine_that_is_healthy_for_long_may_be_restarted_as_often_again(
    fleet: Fleet, machines: IdleMachines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dstack_emu.vmm")
    vm = fleet.vms[await fleet.create(request())]
    machines.started[-1].ended.set()
    await turns()
    for now in (0, 5, 6, 106):
        await fleet.restarter.look(now)
    assert "automatic restart retry budget reset after healthy window" in caplog.text
    assert vm.status == "running"


# ---- calls that meet


async def test_stop_and_start_in_the_middle_of_a_stop_are_carried_out_in_turn(
    fleet: Fleet, machines: IdleMachines
) -> None:
    machines.stops_at_once = False
    vm = fleet.vms[await fleet.create(request())]
    stops = [asyncio.create_task(fleet.stop(vm.id)) for _ in range(2)]
    await turns()
    assert vm.status == "stopping"
    start = asyncio.create_task(fleet.start(vm.id))
    await turns()
    machines.started[0].may_stop.set()
    await asyncio.gather(*stops, start)
    assert (vm.status, len(machines.started)) == ("running", 2)
    machines.started[1].may_stop.set()


async def test_machine_that_is_being_removed_is_not_started_and_is_gone_in_the_end(
    fleet: Fleet, machines: IdleMachines, tmp_path: Path
) -> None:
    machines.stops_at_once = False
    vm = fleet.vms[await fleet.create(request())]
    await asyncio.gather(fleet.remove(vm.id), fleet.remove(vm.id))
    await turns()
    assert vm.status == "removing"
    with pytest.raises(VmmError, match="vm should be stopped before resize"):
        await fleet.resize(pb.ResizeVmRequest(id=vm.id, vcpu=2))
    start = asyncio.create_task(fleet.start(vm.id))
    machines.started[0].may_stop.set()
    with pytest.raises(VmmError, match="Failed to start VM: VM is being removed"):
        await start
    await turns(20)
    assert (fleet.vms, names_in(tmp_path / "vms")) == ({}, [])
    with pytest.raises(VmmError, match="Failed to remove VM: VM not found"):
        await fleet.remove(vm.id)


async def test_update_of_a_running_machine_counts_from_its_next_start(fleet: Fleet, machines: IdleMachines) -> None:
    vm_id = await fleet.create(request())
    other = COMPOSE + " "
    await fleet.update(pb.UpdateVmRequest(id=vm_id, compose_file=other, user_config="x"))
    assert len(machines.started) == 1
    await fleet.stop(vm_id)
    await fleet.start(vm_id)
    assert len(machines.started) == 2
    assert fleet.vms[vm_id].folder.compose_file() == other


async def test_machine_that_cannot_be_started_leaves_nothing_and_its_cid_is_free(
    fleet: Fleet, machines: IdleMachines, tmp_path: Path
) -> None:
    for refusal in ("it is off", "it is off", "it is off"):
        machines.refusal = refusal
        with pytest.raises(VmmError, match="it is off"):
            await fleet.create(request())
        assert (fleet.vms, names_in(tmp_path / "vms")) == ({}, [])
    machines.refusal = ""
    for _ in range(2):
        await fleet.create(request())
    with pytest.raises(VmmError, match="CID pool exhausted"):
        await fleet.create(request())
    assert len(fleet.vms) == 2


async def test_machines_are_what_they_were_after_the_vmm_starts_again(
    fleet: Fleet, make: Callable[[], Fleet], machines: IdleMachines
) -> None:
    running, stopped = [await fleet.create(request(stopped=stopped)) for stopped in (False, True)]
    fleet.vms[running].folder.write("shared/.encrypted-env", b"\x00\xff")
    await fleet.close()
    again = make()
    await again.open()
    assert {vm.id: vm.status for vm in again.ordered()} == {running: "running", stopped: "stopped"}
    assert again.vms[running].folder.encrypted_env() == b"\x00\xff"
    assert again.vms[running].cid != again.vms[stopped].cid
    again.vms[stopped].folder.mark_removing()
    await again.close()
    third = make()
    await third.open()
    assert list(third.vms) == [running]
    await third.close()


async def test_machines_keep_their_cids_over_a_reload(fleet: Fleet) -> None:
    ids = [await fleet.create(request(stopped=stopped)) for stopped in (False, True)]
    before = [fleet.vms[vm_id].cid for vm_id in ids]
    for _ in range(2):
        assert fleet.reload() == (0, 0, 0)
    assert [fleet.vms[vm_id].cid for vm_id in ids] == before
    assert [fleet.vms[vm_id].status for vm_id in ids] == ["running", "stopped"]


async def test_guest_that_does_not_answer_ends_the_call_with_an_error(fleet: Fleet) -> None:
    vm_id = await fleet.create(request())
    calls = guest_table(fleet, patience=0.01).rpcs
    with pytest.raises(VmmError, match=f"the guest of vm {vm_id} did not answer within 0.01 seconds"):
        await calls["Info"].handler(None, guest_pb.Id(id=vm_id))
    with pytest.raises(VmmError, match="SysInfo"):
        await calls["SysInfo"].handler(None, guest_pb.Id(id=vm_id))
    assert PATIENCE < 15


# ---- logs


async def test_log_begins_anew_and_its_followers_miss_nothing(tmp_path: Path) -> None:
    logs = MachineLogs(tmp_path, max_bytes=60, max_backups=2)
    logs.append("serial", "first\n")
    inode = (tmp_path / "serial.log").stat().st_ino
    followed = logs.follow("serial", 10, ansi=True)
    read = [await anext(followed)]
    expected = "first\n"
    for number in range(3):
        text = f"{number}: {'x' * 30}\n"
        logs.append("serial", text)
        expected += text
    read.append(await anext(followed))
    logs.begin_boot(0)
    logs.append("serial", "last\n")
    logs.close()
    read += [part async for part in followed]
    assert b"".join(read).decode() == expected + "===== boot @ 1970-01-01T00:00:00Z =====\nlast\n"
    assert (tmp_path / "serial.log").stat().st_ino == inode
    assert names_in(tmp_path) == ["serial.log", "serial.log.1", "serial.log.2"]
    logs.begin_boot(0)
    assert (tmp_path / "serial.log.1").read_text().endswith("=====\nlast\n")


def test_last_boot_is_the_newest_segment_and_an_empty_log_takes_none(tmp_path: Path) -> None:
    logs = MachineLogs(tmp_path, max_bytes=0, max_backups=3)
    for number in range(3):
        logs.begin_boot(number)
    assert names_in(tmp_path) == ["serial.log", "serial.log.1", "serial.log.2"]
    assert "00:00:01Z" in (tmp_path / "serial.log.1").read_text()
    assert LogSection(max_bytes="4M").max_bytes == 4 << 20  # type: ignore[arg-type]


# ---- the disk


def test_crash_or_a_failing_disk_at_any_step_leaves_a_whole_machine_or_none() -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        run = [sys.executable, "-m", "tests.crashing_vmm_store", folder]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout).values():
        assert min(found["crash"]["before"], found["crash"]["after"]) >= 5
        assert min(found["disk"]["refused"], found["disk"]["done"]) >= 3
        assert found["crash"]["crashes of the next start"] > 50


async def test_machine_runs_on_if_its_log_cannot_be_written(fleet: Fleet, tmp_path: Path) -> None:
    vm = fleet.vms[await fleet.create(request())]
    log = tmp_path / "vms" / vm.id / "serial.log"
    log.unlink()
    log.mkdir()
    vm.log("lost\n")
    assert vm.status == "running"
    log.rmdir()
    vm.log("kept\n")
    assert log.read_text() == "kept\n"
