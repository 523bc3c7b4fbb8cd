"""Unpacks the archive of an OS image, which comes from the network, into a folder, and verifies the files.

An archive may contain plain files and folders. Anything else is refused: a path outside the folder, links, devices, a
duplicate entry, or more than the limits. Nothing is executed, and no permissions are applied.

The functions block, so call them by `in_thread`. They call `stopped` for every piece, and stop if it returns true.

Source of truth: `extract_image_archive` and `download_image` of dstack `dstack/verifier/src/verification.rs` at
312dc605. The bounds and the refusal of duplicates are this emulator's.
"""

import asyncio
import hashlib
import os
import shutil
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from gzip import BadGzipFile, GzipFile
from pathlib import Path, PurePosixPath
from typing import IO, Final, TypeVar

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.os_image import CHECKSUM_FILE, METADATA_FILE, ManifestLine, parse_manifest, require_checksums

PIECE: Final = 256 * 1024
"""The number of bytes that are read at a time."""

_MAX_ADDITION: Final = 64 * 1024  # bytes of an extension before an entry's header, such as a long name
_ADDITIONS: Final = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MAX_DEPTH: Final = 16  # nested folders; an image has none
_MAX_TEXT: Final = 1024 * 1024  # of sha256sum.txt

Stopped = Callable[[], bool]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of an image: bytes of the archive, bytes of all files in it, and number of entries."""

    archive: int = 1 << 30
    unpacked: int = 2 << 30
    entries: int = 1000


class StoppedError(Exception):
    """The caller has stopped the work."""


class _Stream:
    """The uncompressed bytes of an archive, up to a limit."""

    def __init__(self, tar: IO[bytes] | GzipFile, limit: int, stopped: Stopped) -> None:
        self._tar, self._limit, self._left, self._stopped = tar, limit, limit, stopped

    def exactly(self, size: int) -> bytes:
        """Read exactly `size` bytes; raise `FormatError` if there are fewer, or `StoppedError`."""
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield exactly `size` bytes in pieces; raise `FormatError` if there are fewer, or `StoppedError`."""
        if size > self._left:
            raise FormatError(f"image archive unpacks to more than {self._limit} bytes")
        self._left -= size
        while size:
            if self._stopped():
                raise StoppedError
            piece = self._tar.read(min(size, PIECE))
            if not piece:
                raise FormatError("Failed to read image archive entry: unexpected end of the archive")
            size -= len(piece)
            yield piece

    def padding(self, size: int) -> None:
        """Skip the padding after an entry of that size."""
        self.exactly(-size % tarfile.BLOCKSIZE)


async def in_thread(work: Callable[[Stopped], T]) -> T:
    """Run blocking work in a thread; if cancelled, wait until it has stopped, so that it writes nothing afterwards."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop.is_set))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait((task,))
        raise
    except StoppedError as error:  # although nobody stopped it
        raise FormatError("unpacking was given up") from error


def unpack(archive: Path, folder: Path, limits: Limits, stopped: Stopped, *, takes_plain: bool = False) -> None:
    """Unpack a tar.gz into an empty folder; raise `FormatError` naming the entry that is wrong.

    With `takes_plain` the tar may be without compression, too.
    """
    files: set[PurePosixPath] = set()
    # In addition to the files: headers, padding, and the extensions before entries.
    overhead = limits.entries * (4 * tarfile.BLOCKSIZE + _MAX_ADDITION) + tarfile.RECORDSIZE
    try:
        with archive.open("rb") as file, file if takes_plain and not is_gzip(file) else GzipFile(archive) as tar:
            stream = _Stream(tar, limits.unpacked + overhead, stopped)
            left = limits.unpacked
            for count, entry in enumerate(_entries(stream), 1):
                if count > limits.entries:
                    raise FormatError(f"image archive has more than {limits.entries} entries")
                if entry.size > left:
                    raise FormatError(f"image archive unpacks to more than {limits.unpacked} bytes")
                left -= entry.size
                _unpack_entry(stream, entry, folder, files)
    except (tarfile.TarError, BadGzipFile, EOFError, zlib.error) as error:
        raise FormatError(f"Failed to read image archive: {error}") from error
    except (OSError, ValueError) as error:  # an impossible file name raises either
        cause = error.strerror if isinstance(error, OSError) else error
        raise FormatError(f"Failed to extract image archive entry: {cause}") from error


def is_gzip(file: IO[bytes]) -> bool:
    """Return whether a file, of which nothing was read, is gzipped; its position stays."""
    start = file.read(2)
    file.seek(0)
    return start == b"\x1f\x8b"


def _entries(stream: _Stream) -> Iterator[tarfile.TarInfo]:
    """Yield the headers, with long names applied; the caller reads content and padding before it takes the next one.

    `tarfile` parses single headers only: if it read the stream, it would load sparse maps of any size into memory.
    """
    name, size = "", -1
    while True:
        block = stream.exactly(tarfile.BLOCKSIZE)
        if not any(block):
            return
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if entry.size < 0:
            raise FormatError(f"image archive has an entry of {entry.size} bytes")
        if entry.type in _ADDITIONS:
            if entry.size > _MAX_ADDITION:
                raise FormatError(f"image archive has a header of {entry.size} bytes, at most {_MAX_ADDITION} expected")
            content = stream.exactly(entry.size)
            stream.padding(entry.size)
            if entry.type == tarfile.GNUTYPE_LONGNAME:
                name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif entry.type == tarfile.XHDTYPE:
                name, size = _pax(content)
            continue  # the long target of a link, which is refused below; global records are not needed
        entry.name, entry.size = name or entry.name, entry.size if size < 0 else size
        name, size = "", -1
        yield entry


def _pax(content: bytes) -> tuple[str, int]:
    """Return name and size in an entry's pax records; empty and -1 if they are not there."""
    name, size = "", -1
    while content:
        length, space, _ = content.partition(b" ")
        if not (space and length.isdigit() and len(length) < 6 and len(length) + 2 < int(length) <= len(content)):
            raise FormatError("Failed to read image archive entry: malformed pax record")
        record = content[len(length) + 1 : int(length) - 1]
        content = content[int(length) :]
        key, _, value = record.partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise FormatError("image archive contains unsupported entry: a sparse file")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 15:
                raise FormatError("Failed to read image archive entry: malformed pax record")
            size = int(value)
    return name, size


def _unpack_entry(stream: _Stream, entry: tarfile.TarInfo, folder: Path, files: set[PurePosixPath]) -> None:
    path = PurePosixPath(entry.name)
    shown = repr(entry.name)[1:-1][:200]
    if path.is_absolute() or ".." in path.parts or len(path.parts) > _MAX_DEPTH:
        raise FormatError(f"image archive contains unsafe path {shown}")
    target = folder / path
    if entry.type == tarfile.DIRTYPE:
        for _ in stream.pieces(entry.size):  # a folder has no content, but its header could state a size
            pass
        target.mkdir(parents=True, exist_ok=True)
    elif entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
        if path in files:
            raise FormatError(f"image archive contains duplicate entry {shown}")
        files.add(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for piece in stream.pieces(entry.size):
                file.write(piece)
    else:
        raise FormatError(f"image archive contains unsupported entry {shown}")
    stream.padding(entry.size)


def verify_image_files(folder: Path, os_image_hash: str, stopped: Stopped) -> None:
    """Verify an unpacked image: every listed file has its checksum, and the list has the image's hash (hex).

    Files that are not listed are deleted. Raises `FormatError` with upstream's text.
    """
    checksum_file = _read_text(folder / CHECKSUM_FILE)
    manifest = parse_manifest(checksum_file)
    require_checksums(manifest, {line.name: _sha256(folder / line.name, stopped) for line in manifest})
    _drop_unlisted(folder, manifest)
    if hashlib.sha256(checksum_file).hexdigest() != os_image_hash:
        raise FormatError(f"os_image_hash does not match sha256({CHECKSUM_FILE})")
    if not (folder / METADATA_FILE).is_file():
        raise FormatError(f"{METADATA_FILE} not found in the extracted archive")


def _read_text(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_TEXT + 1)
    except OSError as error:
        raise FormatError(f"Failed to read {path.name}: {error.strerror}") from error
    if len(text) > _MAX_TEXT:
        raise FormatError(f"Failed to read {path.name}: longer than {_MAX_TEXT} bytes")
    return text


def _sha256(path: Path, stopped: Stopped) -> bytes | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                if stopped():
                    raise StoppedError
                digest.update(piece)
    except OSError:  # missing, or a folder
        return None
    return digest.digest()


def _drop_unlisted(folder: Path, manifest: tuple[ManifestLine, ...]) -> None:
    kept = {CHECKSUM_FILE, *(line.listed for line in manifest)}
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            os.unlink(path)
