"""What an app reports of its health in the file that its app-compose names (`requirements.health_status_file`).

Two lines: `healthy` or `unhealthy`, and Unix seconds. The contents are never quoted in a status. The path is one of
this machine: no virtual machine runs that could have another file system.

Source: dstack guest-agent/src/health.rs at 96e3f7b0, docs/app-health-checks.md at 1f7c6cda.
"""

import stat
from pathlib import Path
from typing import Final

MAX_AGE: Final = 60
"""Seconds for which a report counts; one from the future counts too."""
READ_SIZE: Final = 4096
"""Bytes of the file that are read."""

FILE: Final = "<health_file>"
NO_CONTAINER: Final = ("<compose>", "no container has been created yet")
"""Name and status if health is to come from containers: none runs here."""


class UnhealthyError(Exception):
    """An app that is not healthy: the name of what reported it, and its status."""

    def __init__(self, name: str, status: str) -> None:
        super().__init__(f"{name}: {status}")
        self.name, self.status = name, status


def read_health(path: str, now: float) -> None:
    """Read the report in a file; raise `UnhealthyError` unless it is a fresh one of health. `now` is Unix seconds."""
    lines = _read(path).splitlines()
    if not lines or not "".join(lines).strip():
        raise UnhealthyError(FILE, "health file is empty")
    if len(lines) < 2:
        raise UnhealthyError(FILE, "health file must have two lines: state and unix timestamp")
    try:
        written = int(lines[1].strip())
    except ValueError as error:
        raise UnhealthyError(FILE, "health file line 2 is not a unix time in seconds") from error
    age = int(now) - written
    if age > MAX_AGE:
        raise UnhealthyError(FILE, f"health file is stale: written {age}s ago, limit is {MAX_AGE}s")
    state = lines[0].strip().lower()
    if state == "unhealthy":
        raise UnhealthyError(FILE, "app reports unhealthy")
    if state != "healthy":
        raise UnhealthyError(FILE, "health file line 1 is neither healthy nor unhealthy")


def _read(path: str) -> str:
    file = Path(path)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UnhealthyError(FILE, f"cannot read {path}: not a regular file")
        with file.open("rb") as stream:
            return stream.read(READ_SIZE).decode(errors="replace")
    except FileNotFoundError as error:
        raise UnhealthyError(FILE, f"{path} has not been written yet") from error
    except (OSError, ValueError) as error:
        raise UnhealthyError(FILE, f"cannot read {path}: {error}") from error
