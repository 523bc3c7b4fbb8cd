"""Digests of the files that an image boots: command line, initrd, and the kernel as QEMU patches it."""

import hashlib
import struct
from operator import itemgetter

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.image.memory import ACPI_DATA_SIZE, HIGH_MEMORY, LOW_MEMORY


def cmdline_sha384(cmdline: str) -> bytes:
    """Digest metadata.json's command line as measured: ` initrd=initrd` appended, UTF-16LE, a final NUL."""
    return hashlib.sha384(f"{cmdline} initrd=initrd\0".encode("utf-16-le")).digest()


def initrd_sha384(initrd: bytes) -> bytes:
    """Digest the initrd file."""
    return hashlib.sha384(initrd).digest()


def kernel_authenticode(kernel: bytes, initrd_size: int, memory_size: int = HIGH_MEMORY) -> bytes:
    """Digest a bzImage as the firmware sees it: Authenticode sha384 of the PE that QEMU patched.

    At 2 GiB, and from 2.75 GiB on, the result does not depend on memory_size. Raises FormatError for bytes
    that are no PE, for a boot protocol before 2.12, and for an initrd that does not fit.
    """
    return _authenticode_sha384(_patch_kernel(kernel, initrd_size, memory_size))


def file_authenticode(kernel: bytes) -> bytes:
    """Digest a bzImage as firmware sees it that normalizes the setup header: Authenticode sha384 of the file."""
    return _authenticode_sha384(kernel)


def _patch_kernel(kernel: bytes, initrd_size: int, memory_size: int) -> bytes:
    if len(kernel) < 0x1000:
        raise FormatError(f"the kernel image is too short: {len(kernel)} bytes, expected at least 4096")
    patched = bytearray(kernel)
    (protocol,) = struct.unpack_from("<H", patched, 0x206)
    if protocol < 0x20C or not patched[0x211] & 0x01:
        raise FormatError(f"kernel boot protocol {protocol:#06x} loaded low, expected 0x020c or later, loaded high")
    patched[0x210] = 0xB0  # type_of_loader: QEMU
    patched[0x211] |= 0x80  # loadflags: CAN_USE_HEAP
    struct.pack_into("<II", patched, 0x224, 0xFE00, 0x20000)  # heap_end_ptr, cmd_line_ptr
    if initrd_size == 0:
        return bytes(patched)

    (xloadflags,) = struct.unpack_from("<H", patched, 0x236)
    below_4g = LOW_MEMORY if memory_size >= HIGH_MEMORY else memory_size
    initrd_max = min(0xFFFF_FFFF if xloadflags & 0x40 else 0x37FF_FFFF, below_4g - ACPI_DATA_SIZE - 1)
    if initrd_size >= initrd_max:
        raise FormatError(f"initrd is too large: {initrd_size} bytes, expected less than {max(initrd_max, 0)}")
    struct.pack_into("<II", patched, 0x218, (initrd_max - initrd_size) & ~0xFFF, initrd_size)
    return bytes(patched)


def _authenticode_sha384(pe: bytes) -> bytes:
    """Hash a PE without its checksum, its certificate directory entry and its certificates, as upstream does.

    Bytes behind the last section count only when certificates follow them.
    """

    def field(code: str, offset: int, name: str) -> int:
        try:
            value: int = struct.unpack_from(f"<{code}", pe, offset)[0]
        except struct.error as error:
            raise FormatError(f"kernel PE: {name} at {offset:#x} is beyond its {len(pe)} bytes") from error
        return value

    signature = field("I", 0x3C, "PE header offset")
    if (got := field("I", signature, "PE signature")) != 0x4550:
        raise FormatError(f"kernel PE: invalid PE signature {got:#x}, expected 0x4550")
    coff = signature + 4
    optional = coff + 20
    checksum = optional + 64
    directories = optional + (112 if field("H", optional, "magic") == 0x20B else 96)
    certificates = directories + 4 * 8
    certificates_at = field("I", certificates, "certificate table address")
    certificates_size = field("I", certificates + 4, "certificate table size")
    headers_size = field("I", optional + 60, "size of headers")
    if not certificates + 8 <= headers_size <= len(pe):
        raise FormatError(f"kernel PE: size of headers {headers_size}, expected {certificates + 8} to {len(pe)}")

    digest = hashlib.sha384(pe[:checksum])
    digest.update(pe[checksum + 4 : certificates])
    digest.update(pe[certificates + 8 : headers_size])

    table = optional + field("H", coff + 16, "size of optional header")
    sections = []
    for header in range(table, table + 40 * field("H", coff + 2, "number of sections"), 40):
        size, start = field("I", header + 16, "section size"), field("I", header + 20, "section offset")
        if size:
            sections.append((start, size))
    hashed = headers_size
    for start, size in sorted(sections, key=itemgetter(0)):
        digest.update(pe[start : start + size])
        hashed += size

    trailing = len(pe) - hashed - certificates_size
    if certificates_at and certificates_size and trailing > 0:
        digest.update(pe[hashed : hashed + trailing])
    digest.update(bytes(-len(pe) % 8))
    return digest.digest()
