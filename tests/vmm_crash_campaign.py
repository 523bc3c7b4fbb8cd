"""kill -9 of a VMM at random moments of create, update and remove, and what the next start makes of it.

No part of the test suite: it takes minutes. After each start every machine must be as it was before the call that was
cut off, or as it is after it; there is no machine twice, no half of one, and the same call succeeds again. The suite's
own version, which kills at every step of the store, is tests/crashing_vmm_store.py.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.repository import ROOT
from tests.vmm import COMPOSE, VmmClient, configuration

OTHER = COMPOSE + "\n"


class VmmProcess:
    """A VMM process of one folder, ready."""

    def __init__(self, folder: Path) -> None:
        (folder / "vmm.toml").write_text(f'run_path = "{folder}/vms"\n[cvm.auto_restart]\nenabled = false\n')
        options = ["-c", f"{folder}/vmm.toml", "--listen", "127.0.0.1:0", "--json"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dstack_emu", "vmm", *options],
            cwd=ROOT,
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.client = VmmClient(json.loads(self.process.stdout.readline())["url"])

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()


def machines(client: VmmClient) -> dict[str, tuple[str, str, int]]:
    """Return name, compose file and disk size of each machine, by id."""
    found = client.rpc("Status")["vms"]
    fields = ("name", "compose_file", "disk_size")
    listed = {vm["id"]: tuple(vm["configuration"][name] for name in fields) for vm in found}
    assert len(listed) == len(found), "a machine is there twice"
    return listed


def send(client: VmmClient, method: str, body: dict[str, Any]) -> None:
    """Make a call whose answer may never come."""
    with contextlib.suppress(subprocess.SubprocessError, ValueError):
        client.call(method, **body)


def campaign_round(number: int, folder: Path, vmm: VmmProcess, chance: random.Random) -> tuple[str, VmmProcess]:
    """Cut one call off, start again, and judge; return what was found, and the VMM that runs now."""
    name = f"m{number}"
    kept = vmm.client.deploy(name=name, stopped=True)
    before = machines(vmm.client)
    kind = ("create", "update", "remove")[number % 3]
    changed = (name, OTHER, 30)
    method, body = {
        "create": ("CreateVm", configuration(name=f"{name}-new", stopped=bool(number % 2))),
        "update": ("UpdateVm", {"id": kept, "compose_file": OTHER, "disk_size": 30}),
        "remove": ("RemoveVm", {"id": kept}),
    }[kind]
    call = threading.Thread(target=send, args=(vmm.client, method, body))
    call.start()
    time.sleep(chance.uniform(0, 0.05))
    vmm.kill()
    call.join()
    again = VmmProcess(folder)
    after = machines(again.client)
    new = {vm_id: what for vm_id, what in after.items() if vm_id not in before}
    if kind == "create":
        assert all(after.get(vm_id) == what for vm_id, what in before.items()), "another machine changed"
        assert [what[0] for what in new.values()] in ([], [f"{name}-new"]), new
        found = "after" if new else "before"
    elif kind == "update":
        assert after in (before, {**before, kept: changed}), after
        found = "after" if after[kept] == changed else "before"
    else:
        assert after in (before, {vm_id: what for vm_id, what in before.items() if vm_id != kept}), after
        found = "before" if kept in after else "after"
    hidden = [path.name for path in (folder / "vms").rglob(".*") if path.name.startswith((".new", ".gone", ".change"))]
    assert not hidden, hidden
    if kind != "remove" or kept in after:
        again.client.rpc(method, **body)
    for vm_id in machines(again.client):
        again.client.rpc("RemoveVm", id=vm_id)
    while machines(again.client):
        pass
    return f"{kind}: {found}", again


def main() -> int:
    """Run the campaign; return 1 where something was half-done."""
    parser = argparse.ArgumentParser(description="kill -9 of a VMM at random moments")
    parser.add_argument("--times", type=int, default=100, help="rounds (%(default)s)")
    parser.add_argument("--seed", default="crash", help="of the moments (%(default)s)")
    arguments = parser.parse_args()
    chance, found = random.Random(arguments.seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="vmm-crash-") as temporary:
        folder = Path(temporary)
        vmm = VmmProcess(folder)
        try:
            for number in range(1, arguments.times + 1):
                result, vmm = campaign_round(number, folder, vmm, chance)
                found[result] += 1
        except AssertionError as error:
            print(f"round {number}: {error}")
            return 1
        finally:
            vmm.kill()
    print(", ".join(f"{what} {count}" for what, count in sorted(found.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
