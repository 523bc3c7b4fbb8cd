"""The archive of a run: the files that the runbook requires, the SHA-256 of each, and a page that shows them.

The same run gives the same bytes: names are sorted, owners and times are fixed, and what differs from run to run (a
free port, a temporary folder, a duration) is replaced or omitted. The archive contains no private keys.
"""

import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.clock import ISSUED_AT
from dstack_emu.runbook.page import INDEX, evidence_page
from dstack_emu.transport.urls import without_credentials

FOLDER: Final = "kms-self-auth"
MANIFEST: Final = "manifest.json"
_PORT: Final = re.compile(r"\b(127\.0\.0\.1|localhost):\d+\b")
_DURATION: Final = re.compile(r"\b\d+(\.\d+)? ?(ms|µs|s)\b")


def normalised(text: str, names: Mapping[str, str]) -> str:
    """Return a text with a stack's own addresses and folders replaced by names, and without credentials in URLs."""
    for address, name in sorted(names.items(), key=lambda item: -len(item[0])):
        text = text.replace(address, name)
    return without_credentials(text)


def normalised_log(lines: list[str], names: Mapping[str, str]) -> str:
    """Return a log with the same replacements, without durations and without the ports of clients."""
    text = normalised("".join(f"{line}\n" for line in lines), names)
    return _DURATION.sub("…", _PORT.sub(r"\1", text))


def evidence_files(files: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, bytes]:
    """Return files with the page that shows them, and a manifest with their sizes and hashes, by name."""
    contents = {name: text.encode() for name, text in {**files, INDEX: evidence_page(files)}.items()}
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()}
    manifest = {**about, "files": dict(sorted(sums.items()))}
    contents[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    return contents


def packed(contents: Mapping[str, bytes]) -> bytes:
    """Pack files into a tar.gz."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in sorted(contents.items()):
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size, entry.mtime, entry.mode = len(data), ISSUED_AT, 0o644
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


class Destination:
    """A tar.gz, or an empty folder, that is written completely or not at all.

    Create it before the run, so that a bad path fails early.
    """

    def __init__(self, path: Path, *, is_folder: bool = False) -> None:
        """Create a temporary file, or folder, beside `path`; raise `OSError` if that is not possible.

        An existing folder, or a path that does not exist with `is_folder`, gets the files themselves.
        """
        self.path = path
        self._is_folder = is_folder or path.is_dir()
        parent = path.absolute().parent
        if self._is_folder:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise OSError(errno.ENOTEMPTY, "an empty folder, or a new one, expected")
            self._temporary: Path | None = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
        else:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=parent)
            os.close(handle)
            self._temporary = Path(name)

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Write the files to the path; raise `OSError` if that fails."""
        if self._temporary is None:
            raise ValueError("written or discarded already")
        if self._is_folder:
            for name, data in contents.items():
                file = self._temporary / name
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(data)
            self._temporary.chmod(0o755)
        else:
            self._temporary.write_bytes(packed(contents))
            self._temporary.chmod(0o644)
        os.replace(self._temporary, self.path)
        self._temporary = None

    def discard(self) -> None:
        """Remove what is temporary, if nothing was written."""
        if self._temporary is not None and self._is_folder:
            shutil.rmtree(self._temporary, ignore_errors=True)
        elif self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        self._temporary = None
