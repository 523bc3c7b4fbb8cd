"""Stores keys, again and again, in processes that are killed at one step after the other; prints what was left.

A step is a line of kms_emu/cert_dir.py or dstack_emu/transport/files.py, or a call that reaches the file system from
there (an audit event), so nothing of the code under test is replaced. After each crash the folder is judged as the next
start judges it: all keys, to the byte, or none, and nothing else. Where a start has something to finish or to discard,
it is killed at each of its own calls, too.

Run as a program: `python -m tests.crashing_store FOLDER`; one line of JSON.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from dstack_emu.kms_emu import cert_dir
from dstack_emu.kms_emu.cert_dir import BOOTSTRAP_INFO, RPC_CERT, CertDir
from dstack_emu.kms_emu.keys import KmsKeys
from dstack_emu.transport import files as transport_files

REACHES_DISK = {
    "open",
    "os.chmod",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "shutil.rmtree",
}
NOW = 1_767_225_600


def entropy(size: int) -> bytes:
    """Bytes that are the same in every run."""
    return hashlib.shake_256(b"crashing store").digest(size)


def files() -> dict[str, bytes]:
    """What a bootstrap stores."""
    keys = KmsKeys.generate("kms.example.test", entropy, NOW)
    certificate = keys.roots.issue_rpc_certificate(keys.rpc_key, keys.domain, None, NOW)
    return {**keys.files(certificate), BOOTSTRAP_INFO: b"{}"}


TRACED = frozenset({cert_dir.__file__, transport_files.__file__})


def killed_at(step: int, action: Callable[[], object], *, lines: bool = True, traced: frozenset[str] = TRACED) -> bool:
    """Run an action in a process of its own that dies before its n-th step; whether it came that far."""
    child = os.fork()
    if child == 0:
        _arm(step, traced if lines else frozenset())
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _arm(step: int, traced: frozenset[str]) -> None:
    left = step

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename not in traced:
            return None
        if event == "line":
            count()
        return trace

    def audit(event: str, _arguments: tuple[Any, ...]) -> None:
        if event in REACHES_DISK:
            count()

    sys.addaudithook(audit)
    if traced:
        sys.settrace(trace)


def judge(folder: Path, stored: dict[str, bytes]) -> bool:
    """Start anew in a folder; whether there are keys. Fails for anything between all and none."""
    place = CertDir(folder)
    place.prepare()
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    if not place.has_keys():
        assert found == {}, sorted(found)
        return False
    assert found == stored, sorted(found)
    assert all((folder / name).stat().st_mode & 0o777 == 0o600 for name in cert_dir.PRIVATE)
    KmsKeys.load(place).require_own_certificates()
    return True


State = frozenset[tuple[str, int, bytes]]
"""Names, modes and contents of a folder."""


def state(folder: Path) -> State:
    """All that a start can see of a folder."""
    paths = ((path.relative_to(folder), path) for path in folder.rglob("*"))
    return frozenset(
        (str(name), path.stat().st_mode, path.read_bytes() if path.is_file() else b"/") for name, path in paths
    )


def crash_store(root: Path, stored: dict[str, bytes]) -> dict[str, int]:
    """Kill a store at each of its steps, and what follows each crash at each of its."""
    found = {"crashes": 0, "with keys": 0, "without keys": 0, "crashes of the next start": 0}
    seen: dict[State, bool] = {}
    came_so_far = True
    while came_so_far:
        folder = root / f"store-{found['crashes']}"
        folder.mkdir()  # as a volume that is mounted: it exists, and is empty
        came_so_far = killed_at(found["crashes"], partial(CertDir(folder).store, stored))
        found["crashes"] += came_so_far
        recoveries, left = 0, state(folder)
        while left not in seen:
            again = root / "again"
            shutil.copytree(folder, again)
            killed = killed_at(recoveries, CertDir(again).prepare, lines=False)
            judge(again, stored)
            shutil.rmtree(again)
            if not killed:
                break
            recoveries += 1
        found["crashes of the next start"] += recoveries
        if left not in seen:
            seen[left] = judge(folder, stored)
        found["with keys" if seen[left] else "without keys"] += 1
        shutil.rmtree(folder)
    return found


def crash_replace(root: Path, stored: dict[str, bytes]) -> dict[str, int]:
    """Kill the replacement of one file at each of its steps: it is the old or the new one."""
    found = {"crashes": 0, "old": 0, "new": 0}
    seen: set[State] = set()
    came_so_far = True
    while came_so_far:
        folder = root / "replace"
        folder.mkdir()
        CertDir(folder).store(stored)
        came_so_far = killed_at(found["crashes"], partial(CertDir(folder).replace, RPC_CERT, b"new"))
        found["crashes"] += came_so_far
        is_new, left = (folder / RPC_CERT).read_bytes() == b"new", state(folder)
        assert left in seen or judge(folder, {**stored, RPC_CERT: b"new"} if is_new else stored)
        seen.add(left)
        found["new" if is_new else "old"] += 1
        shutil.rmtree(folder)
    return found


def crash_overwrite(root: Path, stored: dict[str, bytes]) -> dict[str, int]:
    """Kill the replacement of all files, by fewer ones, at each of its steps: all are old, or all are new."""
    new = {name: content for name, content in stored.items() if name != BOOTSTRAP_INFO} | {RPC_CERT: b"new"}
    found = {"crashes": 0, "old": 0, "new": 0}
    seen: set[State] = set()
    came_so_far = True
    while came_so_far:
        folder = root / "overwrite"
        folder.mkdir()
        CertDir(folder).store(stored)
        came_so_far = killed_at(found["crashes"], partial(CertDir(folder).overwrite, new))
        found["crashes"] += came_so_far
        is_new = CertDir(folder).path.joinpath(".committed").exists() or not (folder / BOOTSTRAP_INFO).exists()
        left = state(folder)
        assert left in seen or judge(folder, new if is_new else stored)
        seen.add(left)
        found["new" if is_new else "old"] += 1
        shutil.rmtree(folder)
    return found


CRASHES: dict[str, Callable[[Path, dict[str, bytes]], dict[str, int]]] = {
    "store": crash_store,
    "replace": crash_replace,
    "overwrite": crash_overwrite,
}


def main() -> None:
    """Run all campaigns in the folder that is named."""
    root, stored = Path(sys.argv[1]), files()
    print(json.dumps({name: crash(root, stored) for name, crash in CRASHES.items()}))


if __name__ == "__main__":
    main()
