"""The memory of machines: which sizes are accepted, and with which a machine is measured."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.attest.release import DEFAULT
from dstack_emu.deployment.machine_site import MEGABYTE, measured_memory
from dstack_emu.simulator.image import OsImage
from tests.test_vmm_release import asked
from tests.vmm import COMPOSE, VmmClient, configuration

ALONE = COMPOSE.replace('"kms_enabled": true', '"kms_enabled": false')


@pytest.mark.parametrize(
    ("size", "measured"),
    [(0, 2048), (1024, 2048), (2047, 2048), (2048, 2048), (2049, 2048), (2815, 2048), (2816, 2816), (3072, 3072)],
)
def test_memory_is_measured_as_2_gib_if_the_lite_variant_does_not_know_the_size(size: int, measured: int) -> None:
    assert measured_memory(size * MEGABYTE, OsImage.from_seed(lambda label, size: bytes(size))) == measured * MEGABYTE


async def test_every_size_of_memory_is_accepted_and_the_log_says_as_what_it_is_measured(short_folder: Path) -> None:
    sizes = {0: 2048, 1024: 2048, 2048: 2048, 2**32 - 1: 2**32 - 1}

    def ask(vmm: VmmClient) -> list[tuple[int, dict[str, Any], Any, str]]:
        found = []
        for size in sizes:
            vm_id = vmm.rpc("CreateVm", **configuration(compose_file=ALONE, memory=size))["id"]
            info = vmm.booted(vm_id)
            told = json.loads((short_folder / f"vms/{vm_id}/shared/.sys-config.json").read_text())
            log = vmm.ask(f"/logs?id={vm_id}")[1].decode()
            found.append((size, info, json.loads(told["vm_config"])["memory_size"], log))
        return found

    for size, info, measured, log in await asked(short_folder, DEFAULT, ask):
        assert (info["boot_progress"], info["configuration"]["memory"]) == ("done", size)
        assert measured == sizes[size] * MEGABYTE
        said = f"[dstack] {size} MB are measured as {sizes[size]} MB\n"
        assert (said in log) == (sizes[size] != size)


async def test_size_of_memory_that_has_no_32_bits_is_refused(tmp_path: Path) -> None:
    def ask(vmm: VmmClient) -> list[int]:
        return [vmm.call("CreateVm", **configuration(memory=size))[0] for size in (-1, 2**32, 1.5, "1024")]

    assert await asked(tmp_path, DEFAULT, ask) == [400] * 4
    assert await asyncio.to_thread(lambda: list((tmp_path / "vms").iterdir())) == []
