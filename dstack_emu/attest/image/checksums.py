"""An image's `sha256sum.txt`, whose own hash names the image."""

import hashlib
from collections.abc import Mapping
from typing import Final

from dstack_emu.attest.errors import FormatError

MEASUREMENT_FILE: Final = "measurement.tdx.cbor"
CHECKED_FILES: Final = (
    "ovmf.fd",
    "bzImage",
    "initramfs.cpio.gz",
    "metadata.json",
    MEASUREMENT_FILE,
    "measurement.snp.cbor",
    "measurement.gcp.cbor",
    "measurement.aws.cbor",
    "measurement.aws.replay.json",
)


def sha256sum_txt(files: Mapping[str, bytes]) -> bytes:
    """Write `sha256sum.txt` over an image's files, in the order of CHECKED_FILES whatever the mapping's.

    Raises FormatError for a file that has no line there: the rootfs is bound through the command line
    instead.
    """
    if unknown := files.keys() - set(CHECKED_FILES):
        raise FormatError(f"no line in sha256sum.txt for {', '.join(sorted(unknown))}")
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in CHECKED_FILES if name in files]
    return "".join(lines).encode()


def os_image_hash(checksum_file: bytes) -> bytes:
    """Hash `sha256sum.txt` to the 32 bytes that name the image, in the legacy and the lite variant alike."""
    return hashlib.sha256(checksum_file).digest()


def sha256sum_entry(checksum_file: bytes, filename: str) -> bytes:
    """Look up one file's 32-byte hash; its name is the second word, exactly (`*name` is another).

    Raises FormatError with upstream's texts: not UTF-8, a line without a name, no such line, two of them, bad
    hash.
    """
    try:
        lines = checksum_file.decode().split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"sha256sum.txt is not valid UTF-8: {error}") from error
    found: bytes | None = None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            raise FormatError(f"sha256sum.txt line {number} is missing filename")
        if words[1] != filename:
            continue
        if found is not None:
            raise FormatError(f"sha256sum.txt contains duplicate {filename} entries")
        try:
            found = bytes.fromhex(words[0])
        except ValueError as error:
            raise FormatError(f"sha256sum.txt {filename} hash is not valid hex: {error}") from error
        if len(found) != 32:
            raise FormatError(f"sha256sum.txt {filename} hash has invalid length {len(found)}, expected 32")
    if found is None:
        raise FormatError(f"sha256sum.txt is missing {filename}")
    return found
