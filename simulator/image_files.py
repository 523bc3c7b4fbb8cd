"""An OS image as a directory, and as the archive that verifiers download.

A directory is written under a temporary name and then renamed, so it is never incomplete. A directory that is read must
be complete: every file that its sha256sum.txt lists, with that checksum.

Not here: root filesystems, of which only a hash is in the command line (files without a checksum are neither read nor
served), and unpacking untrusted archives (`transport.image_archive`).

Source of truth: upstream's image directory and `mr_<os_image_hash>.tar.gz` (312dc605).
"""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.image import MEASUREMENT_FILE, ImageMeasurement, cmdline_sha384, initrd_sha384, os_image_hash
from dstack_emu.attest.os_image import CHECKSUM_FILE, METADATA_FILE, ImageInfo, parse_manifest
from dstack_emu.simulator.image import OsImage, is_bootable, kernel_digest
from dstack_emu.transport.files import replace_file

DIGEST_FILE = "digest.txt"


class ImageFileError(FormatError):
    """A directory is not an image, or none can be written there; the text names it."""


def load_image(folder: Path) -> OsImage:
    """Load an image directory; raise `ImageFileError` that names the wrong file.

    The image's name is that of the directory, without the version in metadata.json.
    """
    checksum_file = _read(folder, CHECKSUM_FILE)
    try:
        manifest = parse_manifest(checksum_file)
    except FormatError as error:
        raise ImageFileError(f"{folder}: {error}") from error
    files = {CHECKSUM_FILE: checksum_file}
    for line in manifest:
        files[line.name] = _read(folder, line.name)
        found = hashlib.sha256(files[line.name]).digest()
        if found != line.digest:
            raise ImageFileError(
                f"{folder}: {line.name}: SHA-256 {line.digest.hex()} expected by {CHECKSUM_FILE}, got {found.hex()}"
            )
    for name in (METADATA_FILE, MEASUREMENT_FILE):
        if name not in files:
            raise ImageFileError(f"{folder}: {CHECKSUM_FILE} does not list {name}")
    image_hash = os_image_hash(checksum_file)
    files[DIGEST_FILE] = f"{image_hash.hex()}\n".encode()
    try:
        info = ImageInfo.parse(files[METADATA_FILE])
        measurement = ImageMeasurement.decode(files[MEASUREMENT_FILE])
    except FormatError as error:
        raise ImageFileError(f"{folder}: {error}") from error
    name = folder.resolve().name.removesuffix(f"-{info.version}")
    return OsImage(name, info.version, MappingProxyType(files), measurement, image_hash)


def disagreements(image: OsImage) -> list[str]:
    """Return the differences between an image's measurement document and its files.

    An image with differences is verified as another image. MRTD and TD HOB are not compared: they come from the
    firmware, which is not parsed here.
    """
    metadata = json.loads(image.files[METADATA_FILE])
    kernel, initrd = (image.files.get(metadata[part]) for part in ("kernel", "initrd"))
    found = []
    declared = metadata.get("kernel_header_normalized", False)
    if image.measurement.kernel_header_normalized != declared:
        found.append(f"kernel_header_normalized is not that of {METADATA_FILE}")
    if image.measurement.cmdline_sha384 != cmdline_sha384(metadata["cmdline"]):
        member = "cmdline_sha384" if image.measurement.cmdline is None else "cmdline"
        found.append(f"{member} is not of the command line in {METADATA_FILE}")
    if initrd is not None and image.measurement.initrd_sha384 != initrd_sha384(initrd):
        found.append(f"initrd_sha384 is not of {metadata['initrd']}")
    if kernel is not None and initrd is not None:
        try:
            digest = kernel_digest(kernel, len(initrd), normalized=image.measurement.kernel_header_normalized)
        except FormatError as error:
            found.append(f"{metadata['kernel']} cannot be measured: {error}")
        else:
            if image.measurement.kernel_authenticode != digest and is_bootable(kernel):
                found.append(f"kernel_authenticode is not of {metadata['kernel']}")
    return [f"{MEASUREMENT_FILE}: {what}" for what in found]


def save_image(image: OsImage, folder: Path, *, replace: bool = False) -> None:
    """Write an image directory, completely or not at all; raise `ImageFileError`.

    An existing image is only replaced with `replace`; another non-empty directory is never replaced.
    """
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ImageFileError(f"{folder} is there, and no directory")
        if folder.exists() and any(folder.iterdir()):
            if not (folder / CHECKSUM_FILE).is_file():
                raise ImageFileError(f"{folder} is there, and no image: it is not replaced")
            if not replace:
                raise ImageFileError(f"{folder} is there already: --force replaces it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
            new, old = Path(work, "new"), Path(work, "old")
            new.mkdir()
            for name, content in image.files.items():
                (new / name).write_bytes(content)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    except OSError as error:
        raise ImageFileError(f"{folder} cannot be written: {error.strerror}") from error


def archive(files: Mapping[str, bytes]) -> bytes:
    """Pack an image for download: without folders, with the same bytes for the same files."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def fill_cache(image: OsImage, cache_dir: Path, entry: str, content: bytes) -> Path:
    """Write an image and the registers of one VM to a verifier's cache; return the path of the registers."""
    folder, path = cache_dir / "images" / image.os_image_hash.hex(), cache_dir / "measurements" / f"{entry}.json"
    if not (folder / METADATA_FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        save_image(image, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise ImageFileError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ImageFileError(f"{folder} is no image directory: cannot read {name}: {error.strerror}") from error
