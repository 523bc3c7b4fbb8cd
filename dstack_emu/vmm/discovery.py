"""The file by which vmm-cli.py finds a running VMM, one for each VMM, in a folder of its user.

Source: dstack `vmm/src/discovery.rs` at 312dc605.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from dstack_emu.transport.events import EventLog
from dstack_emu.transport.files import replace_file
from dstack_emu.vmm.config import VmmConfig

FOLDER: Final = "dstack-vmm"

_log = EventLog("dstack_emu.vmm")


def discovery_folder(variables: Mapping[str, str]) -> Path:
    """Return the folder: in `XDG_RUNTIME_DIR`, or in that of this user."""
    return Path(variables.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}") / FOLDER


@dataclass(frozen=True, slots=True)
class DiscoveryFile:
    """The file of a VMM that runs. `path` is None if it could not be written."""

    path: Path | None

    @classmethod
    def write(
        cls, folder: Path, address: str, config: VmmConfig, *, config_file: Path | None, version: str, now: float
    ) -> Self:
        """Write it, and remove those of VMMs that ended without doing so; `now` is in Unix seconds.

        Without it vmm-cli.py needs the address, so a folder that cannot be written is only logged.
        """
        vmm_id = str(uuid.uuid4())
        document = {
            "id": vmm_id,
            "pid": os.getpid(),
            "address": address,
            "working_dir": str(Path.cwd()),
            "config_file": None if config_file is None else str(config_file),
            "image_path": str(config.image.path),
            "run_path": str(config.run_path),
            "node_name": config.node_name,
            "version": version,
            "started_at": int(now),
        }
        path = folder / f"{vmm_id}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _remove_stale(folder)
            replace_file(path, json.dumps(document, indent=2).encode())
        except OSError as error:
            _log.warning("discovery file not written", path=str(path), reason=error.strerror or str(error))
            return cls(None)
        return cls(path)

    def remove(self) -> None:
        """Remove it."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _remove_stale(folder: Path) -> None:
    for path in folder.glob("*.json"):
        try:
            pid = json.loads(path.read_bytes())["pid"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(pid, int) and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
