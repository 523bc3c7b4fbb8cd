"""A VMM without a stack: its configuration, its credentials, its address, and its machines after a crash."""

import asyncio
import base64
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from dstack_emu.attest.release import DEFAULT
from dstack_emu.deployment.machine_site import BOOTS_AT_ONCE
from dstack_emu.deployment.standalone_vmm import StandaloneVmm, VmmSettings
from dstack_emu.testing import LiveStack
from dstack_emu.transport.errors import ConfigError
from dstack_emu.vmm.config import VmmConfig
from tests.repository import ROOT
from tests.scratch import run_pytest, write
from tests.vmm import VmmClient, allow, configuration


def settings(folder: Path, document: str = "") -> VmmSettings:
    """Return those of a VMM in a folder, with keys of vmm.toml."""
    file = folder / "vmm.toml"
    file.write_text(f'address = "127.0.0.1:0"\nrun_path = "{folder}/vms"\n{document}')
    config = VmmConfig.load(file)
    return VmmSettings(config, DEFAULT, "vmm", "http://127.0.0.1:1", folder / "discovery", config_file=file)


async def refusals(folder: Path, document: str, *requests: dict[str, Any]) -> list[str]:
    """Return how a VMM answers requests to create a machine: the refusal, or nothing."""
    async with StandaloneVmm(settings(folder, document)) as vmm:
        client, said = VmmClient(vmm.url), []
        for request in requests:
            status, answer = await asyncio.to_thread(client.call, "CreateVm", **configuration(stopped=True, **request))
            said.append("" if status == 200 else answer["error"])
        return said


# ---- configuration


async def test_defaults_map_no_ports_and_know_no_gpu_and_no_volumes(tmp_path: Path) -> None:
    port = {"protocol": "tcp", "host_port": 8080, "vm_port": 80}
    volume = {"source": "a", "verity_root": "11" * 32, "target": "/v"}
    compose = json.dumps({"verity_volumes": [volume]})
    assert await refusals(tmp_path, "", {"ports": [port]}, {"compose_file": compose}, {}) == [
        "Port mapping is disabled",
        "volumes requested but cvm.volumes_dir is not configured",
        "",
    ]


@pytest.mark.parametrize(
    ("keys", "request_", "text"),
    [
        ("[cvm.gpu]\nenabled = true\nallow_attach_all = false", {"gpus": {"attach_mode": "all"}}, "Attaching all GPUs"),
        (
            '[cvm.port_mapping]\nenabled = true\nrange = [{protocol = "tcp", from = 5, to = 6}]',
            {"ports": [{"protocol": "udp", "host_port": 5, "vm_port": 1}]},
            "Port mapping is not allowed for udp:5",
        ),
        ("[cvm.tee_simulator]", {"simulated_tee": "dstack"}, "unsupported TEE variant: dstack"),
    ],
    ids=["gpus", "ports", "tee"],
)
async def test_configuration_limits_requests(tmp_path: Path, keys: str, request_: dict[str, Any], text: str) -> None:
    good: dict[str, dict[str, Any]] = {
        "gpus": {"gpus": {"attach_mode": "listed", "gpus": [{"slot": "1"}]}},
        "ports": {"ports": [{"protocol": "tcp", "host_port": 5, "vm_port": 1}]},
        "simulated_tee": {"simulated_tee": "dstack-gcp-tdx"},
    }
    refused, done = await refusals(tmp_path, keys, request_, good[next(iter(request_))])
    assert refused.startswith(text)
    assert done == ""


async def test_volume_is_a_file_of_the_folder_for_volumes(tmp_path: Path) -> None:
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    (tmp_path / "outside").write_bytes(b"")
    for name in ("good", "a,b"):
        (volumes / name).write_bytes(b"")
    (volumes / "link").symlink_to(tmp_path / "outside")

    def request(*sources: str) -> dict[str, Any]:
        listed = [
            {"source": source, "verity_root": "11" * 32, "target": f"/v{index}"} for index, source in enumerate(sources)
        ]
        document = {"manifest_version": "3", "name": "a", "runner": "docker-compose", "verity_volumes": listed}
        return {"compose_file": json.dumps(document)}

    said = await refusals(
        tmp_path,
        f'[cvm]\nvolumes_dir = "{volumes}"',
        *(request(source) for source in ("", "../good", "none", "link", "a,b", "good")),
        request("good", "none"),
    )
    assert said == [
        "invalid volume source: empty path",
        "invalid volume source '../good': must be a bare file name",
        f"volume 'none': {volumes}/none: No such file or directory",
        "volume 'link' escapes volumes_dir",
        "volume 'a,b' resolves to a path with ',' or '='",
        "",
        "",  # one root at two targets is attached once
    ]
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "vms").glob("*/vm-manifest.json")]
    assert [manifest["volumes"] for manifest in manifests] == 2 * [[{"source": str(volumes / "good")}]]


async def start(folder: Path) -> None:
    """Start a VMM with the vmm.toml of a folder, and end it."""
    config = VmmConfig.load(folder / "vmm.toml").model_copy(update={"run_path": folder / "vms"})
    async with StandaloneVmm(VmmSettings(config, DEFAULT, "vmm", "http://127.0.0.1:1", folder)):
        pass


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('address = "nowhere"', "address: unix:PATH, host:port, or host with the key port expected"),
        ("[cvm]\ncid_start = 2", "cvm.cid_start"),
        ("[cvm]\ncid_pool_size = 0", "cvm.cid_pool_size"),
        ('[[cvm.port_mapping.range]]\nprotocol = "tcp"\nfrom = 6\nto = 5', "from must not be above to"),
        ("[cvm.log]\nmax_bytes = true", "cvm.log.max_bytes"),
        ("[cvm.auto_restart]\ninterval = 0", "interval must be greater than zero when enabled"),
        ('[auth]\nenabled = true\nhtpasswd_file = "/nowhere"', "auth.htpasswd_file: failed to read htpasswd file"),
    ],
)
async def test_configuration_that_is_wrong_is_refused(tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "vmm.toml").write_text(line)
    with pytest.raises(ConfigError, match=text):
        await start(tmp_path)
    (tmp_path / "vmm.toml").write_text("unknown = 1\n[image]\nregistry = 'x'\n[cvm.log]\nmax_bytes = '1K'")
    assert VmmConfig.load(tmp_path / "vmm.toml").cvm.log.max_bytes == 1024


# ---- many machines


async def test_machines_beyond_those_that_boot_at_once_wait_for_their_turn(short_folder: Path) -> None:
    connected, may_end, connections = asyncio.Event(), asyncio.Event(), itertools.count(1)

    async def silent_kms(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if next(connections) == BOOTS_AT_ONCE:
            connected.set()
        await may_end.wait()
        writer.close()

    async with (
        await asyncio.start_server(silent_kms, "127.0.0.1", 0) as server,
        StandaloneVmm(settings(short_folder)) as vmm,
    ):
        client = VmmClient(vmm.url)
        kms = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"

        def deploy() -> list[str]:
            return [client.deploy(name=f"cvm {n}", kms_urls=[kms]) for n in range(BOOTS_AT_ONCE + 2)]

        ids = await asyncio.to_thread(deploy)
        await connected.wait()
        status = await asyncio.to_thread(client.rpc, "Status", brief=True)
        assert Counter(each["boot_progress"] for each in status["vms"]) == {
            "requesting app keys": BOOTS_AT_ONCE,
            "booting": 2,
        }
        may_end.set()
        for vm_id in ids[-2:]:
            assert "Failed to request app keys" in (await asyncio.to_thread(client.booted, vm_id))["boot_error"]


# ---- credentials

GUARDED = ["/prpc/Version", "/guest/Info?id=x", "/", "/health", "/api-docs/openapi.json", "/logs?id=x"]
ABSENT = ["/res/x25519.js", "/api/Notify", "/api/Info", "/none"]
"""What no listener has here; callers learn of it with a credential alone."""


async def test_every_route_asks_for_a_credential(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"ann:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    keys = f'[auth]\nenabled = true\ntokens = ["token1"]\nhtpasswd_file = "{users}"'
    basic = {pair: base64.b64encode(pair.encode()).decode() for pair in ("ann:secret", "ann:wrong", "x:token1")}
    async with StandaloneVmm(settings(tmp_path, keys)) as vmm:
        client = VmmClient(vmm.url)

        def check() -> None:
            for path in (*GUARDED, *ABSENT):
                wrong = ["X: y", "Authorization: Bearer token0", "X-Admin-Token: token0"]
                for header in [*wrong, f"Authorization: Basic {basic['ann:wrong']}"]:
                    assert client.ask(path, "-H", header) == (401, b"")
                statuses = {"/guest/Info?id=x": 400, "/logs?id=x": 404, **dict.fromkeys(ABSENT, 404)}
                good = ["Authorization: Bearer token1", "X-Admin-Token: token1"]
                good += [f"Authorization: Basic {basic[pair]}" for pair in ("ann:secret", "x:token1")]
                for header in good:
                    assert client.ask(path, "-H", header)[0] == statuses.get(path, 200)
            assert client.ask("/prpc/Version?token=token1")[0] == 200
            assert client.ask("/prpc/Version?token=token1", "-d", "{}")[0] == 401

        await asyncio.to_thread(check)


async def test_credentials_that_are_on_but_none_admit_nobody(tmp_path: Path) -> None:
    async with StandaloneVmm(settings(tmp_path, '[auth]\nenabled = true\ntokens = [""]')) as vmm:
        client = VmmClient(vmm.url)
        asked = [asyncio.to_thread(client.ask, "/prpc/Version", "-H", f"X-Admin-Token: {token}") for token in ("", "x")]
        assert {status for status, _ in await asyncio.gather(*asked)} == {401}
    async with StandaloneVmm(settings(tmp_path)) as vmm:
        assert (await asyncio.to_thread(VmmClient(vmm.url).ask, "/prpc/Version"))[0] == 200


# ---- address


async def test_vmm_at_a_socket_file_is_found_by_its_discovery_file(short_folder: Path) -> None:
    stale = short_folder / "discovery" / "stale.json"
    stale.parent.mkdir()
    stale.write_text(json.dumps({"pid": 2**22 + 1}))
    given = settings(short_folder)
    address = f"unix:{short_folder}/vmm.sock"
    config = given.config.model_copy(update={"address": address, "node_name": "n"})
    async with StandaloneVmm(replace(given, config=config)) as vmm:
        assert vmm.discovery_file is not None
        found = json.loads(vmm.discovery_file.read_text())
        asked = VmmClient("http://vmm").ask
        status, _ = await asyncio.to_thread(asked, "/prpc/Version", "--unix-socket", f"{short_folder}/vmm.sock")
        assert status == 200
        assert list(stale.parent.iterdir()) == [vmm.discovery_file]
    assert (found["pid"], found["address"], found["node_name"]) == (os.getpid(), address, "n")
    assert (found["run_path"], found["version"]) == (f"{short_folder}/vms", f"v{DEFAULT.version}")
    assert vmm.discovery_file.stem == found["id"]
    assert list(stale.parent.iterdir()) == []


async def test_vmm_that_does_not_start_leaves_no_socket_file(short_folder: Path) -> None:
    given = settings(short_folder)
    (short_folder / "file").write_text("")
    config = given.config.model_copy(
        update={"address": f"unix:{short_folder}/vmm.sock", "run_path": short_folder / "file"}
    )
    with pytest.raises(ConfigError, match="run_path: .*file: Not a directory|run_path: .*file: File exists"):
        async with StandaloneVmm(replace(given, config=config)):
            pass
    assert sorted(os.listdir(short_folder)) == ["file", "vmm.toml"]


# ---- a process


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    with LiveStack() as live:
        allow(live)
        yield live


@contextmanager
def vmm_process(folder: Path, stack: LiveStack) -> Iterator[tuple[VmmClient, "subprocess.Popen[str]"]]:
    """Run `dstack-emu vmm` with the PCCS and the seed of a stack."""
    (folder / "vmm.toml").write_text(f'run_path = "{folder}/vms"\n[image]\npath = "{folder}/images"\n')
    options = ["--listen", "127.0.0.1:0", "--pccs", stack.services["pccs"], "--seed", stack.description["seed"]]
    command = [sys.executable, "-m", "dstack_emu", "vmm", "-c", f"{folder}/vmm.toml", *options, "--json"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        yield VmmClient(json.loads(process.stdout.readline())["url"]), process
        if process.poll() is None:
            process.terminate()
            assert process.wait(20) == 0


def test_machines_of_a_vmm_that_was_killed_are_there_again(short_folder: Path, stack: LiveStack) -> None:
    with vmm_process(short_folder, stack) as (vmm, process):
        running = vmm.deploy(kms_urls=[stack.services["kms-src"]])
        stopped = vmm.deploy(stopped=True, name="b")
        before = vmm.booted(running)
        assert (before["boot_progress"], before["boot_error"]) == ("done", "")
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert len(list((short_folder / "dstack-vmm").iterdir())) == 1
    with vmm_process(short_folder, stack) as (vmm, _):
        after = vmm.booted(running)
        assert (after["boot_progress"], after["instance_id"]) == ("done", before["instance_id"])
        assert vmm.info(stopped)["status"] == "stopped"
        assert len(list((short_folder / "dstack-vmm").iterdir())) == 1
    assert list((short_folder / "dstack-vmm").iterdir()) == []


# ---- snapshots


def test_snapshot_has_the_machines() -> None:
    with LiveStack(vmm=True, seed="machines") as live:
        allow(live)
        vmm = VmmClient(live.services["vmm"])
        kept = vmm.deploy(user_config="kept")
        vmm.deploy(stopped=True, name="b")
        before = vmm.booted(kept)
        live.control.snapshot("two")
        saved = live.control.save()
        vmm.gone(kept)
        other = vmm.deploy(name="c")
        live.control.revert("two")
        assert [vm["name"] for vm in vmm.rpc("Status")["vms"]] == ["app1", "b"]
        after = vmm.booted(kept)
        assert after["boot_error"] == ""
        assert (after["boot_progress"], after["instance_id"]) == ("done", before["instance_id"])
        assert after["configuration"] == before["configuration"]
        assert vmm.rpc("GetInfo", id=other)["found"] is False
        live.control.reset()
        assert vmm.rpc("Status")["total"] == 0
        live.control.load(saved)
        final = vmm.booted(kept)
        assert final["boot_error"] == ""
        assert final["boot_progress"] == "done"
        assert vmm.rpc("Status")["total"] == 2


FIXTURE_TESTS = """
import json
import urllib.request

import pytest


@pytest.fixture(scope="session")
def dstack_settings():
    return {"vmm": True}


def call(url, method, body):
    request = urllib.request.Request(f"{url}/prpc/{method}?json", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number", [1, 2])
def test_vmm(dstack_vmm, dstack_env, number):
    assert dstack_env["DSTACK_VMM_URL"] == dstack_vmm
    assert call(dstack_vmm, "Status", {})["total"] == 0
    compose = json.dumps({"manifest_version": 2, "name": "a", "runner": "docker-compose"})
    image = call(dstack_vmm, "ListImages", {})["images"][0]["name"]
    assert call(dstack_vmm, "CreateVm", {"compose_file": compose, "image": image, "stopped": True})["id"]
"""


def test_fixture_has_the_vmm_and_removes_what_a_test_deploys(tmp_path: Path) -> None:
    write(tmp_path, {"test_it.py": FIXTURE_TESTS})
    done = run_pytest(tmp_path, "-q")
    assert done.returncode == 0, done.stdout
    write(tmp_path, {"test_it.py": FIXTURE_TESTS.replace('"vmm": True', "")})
    done = run_pytest(tmp_path, "-q", "-k", "1")
    assert "add vmm=True to the fixture dstack_settings" in done.stdout
