"""Files that are replaced at once: whoever reads one finds the old content or the new, never half of it."""

import os
from pathlib import Path
from typing import Final

UNFINISHED: Final = ".*.new"
"""The pattern of files that a crash may leave beside the ones they were to replace."""


def replace_file(path: Path, data: bytes, *, like_folder: bool = False) -> None:
    """Write a file beside its place and move it there; raise `OSError`.

    With `like_folder` it gets the owner of its folder, if this process may give files away. It is not made durable: a
    power failure may undo it.
    """
    temporary = beside(path)
    temporary.write_bytes(data)
    if like_folder and os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(temporary, owner.st_uid, owner.st_gid)
    temporary.replace(path)


def replace_file_durably(path: Path, data: bytes, mode: int) -> None:
    """Do the same, and return once it outlasts a power failure; `mode` is the file's. Raises `OSError`."""
    temporary = beside(path)
    write_durably(temporary, data, mode)
    temporary.replace(path)
    sync_folder(path.parent)


def write_durably(path: Path, data: bytes, mode: int) -> None:
    """Write a file and have it stored."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder stored."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path) -> Path:
    """Return where a file's new content is written first."""
    return path.with_name(f".{path.name}.new")
