"""Atomic replacement of files: a reader finds the old content or the new one, never a part of it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

UNFINISHED: Final = ".*.new"
"""The pattern of the temporary files that a crash may leave behind."""


def replace_file(path: Path, data: bytes, *, like_folder: bool = False, mode: int = 0o666) -> None:
    """Write a temporary file and rename it to `path`; raise `OSError`.

    `mode` is the mode of the file, less the umask. With `like_folder` it gets the owner of its folder if this process
    is root. It is not synchronized to the disk: a power failure may undo the change.
    """
    with _moved_to(path) as temporary:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
        if like_folder and os.geteuid() == 0:
            owner = path.parent.stat()
            os.chown(temporary, owner.st_uid, owner.st_gid)


def replace_file_durably(path: Path, data: bytes, mode: int) -> None:
    """Replace a file and synchronize it to the disk, so that it survives a power failure.

    `mode` is the mode of the file. Raises `OSError`.
    """
    with _moved_to(path) as temporary:
        write_durably(temporary, data, mode)
    sync_folder(path.parent)


@contextlib.contextmanager
def _moved_to(path: Path) -> Iterator[Path]:
    """Move the temporary file that the block writes to its place; if that fails, leave nothing behind."""
    temporary = beside(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_durably(path: Path, data: bytes, mode: int) -> None:
    """Write a file and synchronize it to the disk; raise `OSError`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Synchronize the names in a folder to the disk; raise `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path) -> Path:
    """Return the path of the temporary file for a file."""
    return path.with_name(f".{path.name}.new")
