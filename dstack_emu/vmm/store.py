"""The folder of a VMM's machines: complete or absent at any moment, whatever ends the process.

A machine's folder is that of upstream: vm-manifest.json, vm-state.json, the logs, and `shared/` with what the guest
reads. A new machine is written beside and renamed. A change of several files is written to `.change/`, renamed to
`.changed/`, which decides, and then moved into place; a start of the VMM completes what was decided, and deletes what
was not. That is stricter than upstream, which writes the files one after the other.

Source: dstack `vmm/src/app.rs` (VmWorkDir) and `dstack-types/src/shared_filenames.rs` at 312dc605.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from dstack_emu.transport.files import replace_file, replace_file_durably, sync_folder, write_durably
from dstack_emu.vmm.checks import is_vm_id
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.manifest import Manifest

MANIFEST: Final = "vm-manifest.json"
STATE: Final = "vm-state.json"
COMPOSE: Final = "shared/app-compose.json"
ENCRYPTED_ENV: Final = "shared/.encrypted-env"
USER_CONFIG: Final = "shared/.user-config"
SYS_CONFIG: Final = "shared/.sys-config.json"
INSTANCE_INFO: Final = "shared/.instance_info"
QEMU_PID: Final = "qemu.pid"

_NEW: Final = ".new-"
_GONE: Final = ".gone-"
_CHANGE, _CHANGED = ".change", ".changed"
_REMOVING: Final = ".removing"
_MODE: Final = 0o600


class MachineFolder:
    """The folder of one machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def manifest(self) -> Manifest:
        """Read the manifest; raise `VmmError`."""
        return Manifest.parse(self._read(MANIFEST), str(self.path / MANIFEST))

    def compose_file(self) -> str:
        """Read the app-compose.json; raise `VmmError`."""
        try:
            return self._read(COMPOSE).decode()
        except UnicodeDecodeError as error:
            raise VmmError(f"Failed to read compose file: {error.reason}") from error

    def encrypted_env(self) -> bytes:
        """Read the encrypted environment, empty if there is none."""
        return self._read_if_present(ENCRYPTED_ENV)

    def user_config(self) -> str:
        """Read the user's own file, empty if there is none."""
        return self._read_if_present(USER_CONFIG).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        """Return the contents of the files that the guest reads, but what is written at each start, by their names."""
        names = (COMPOSE, ENCRYPTED_ENV, USER_CONFIG, INSTANCE_INFO)
        contents = {name: self._read_if_present(name) for name in names}
        return {name: content for name, content in contents.items() if content}

    def instance_info(self) -> dict[str, str]:
        """Read what the guest has said of its instance; without any, what there was at the creation."""
        try:
            found: object = json.loads(self._read_if_present(INSTANCE_INFO) or b"{}")
        except ValueError:
            found = {}
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}

    def is_started(self) -> bool:
        """Return whether the machine is to run."""
        try:
            state: object = json.loads(self._read_if_present(STATE) or b"{}")
        except ValueError:
            return False
        return isinstance(state, dict) and state.get("started") is True

    def set_started(self, started: bool) -> None:
        """Store whether the machine is to run."""
        self.write(STATE, json.dumps({"started": started}).encode())

    def write(self, name: str, data: bytes, *, durably: bool = True) -> None:
        """Replace one file; raise `VmmError` if that fails.

        A file that each start of the machine writes anew need not survive a power failure, and does not wait for the
        disk.
        """
        replace = replace_file_durably if durably else replace_file
        try:
            self.recover()  # an earlier change of this file must not be completed after it
            replace(self.path / name, data, mode=_MODE)
        except OSError as error:
            raise VmmError(f"{self.path / name}: {error.strerror}") from error

    def change(self, files: Mapping[str, bytes]) -> None:
        """Replace several files, all or none; raise `VmmError` if that fails, and nothing is changed then.

        Once the change is decided it is not undone: files that cannot be moved into place yet are read where they are.
        """
        try:
            self.recover()
            _write_tree(self.path / _CHANGE, files)
            (self.path / _CHANGE).rename(self.path / _CHANGED)
        except OSError as error:
            shutil.rmtree(self.path / _CHANGE, ignore_errors=True)
            raise VmmError(f"{self.path}: {error.strerror}") from error
        with contextlib.suppress(OSError):
            sync_folder(self.path)
            self.recover()

    def recover(self) -> None:
        """Complete a change that was decided, and delete one that was not; raise `OSError`."""
        shutil.rmtree(self.path / _CHANGE, ignore_errors=True)
        changed = self.path / _CHANGED
        if not changed.exists():
            return
        for source in sorted(changed.rglob("*")):
            if source.is_file():
                target = self.path / source.relative_to(changed)
                target.parent.mkdir(exist_ok=True)
                source.replace(target)
                sync_folder(target.parent)
        shutil.rmtree(changed)

    def mark_removing(self) -> None:
        """Store that the machine is being removed, so that a start of the VMM removes the rest."""
        try:
            (self.path / _REMOVING).touch(_MODE)
            sync_folder(self.path)
        except OSError as error:
            raise VmmError(f"{self.path / _REMOVING}: {error.strerror}") from error

    def qemu(self) -> int | None:
        """Return the process id of a QEMU that runs the machine for upstream's VMM, None if none does."""
        try:
            pid = int(self._read_if_present(QEMU_PID))
            name = Path(f"/proc/{pid}/comm").read_text()
        except (ValueError, OSError):
            return None
        return pid if name.startswith("qemu") else None

    @property
    def is_removing(self) -> bool:
        """Return whether the removal has begun."""
        return (self.path / _REMOVING).exists()

    def _read(self, name: str) -> bytes:
        with contextlib.suppress(OSError):
            return (self.path / _CHANGED / name).read_bytes()
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise VmmError(f"{self.path / name}: {error.strerror}") from error

    def _read_if_present(self, name: str) -> bytes:
        try:
            return self._read(name)
        except VmmError:
            return b""


class Store:
    """The folder of all machines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        """Create the folder, and bring every machine into a whole state; raise `OSError`."""
        self.path.mkdir(parents=True, exist_ok=True)
        for found in self.path.iterdir():
            if found.name.startswith((_NEW, _GONE)):
                shutil.rmtree(found, ignore_errors=True)
        for found in list(self.path.iterdir()):
            if is_vm_id(found.name) and found.is_dir():
                folder = self.folder(found.name)
                folder.recover()
                if folder.is_removing:
                    self.remove(found.name)

    def ids(self) -> Iterator[str]:
        """Yield the ids of the machines; folders without a manifest are passed over."""
        for found in sorted(self.path.iterdir()):
            if is_vm_id(found.name) and (found / MANIFEST).is_file():
                yield found.name

    def is_taken(self, vm_id: str) -> bool:
        """Return whether anything has the name that a machine of this id would have."""
        return (self.path / vm_id).exists()

    def folder(self, vm_id: str) -> MachineFolder:
        """Return the folder of a machine; raise `VmmError` for a text that may be no id."""
        if not is_vm_id(vm_id):
            raise VmmError("invalid VM id")
        return MachineFolder(self.path / vm_id)

    def create(self, manifest: Manifest, files: Mapping[str, bytes]) -> MachineFolder:
        """Write a new machine's folder, completely or not at all; raise `VmmError` if that fails."""
        new = self.path / f"{_NEW}{manifest.id}"
        try:
            _write_tree(new, {MANIFEST: manifest.encode(), **files})
            new.rename(self.path / manifest.id)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise VmmError(f"Failed to write manifest: {error.strerror}") from error
        with contextlib.suppress(OSError):  # it exists: this is no failure that could still be undone
            sync_folder(self.path)
        return self.folder(manifest.id)

    def remove(self, vm_id: str) -> None:
        """Delete a machine's folder, if there is one; raise `OSError`."""
        gone = self.path / f"{_GONE}{vm_id}"
        with contextlib.suppress(FileNotFoundError):
            (self.path / vm_id).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _write_tree(root: Path, files: Mapping[str, bytes]) -> None:
    root.mkdir(mode=0o700)
    for name, data in files.items():
        (root / name).parent.mkdir(mode=0o700, exist_ok=True)
        write_durably(root / name, data, _MODE)
    for folder in {(root / name).parent for name in files} | {root}:
        sync_folder(folder)
