"""The local OS images of a VMM: folders with a metadata.json, and images that exist without a folder.

Source: dstack `vmm/src/app.rs` and `vmm/src/main_service.rs` at 312dc605.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.os_image import METADATA_FILE, ImageInfo
from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.manifest import Manifest


class Images:
    """The images of one folder, and `built_in` ones: the content of the metadata.json of each, by name."""

    def __init__(self, folder: Path, built_in: Mapping[str, bytes]) -> None:
        self._folder, self._built_in = folder, built_in

    def all(self) -> list[pb.ImageInfo]:
        """Return every image, in the order of their names; a folder whose metadata cannot be read is left out."""
        names = {path.name for path in self._folder.iterdir()} if self._folder.is_dir() else set()
        found = ((name, self._metadata(name)) for name in sorted(names | self._built_in.keys()))
        return [
            pb.ImageInfo(
                name=name,
                description=json.dumps(metadata, separators=(",", ":")),
                version=str(metadata.get("version", "")),
                is_dev=metadata.get("is_dev") is True,
            )
            for name, metadata in found
            if metadata is not None
        ]

    def version(self, name: str) -> str:
        """Return the version of an image, empty if its metadata cannot be read."""
        return str((self._metadata(name) or {}).get("version", ""))

    def delete(self, name: str, users: Iterable[Manifest]) -> None:
        """Delete an image's folder; raise `VmmError` if a machine uses it, or it is no folder."""
        if not name or ".." in name or "/" in name or "\0" in name:
            raise VmmError("invalid image name")
        for manifest in users:
            if manifest.image == name:
                raise VmmError(f"cannot delete image '{name}': in use by VM '{manifest.name}'")
        folder = self._folder / name
        if not folder.exists():
            raise VmmError(f"image '{name}' not found")
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise VmmError(f"failed to delete image directory: {folder}: {error.strerror}") from error

    def _metadata(self, name: str) -> dict[str, Any] | None:
        try:
            folder = self._folder / name
            content = self._built_in[name] if name in self._built_in and not folder.exists() else None
            content = (folder / METADATA_FILE).read_bytes() if content is None else content
            ImageInfo.parse(content)
            document = json.loads(content)
        except (OSError, FormatError, ValueError):
            return None
        return document if isinstance(document, dict) else None
