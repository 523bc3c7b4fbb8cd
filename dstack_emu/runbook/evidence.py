"""The archive of a run: the files that the runbook requires, and the SHA-256 of each.

The same run gives the same bytes: names are sorted, owners and times are fixed, and what differs from run to run (a
free port, a temporary folder, a duration) is replaced or omitted. The archive contains no private keys.
"""

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.clock import ISSUED_AT
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


def pack_evidence(files: Mapping[str, str], about: Mapping[str, Any]) -> bytes:
    """Pack files, and a manifest with their sizes and hashes, into a tar.gz."""
    contents = {name: text.encode() for name, text in files.items()}
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()}
    manifest = {**about, "files": dict(sorted(sums.items()))}
    contents[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in sorted(contents.items()):
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size, entry.mtime, entry.mode = len(data), ISSUED_AT, 0o644
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


class Destination:
    """A file that is written completely or not at all. Create it before the run, so that a bad path fails early."""

    def __init__(self, path: Path) -> None:
        """Create a temporary file beside `path`; raise `OSError` if that is not possible."""
        self.path = path
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        os.close(handle)
        self._temporary: Path | None = Path(name)

    def write(self, data: bytes) -> None:
        """Write the content to the path; raise `OSError` if that fails."""
        if self._temporary is None:
            raise ValueError("written or discarded already")
        self._temporary.write_bytes(data)
        self._temporary.chmod(0o644)
        os.replace(self._temporary, self.path)
        self._temporary = None

    def discard(self) -> None:
        """Remove the temporary file, if nothing was written."""
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None
