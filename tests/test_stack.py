"""`Stack` in one's own program, and `up` as a process among others: how they start, run side by side, and end."""

import asyncio
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import aiohttp
import pytest

from dstack_emu.attest.pck import device_id
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.errors import PartEndedError, StackError
from dstack_emu.stack import Stack
from dstack_emu.transport.listen import ListenError, bind_tcp
from dstack_emu.transport.ports import PORTS
from tests import tls
from tests.processes import forked, start
from tests.repository import ROOT
from tests.running import READY_TIMEOUT, running_stack


async def status_of(url: str) -> int:
    """Ask a page."""
    async with aiohttp.ClientSession() as session, session.get(url, ssl=tls.client()) as response:
        return response.status


def quiet(text: str) -> None:
    """Say nothing."""


# ---- in one's own program


async def test_stack_shows_urls_root_measurements_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with Stack(StackConfig.on_free_ports(seed="mine"), progress=quiet) as stack:
        assert list(stack.services) == list(stack.description()["services"])
        assert set(stack.services) == set(PORTS) - {
            "vmm",
            "gateway",
            "gateway-admin",
            "ingress",
            "agent-gateway",
            "chain",
        }
        for name, url in stack.services.items():
            path = "/" if name.startswith("auth") else "/health"
            assert await status_of(url + path) == 200
        assert stack.root_ca.read_text() == stack.intel.root_pem
        for side in ("src", "dst"):
            info = stack.kms_info[side]
            assert info["device_id"] == device_id(bytes.fromhex(info["ppid"])).hex()
        assert len({info["mr_aggregated"] for info in stack.kms_info.values()}) == 2
        assert len(stack.app.domain.compose_hash) == 32
    src, dst = (stack.logs.lines(f"kms-{side}") for side in ("src", "dst"))
    source = f"source={stack.services['kms-src']}/prpc"
    onboarded = f'INFO kms_emu: onboarded site="dstack-emu dst" {source} domain=127.0.0.1 '
    assert [line.startswith(onboarded) for line in dst].count(True) == 1
    bootstrapped = 'INFO kms_emu: bootstrapped site="dstack-emu src" domain=127.0.0.1 '
    assert [line.startswith(bootstrapped) for line in src].count(True) == 1
    assert not set(src) & set(dst)
    assert "isAllowed" in " ".join(stack.logs.lines("auth-src"))
    assert not stack.state.exists()


async def test_logs_of_a_stack_are_not_its_neighbours(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    one, other = (Stack(StackConfig.on_free_ports(seed=seed, fresh=True), progress=quiet) for seed in "ab")
    async with one, other:
        for stack in (one, other):
            said = f'INFO kms_emu: onboard phase site="dstack-emu src" url={stack.services["kms-src"]}'
            assert stack.logs.lines("kms-src") == [said]


async def test_part_that_fails_ends_the_block_and_is_named() -> None:
    stack = Stack(StackConfig.on_free_ports(fresh=True), progress=quiet)

    async def finish_too_early() -> None:
        async with stack:
            assert await status_of(f"{stack.services['kms-src']}/finish") == 200
            await asyncio.get_running_loop().create_future()

    with pytest.raises(PartEndedError, match="^kms-src ended: Failed to onboard$"):
        await finish_too_early()
    for url in (stack.services["pccs"], stack.services["kms-dst"]):
        with pytest.raises(aiohttp.ClientConnectorError):
            await status_of(url)
    assert not stack.state.exists()


async def test_part_that_fails_is_named_whatever_the_block_ends_with() -> None:
    async def fail_with_it() -> None:
        async with Stack(StackConfig.on_free_ports(fresh=True), progress=quiet) as stack:
            await status_of(f"{stack.services['kms-dst']}/finish")
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError as error:
                raise ValueError("mine") from error

    with pytest.raises(PartEndedError, match="^kms-dst ended: Failed to onboard$") as failure:
        await fail_with_it()
    assert isinstance(failure.value.__context__, ValueError)


async def test_cancellation_from_outside_stays_one() -> None:
    entered = asyncio.Event()

    async def hold() -> None:
        async with Stack(StackConfig.on_free_ports(fresh=True), progress=quiet):
            entered.set()
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(hold())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_port_that_is_taken_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with bind_tcp("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        config = StackConfig(ports={**dict.fromkeys(PORTS, 0), "app": port})
        with pytest.raises(ListenError, match=f"127.0.0.1:{port}: the address is in use .set by --port app=PORT"):
            await Stack(config, progress=quiet).__aenter__()
    assert os.listdir(tmp_path) == []


async def test_stack_that_cannot_be_made_names_the_part(tmp_path: Path) -> None:
    (tmp_path / "auth-src.json").write_text('{"osImages": [], "kms": {"mrAggregated": []}}')
    config = StackConfig(ports=dict.fromkeys(PORTS, 0), policies=tmp_path)
    with pytest.raises(StackError, match="^kms-src: Bootstrap: KMS is not allowed to bootstrap: "):
        await Stack(config, progress=quiet).__aenter__()


# ---- as a process


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("… starting kms-src\n", signal.SIGTERM),
        ("… bootstrapping kms-src\n", signal.SIGINT),
        ("… booting the app through kms-src\n", signal.SIGTERM),
        (None, signal.SIGINT),
        (None, signal.SIGHUP),
    ],
)
def test_signal_ends_it_cleanly_at_any_time(said: str | None, number: int, short_folder: Path) -> None:
    command, settings = forked("up", "--json", "--free-ports")
    settings["env"]["TMPDIR"] = str(short_folder)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
    assert process.stdout is not None
    assert process.stderr is not None
    if said is None:
        assert process.stdout.readline().startswith("{")
    else:
        while process.stderr.readline() != said:
            assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=READY_TIMEOUT)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert list(short_folder.iterdir()) == []


def test_two_stacks_stand_side_by_side() -> None:
    same = ("--seed", "a")
    with running_stack(*same) as one, running_stack("--seed", "b") as other, running_stack(*same) as twin:
        assert not set(one.services.values()) & set(other.services.values())
        keys = [stack.rpc("kms-dst", "KMS.GetMeta")[1]["k256_pubkey"] for stack in (one, other, twin)]
        assert keys[0] == keys[2] != keys[1]
        with one.policy_changed("src", lambda policy: policy["kms"].update(mrAggregated=[])):
            statuses = [stack.rpc("kms-src", "KMS.GetTempCaCert")[0] for stack in (one, other, twin)]
        assert statuses == [400, 200, 200]


TURNS = int(os.environ.get("DSTACK_EMU_TURNS") or 3)
"""Twenty in a campaign; three are one for each way to end."""


@pytest.mark.timeout(max(300, 60 + 20 * TURNS))
def test_stack_is_stopped_and_resumed_many_times(short_folder: Path) -> None:
    seen = []
    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    for turn in range(TURNS):
        with tempfile.TemporaryFile() as errors:
            process = start("up", "--json", "--free-ports", "--state", str(short_folder), stderr=errors)
            description = json.loads(process.stdout.readline())
            certs = short_folder / "kms-src" / "certs"
            seen.append(
                (
                    description["kms"],
                    description["app"],
                    sorted((path.name, path.read_bytes()) for path in certs.iterdir()),
                    (short_folder / "kms-dst" / "certs" / "root-ca.key").read_bytes(),
                    (short_folder / "policies" / "auth-src.json").read_text(),
                )
            )
            process.end(ends[turn % len(ends)])
    assert len(seen) == TURNS
    assert all(turn == seen[0] for turn in seen)
