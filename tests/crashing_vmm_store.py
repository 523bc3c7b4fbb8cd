"""Creates, changes and removes a machine's folder in processes that are killed, or whose disk fails, at each step.

A step is a line of vmm/store.py or transport/files.py, or a call that reaches the file system from there. After each
crash the folder is judged as the next start of a VMM judges it: the machine is as it was before or as it is afterwards,
or gone where it was being created or removed. That start is killed at each of its own calls, too. Where a call fails
instead, or a file cannot grow, an error must mean that nothing has changed.

Run as a program: `python -m tests.crashing_vmm_store FOLDER`; one line of JSON.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dstack_emu.transport import files as transport_files
from dstack_emu.vmm import store as vmm_store
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.store import COMPOSE, ENCRYPTED_ENV, MANIFEST, STATE, USER_CONFIG, Store
from tests.crashing_store import State, killed_at, state

TRACED = frozenset({vmm_store.__file__, transport_files.__file__})
WRITES = {"open", "os.mkdir", "os.rename"}
FAILED = 3
"""The exit status of an action that was refused."""

OLD = Manifest(id="vm", name="old", app_id="00", vcpu=1, memory=1, disk_size=1, image="i", created_at_ms=1)
NEW = OLD.model_copy(update={"name": "new", "disk_size": 2})
OLD_FILES = {COMPOSE: b"{old}", ENCRYPTED_ENV: b"\x00old", STATE: b'{"started": true}'}
NEW_FILES = {COMPOSE: b"{new}", ENCRYPTED_ENV: b"\x00new", USER_CONFIG: b"new"}

View = tuple[str, str, bytes, str, bool] | None
BEFORE: View = ("old", "{old}", b"\x00old", "", True)
AFTER: View = ("new", "{new}", b"\x00new", "new", True)


def view(folder: Path) -> View:
    """Return what a VMM reads of the machine now, None if there is none."""
    store = Store(folder)
    if "vm" not in store.ids():
        return None
    machine = store.folder("vm")
    files = (machine.compose_file(), machine.encrypted_env(), machine.user_config(), machine.is_started())
    return (machine.manifest().name, *files)


def judge(folder: Path, allowed: tuple[View, ...]) -> View:
    """Start anew in a folder; return the machine. Fails for anything half-done."""
    Store(folder).open()
    found = view(folder)
    assert found in allowed, found
    names = {path.name for path in folder.rglob("*")}
    unfinished = {name for name in names if name.startswith((".new-", ".gone-", ".change", ".removing"))}
    assert not unfinished, unfinished
    assert found is not None or not names, names
    return found


def create(folder: Path) -> None:
    Store(folder).create(OLD, OLD_FILES)


def change(folder: Path) -> None:
    Store(folder).folder("vm").change({MANIFEST: NEW.encode(), **NEW_FILES})


def remove(folder: Path) -> None:
    Store(folder).folder("vm").mark_removing()
    Store(folder).remove("vm")


CASES: dict[str, tuple[Callable[[Path], None], bool, tuple[View, View]]] = {
    "create": (create, False, (None, BEFORE)),
    "change": (change, True, (BEFORE, AFTER)),
    "remove": (remove, True, (BEFORE, None)),
}
"""The action, whether it finds a machine, and what there is before and after it."""


def prepared(folder: Path, has_machine: bool) -> Path:
    folder.mkdir()
    if has_machine:
        create(folder)
    return folder


def crash(root: Path, name: str) -> dict[str, int]:
    """Kill an action at each of its steps, and the start after each crash at each of its calls."""
    action, has_machine, allowed = CASES[name]
    found: Counter[str] = Counter()
    seen: dict[State, View] = {}
    came_so_far = True
    while came_so_far:
        folder = prepared(root / f"{name}-{found['crashes']}", has_machine)
        came_so_far = killed_at(found["crashes"], partial(action, folder), traced=TRACED)
        found["crashes"] += came_so_far
        left, calls = state(folder), 0
        while left not in seen:
            again = root / "again"
            shutil.copytree(folder, again)
            was_killed = killed_at(calls, Store(again).open, lines=False)
            judge(again, allowed)
            shutil.rmtree(again)
            if not was_killed:
                break
            calls += 1
        found["crashes of the next start"] += calls
        if left not in seen:
            seen[left] = judge(folder, allowed)
        found["after" if seen[left] == allowed[1] else "before"] += 1
        shutil.rmtree(folder)
    return found


def failing(action: Callable[[], object], arm: Callable[[], None]) -> bool:
    """Run an action in a process whose disk fails; return whether it was refused."""
    child = os.fork()
    if child == 0:
        arm()
        try:
            action()
        except (VmmError, OSError):
            os._exit(FAILED)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, FAILED), code
    return code == FAILED


def fail_from(step: int, calls: int) -> None:
    """Let so many calls that write fail, from the n-th on."""
    number = -1

    def audit(event: str, _arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event in WRITES:
            number += 1
            if step <= number < step + calls:
                raise PermissionError(13, "Permission denied")

    sys.addaudithook(audit)


def limit_files(size: int) -> None:
    """Let files grow to this many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disk_fails(root: Path, name: str) -> dict[str, int]:
    """Let each call of an action fail, alone and with all that follow, and files not grow beyond each size."""
    action, has_machine, allowed = CASES[name]
    found: Counter[str] = Counter()
    arms = [partial(fail_from, step, calls) for calls in (1, 1000) for step in range(16)]
    arms += [partial(limit_files, size) for size in range(0, 400, 40)]
    for arm in arms:
        folder = prepared(root / f"{name}-fails", has_machine)
        was_refused = failing(partial(action, folder), arm)
        if was_refused and name != "remove":
            assert view(folder) == allowed[0], view(folder)
            assert judge(folder, allowed) == allowed[0]
        elif was_refused:
            judge(folder, allowed)
        else:
            assert view(folder) == allowed[1], view(folder)
            assert judge(folder, allowed) == allowed[1]
        found["refused" if was_refused else "done"] += 1
        shutil.rmtree(folder)
    return found


def main() -> None:
    """Run everything in the folder that is named."""
    root = Path(sys.argv[1])
    found = {name: {"crash": crash(root, name), "disk": disk_fails(root, name)} for name in CASES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
