"""Measuring an OS image: from its files or its measurement document to boot events, MRTD and RTMR0 to 2.

A TD's firmware extends each boot event's digest into a register: MR = sha384(MR ‖ digest), from 48 zero
bytes. What an image contributes (kernel, command line, initrd, MRTD of the firmware) is the same for every
machine and stands in `measurement.tdx.cbor`; what the machine contributes is its memory size, through the TD
HOB, and its ACPI tables.

What this module does not do: compute an MRTD from a firmware's TDVF sections, generate ACPI tables (QEMU
does; digests of them come in as arguments), follow boot protocols older than 2.12, or decide anything about a
quote. That registers equal these proves nothing by itself: ACPI digests taken from an event log are the
host's word.

Source of truth: upstream's dstack-mr and dstack-types (312dc605), and event logs of real hardware; TD HOB: PI
specification vol. 3; payloads: TCG PC Client Platform Firmware Profile; kernel header: QEMU `hw/i386/x86.c`.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Final, Self, TypeVar
from uuid import UUID

import cbor2

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import ACPI_PAYLOAD, TdxEvent, replay_register
from dstack_emu.attest.varint import encode_varint, read_varint
from dstack_emu.attest.vmconfig import VmConfig

MEASUREMENT_FILE = "measurement.tdx.cbor"
CHECKED_FILES = (
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

MEASUREMENT_VERSION = 3
OVMF_VARIANT: Final = "pre202505"

EV_SEPARATOR = 0x4
EV_EVENT_TAG = 0x6
EV_PLATFORM_CONFIG_FLAGS = 0xA
EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
EV_EFI_VARIABLE_BOOT = 0x80000002
EV_EFI_BOOT_SERVICES_APPLICATION = 0x80000003
EV_EFI_ACTION = 0x80000007
EV_EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000000A
EV_EFI_HANDOFF_TABLES2 = 0x8000000B

ACPI_EVENT_NAMES = ("acpi-loader", "acpi-rsdp", "acpi-tables")

# sha384 of the three blobs that QEMU hands to the firmware, in the order of ACPI_EVENT_NAMES.
AcpiDigests = tuple[bytes, bytes, bytes]

# From _HIGH_MEMORY bytes on, QEMU's q35 keeps _LOW_MEMORY of them below 4 GiB and moves the rest above.
_LOW_MEMORY = 0x8000_0000
_HIGH_MEMORY = 0xB000_0000
_FOUR_GIB = 0x1_0000_0000
# What QEMU keeps free for ACPI data at the end of low memory when it places the initrd.
_ACPI_DATA_SIZE = 0x28000
_PAGE = 0x1000
# No x86 physical address reaches it, so sums of addresses below it stay within 64 bits.
_ADDRESS_LIMIT = 1 << 52


# Image identity


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


# The measurement document

_T = TypeVar("_T")


def _member(container: object, name: str, kind: type[_T]) -> _T:
    if type(container) is not dict or name not in container:
        raise FormatError(f"missing field `{name}`")
    value = container[name]
    # Exact types: CBOR's true is no integer, though Python's True is one.
    if type(value) is not kind:
        raise FormatError(f"field `{name}` is {type(value).__name__}, expected {kind.__name__}")
    return value


@dataclass(frozen=True, slots=True)
class ImageMeasurement:
    """`measurement.tdx.cbor`: what an image brings to the registers of every TD it boots in.

    The digests are 48 bytes each and td_hob is an encoded TdHobWitness, but neither is checked before
    `measure` needs it, as upstream. kernel_authenticode is of the kernel as patched for 2 GiB, or for 2.75
    GiB and more.
    """

    cmdline_sha384: bytes
    kernel_authenticode: bytes
    initrd_sha384: bytes
    mrtd_single_pass: bytes
    mrtd_two_pass: bytes
    td_hob: bytes

    def encode(self) -> bytes:
        """Encode as upstream's image build does: definite lengths, this order (not CBOR's canonical one)."""
        document = {
            "version": MEASUREMENT_VERSION,
            "image": {
                "cmdline_sha384": self.cmdline_sha384,
                "kernel_authenticode": self.kernel_authenticode,
                "initrd_sha384": self.initrd_sha384,
            },
            "tdvf": {
                "ovmf": OVMF_VARIANT,
                "mrtd": {"single_pass": self.mrtd_single_pass, "two_pass": self.mrtd_two_pass},
                "td_hob": self.td_hob,
            },
        }
        return cbor2.dumps(document)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Decode a document: any member order, unknown members and trailing bytes are let pass.

        Hash the bytes that came, never a re-encoding. Raises FormatError, its text beginning with upstream's
        `TdxOsImageMeasurement: `.
        """
        try:
            document = cbor2.loads(data, allow_duplicate_keys=False, strict_hashable_types=True)
            version = _member(document, "version", int)
            image = _member(document, "image", dict)
            tdvf = _member(document, "tdvf", dict)
            mrtd = _member(tdvf, "mrtd", dict)
            if (ovmf := _member(tdvf, "ovmf", str)) != OVMF_VARIANT:
                raise FormatError(f"unknown variant `{ovmf}`, expected `{OVMF_VARIANT}`")
            measurement = cls(
                cmdline_sha384=_member(image, "cmdline_sha384", bytes),
                kernel_authenticode=_member(image, "kernel_authenticode", bytes),
                initrd_sha384=_member(image, "initrd_sha384", bytes),
                mrtd_single_pass=_member(mrtd, "single_pass", bytes),
                mrtd_two_pass=_member(mrtd, "two_pass", bytes),
                td_hob=_member(tdvf, "td_hob", bytes),
            )
        except (cbor2.CBORDecodeError, FormatError) as error:
            raise FormatError(f"TdxOsImageMeasurement: failed to decode CBOR: {error}") from error
        if version != MEASUREMENT_VERSION:
            raise FormatError(f"TdxOsImageMeasurement: unsupported version {version}, expected {MEASUREMENT_VERSION}")
        return measurement


# Digests of the image's files


def cmdline_sha384(cmdline: str) -> bytes:
    """Digest metadata.json's command line as measured: ` initrd=initrd` appended, UTF-16LE, a final NUL."""
    return _sha384(f"{cmdline} initrd=initrd\0".encode("utf-16-le"))


def initrd_sha384(initrd: bytes) -> bytes:
    """Digest the initrd file."""
    return _sha384(initrd)


def kernel_authenticode(kernel: bytes, initrd_size: int, memory_size: int = _HIGH_MEMORY) -> bytes:
    """Digest a bzImage as the firmware sees it: Authenticode sha384 of the PE that QEMU patched.

    At 2 GiB, and from 2.75 GiB on, the result does not depend on memory_size. Raises FormatError for bytes
    that are no PE, for a boot protocol before 2.12, and for an initrd that does not fit.
    """
    return _authenticode_sha384(_patch_kernel(kernel, initrd_size, memory_size))


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
    below_4g = _LOW_MEMORY if memory_size >= _HIGH_MEMORY else memory_size
    initrd_max = min(0xFFFF_FFFF if xloadflags & 0x40 else 0x37FF_FFFF, below_4g - _ACPI_DATA_SIZE - 1)
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


# The TD HOB


@dataclass(frozen=True, slots=True)
class TdHobWitness:
    """The firmware's TD_HOB and TEMP_MEM ranges, from which the TD HOB of any memory size follows.

    hob_page is where the HOB list lies; ranges are (first page, pages), pages being 4 KiB. Encoded as
    unsigned LEB128 numbers: base, hob_page - base, count, then first page - base and pages of each range,
    base being the lowest page.
    """

    hob_page: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def hob_address(self) -> int:
        return self.hob_page * _PAGE

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a witness to its last byte. Raises FormatError, with upstream's texts where it has one."""
        numbers = _read_numbers(data)
        if len(numbers) < 3 or len(numbers) < 3 + 2 * numbers[2]:
            raise FormatError("truncated TD HOB witness varuint")
        if len(numbers) > 3 + 2 * numbers[2]:
            raise FormatError("TD HOB witness has trailing bytes")
        base, hob = numbers[:2]
        ranges = tuple((base + start, pages) for start, pages in zip(numbers[3::2], numbers[4::2], strict=True))
        if (base + hob) * _PAGE >= _ADDRESS_LIMIT:
            raise FormatError("TD HOB base address overflow")
        if any((start + pages) * _PAGE > _ADDRESS_LIMIT for start, pages in ranges):
            raise FormatError("TD HOB range overflow")
        return cls(base + hob, ranges)

    def encode(self) -> bytes:
        """Encode, ranges ascending; raises FormatError where no reader could use them."""
        ranges = sorted(self.ranges)
        if not ranges or self.hob_page < ranges[0][0] or any(pages == 0 for _, pages in ranges):
            raise FormatError("a TD HOB witness needs ranges, none empty, the first not above the HOB")
        if any(start + pages > following for (start, pages), (following, _) in pairwise(ranges)):
            raise FormatError("TD HOB witness ranges must not overlap")
        base = ranges[0][0]
        numbers = [base, self.hob_page - base, len(ranges)]
        for start, pages in ranges:
            numbers += (start - base, pages)
        return b"".join(map(encode_varint, numbers))

    def td_hob(self, memory_size: int) -> bytes:
        """Build the hand-off block list that the firmware measures, for a machine of memory_size bytes.

        One PHIT, one resource descriptor for each segment of [0, memory_size): ranges are system memory (type
        0), gaps unaccepted memory (type 7). The last segment is always of type 7, and QEMU moves its part
        beyond 2 GiB to 4 GiB and up on a machine of 2.75 GiB or more.
        """
        *segments, (_, start, end) = self._segments(memory_size)
        if memory_size < _HIGH_MEMORY:
            segments.append((7, start, end))
        else:
            if start < _LOW_MEMORY:
                segments.append((7, start, _LOW_MEMORY))
            if end > _LOW_MEMORY:
                segments.append((7, _FOUR_GIB, end + _FOUR_GIB - _LOW_MEMORY))
        resources = b"".join(
            struct.pack("<HHI16xIIQQ", 3, 48, 0, kind, 7, start, end - start) for kind, start, end in segments
        )
        end_of_list = self.hob_address + 56 + len(resources) + 8
        return struct.pack("<HHIII5Q", 1, 56, 0, 9, 0, 0, 0, 0, 0, end_of_list) + resources

    def _segments(self, memory_size: int) -> list[tuple[int, int, int]]:
        """Cut memory into (resource type, start, end), ascending, adjacent ranges kept apart."""
        segments = []
        covered = 0
        for first, pages in sorted(self.ranges, key=itemgetter(0)):
            start, end = first * _PAGE, (first + pages) * _PAGE
            if pages == 0:
                continue
            if covered < min(start, memory_size):
                segments.append((7, covered, min(start, memory_size)))
            segments.append((0, start, end))
            covered = max(covered, end)
        if covered < memory_size or not segments:
            segments.append((7, covered, memory_size))
        return segments


def _read_numbers(data: bytes) -> list[int]:
    numbers, at = list[int](), 0
    while at < len(data):
        try:
            number, at = read_varint(data, at, len(data))
        except EOFError as error:
            raise FormatError("truncated TD HOB witness varuint") from error
        except OverflowError as error:
            raise FormatError("TD HOB witness varuint is too large") from error
        numbers.append(number)
    return numbers


# Boot events and registers


@dataclass(frozen=True, slots=True)
class Registers:
    """MRTD and the three RTMRs that are final when user space starts, 48 bytes each."""

    mrtd: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes


_EFI_GLOBAL_VARIABLE = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
_EFI_IMAGE_SECURITY_DATABASE = UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
_TD_HOB_TABLE = UUID("93bb96af-b9f2-4eb8-9462-e0ba74564236")

# The configuration volume of this firmware, empty in every image, and where it lies.
_CFV_SHA384 = bytes.fromhex(
    "344bc51c980ba621aaa00da3ed7436f7d6e549197dfe699515dfa2c6583d95e6412af21c097d473155875ffd561d6790"
)
_CFV_BLOB = b"\x29Fv(XXXXXXXX-XXXX-XXXX-XXXX-XXXXXXXXXXXX)\0" + struct.pack("<QQ", 0xFFC00000, 0x84000)

# EFI_LOAD_OPTION of the firmware's UiApp.
_BOOT_0000 = bytes.fromhex(
    "090100002c0055006900410070007000000004071400c9bdb87cebf8344faaea3ee4af6516a1"
    "0406140021aa2c4614760345836e8ab6f46623317fff0400"
)

# Device path of QEMU's kernel loader file "kernel", and the address at which one real boot had it.
_KERNEL_DEVICE_PATH = bytes.fromhex(
    "0403140072f728144ab61e44b8c39ebdd7f893c7040412006b00650072006e0065006c0000007fff0400"
)
_KERNEL_ADDRESS = 0x7B0D4018

_LOAD_OPTIONS_TAG = struct.pack("<II", 0x8F3B22ED, 26) + b"LOADED_IMAGE::LoadOptions\0"
_INITRD_TAG = struct.pack("<II", 0x8F3B22EC, 13) + b"Linux initrd\0"


def require_lite_memory_size(memory_size: int) -> None:
    """Refuse a memory size for which QEMU patches the kernel unlike the measurement document's."""
    if memory_size != _LOW_MEMORY and memory_size < _HIGH_MEMORY:
        raise FormatError(
            "TDX lite attestation without image download requires "
            f"memory_size == {_LOW_MEMORY} bytes ({_LOW_MEMORY >> 20} MiB) "
            f"or >= {_HIGH_MEMORY} bytes ({_HIGH_MEMORY >> 20} MiB); got {memory_size} bytes"
        )


def boot_event_log(
    measurement: ImageMeasurement, vm_config: VmConfig, acpi_digests: AcpiDigests, kernel_size: int = 0
) -> tuple[TdxEvent, ...]:
    """List the boot events of IMR 0 to 2, payloads kept, in the order in which hardware logs them.

    kernel_size only fills a payload that no digest covers. Raises FormatError for a memory size that the
    document does not fit, a bad witness, or a digest that is not 48 bytes, checked in upstream's order.
    """
    require_lite_memory_size(vm_config.memory_size)
    try:
        witness = TdHobWitness.parse(measurement.td_hob)
    except FormatError as error:
        raise FormatError(f"failed to measure TD HOB from witness: {error}") from error
    td_hob = _sha384(witness.td_hob(vm_config.memory_size))
    kernel = _digest(measurement.kernel_authenticode, "image.kernel_authenticode")
    initrd = _digest(measurement.initrd_sha384, "image.initrd_sha384")
    cmdline = _digest(measurement.cmdline_sha384, "image.kernel_cmdline_sha384")

    td_hob_table = b"\x09TdxTable\0" + struct.pack("<Q16sQ", 1, _TD_HOB_TABLE.bytes_le, witness.hob_address)
    image_load = struct.pack("<4Q", _KERNEL_ADDRESS, kernel_size, 0, len(_KERNEL_DEVICE_PATH)) + _KERNEL_DEVICE_PATH
    return (
        TdxEvent(0, EV_EFI_HANDOFF_TABLES2, td_hob, "", td_hob_table),
        TdxEvent(0, EV_EFI_PLATFORM_FIRMWARE_BLOB2, _CFV_SHA384, "", _CFV_BLOB),
        *(
            _hashed(0, EV_EFI_VARIABLE_DRIVER_CONFIG, _variable(vendor, name))
            for vendor, name in (
                (_EFI_GLOBAL_VARIABLE, "SecureBoot"),
                (_EFI_GLOBAL_VARIABLE, "PK"),
                (_EFI_GLOBAL_VARIABLE, "KEK"),
                (_EFI_IMAGE_SECURITY_DATABASE, "db"),
                (_EFI_IMAGE_SECURITY_DATABASE, "dbx"),
            )
        ),
        _hashed(0, EV_SEPARATOR, bytes(4)),
        *(
            TdxEvent(0, EV_PLATFORM_CONFIG_FLAGS, digest, name, ACPI_PAYLOAD)
            for name, digest in zip(ACPI_EVENT_NAMES, acpi_digests, strict=True)
        ),
        TdxEvent(1, EV_EFI_BOOT_SERVICES_APPLICATION, kernel, "", image_load),
        # Unlike the driver variables above, of these two only the data is hashed.
        _boot_variable("BootOrder", bytes(2)),
        _boot_variable("Boot0000", _BOOT_0000),
        _hashed(1, EV_EFI_ACTION, b"Calling EFI Application from Boot Option"),
        _hashed(1, EV_SEPARATOR, bytes(4)),
        TdxEvent(2, EV_EVENT_TAG, cmdline, "", _LOAD_OPTIONS_TAG),
        TdxEvent(2, EV_EVENT_TAG, initrd, "", _INITRD_TAG),
        _hashed(1, EV_EFI_ACTION, b"Exit Boot Services Invocation"),
        _hashed(1, EV_EFI_ACTION, b"Exit Boot Services Returned with Success"),
    )


def measure(measurement: ImageMeasurement, vm_config: VmConfig, acpi_digests: AcpiDigests) -> Registers:
    """Compute the registers of a TD that booted this image on this machine.

    Of vm_config count memory_size, qemu_version and qemu_single_pass_add_pages. Raises FormatError as
    `boot_event_log` does, and for a QEMU version that is none or before 8.0.0.
    """
    require_lite_memory_size(vm_config.memory_size)
    two_pass = _adds_pages_in_two_passes(vm_config)
    mrtd = _digest(measurement.mrtd_two_pass if two_pass else measurement.mrtd_single_pass, "tdvf.mrtd")
    events = boot_event_log(measurement, vm_config, acpi_digests)
    return Registers(mrtd, *(replay_register(events, imr) for imr in range(3)))


def _adds_pages_in_two_passes(vm_config: VmConfig) -> bool:
    """Tell how QEMU adds and measures the firmware's pages: an explicit setting wins over its version."""
    try:
        version = (9, 1, 0) if vm_config.qemu_version is None else _qemu_version(vm_config.qemu_version)
        if version < (8, 0, 0):
            raise FormatError(f"Unsupported QEMU version: {version}")
    except FormatError as error:
        raise FormatError(f"failed to resolve QEMU measurement options: {error}") from error
    if vm_config.qemu_single_pass_add_pages is not None:
        return vm_config.qemu_single_pass_add_pages
    return version < (9, 0, 0)


def _qemu_version(text: str) -> tuple[int, ...]:
    try:
        version = tuple(map(_u32, text.split(".")))
        if len(version) != 3:
            raise FormatError(f"Version string must have exactly 3 parts (major.minor.patch), got {len(version)}")
    except FormatError as error:
        raise FormatError(f"Failed to parse QEMU version: {error}") from error
    return version


def _u32(text: str) -> int:
    digits = text.removeprefix("+")
    if not text:
        raise FormatError("Invalid version number: cannot parse integer from empty string")
    if not (digits.isascii() and digits.isdigit()):
        raise FormatError("Invalid version number: invalid digit found in string")
    if len(digits) > 10 or int(digits) >= 1 << 32:
        raise FormatError("Invalid version number: number too large to fit in target type")
    return int(digits)


def _variable(vendor: UUID, name: str, data: bytes = b"") -> bytes:
    """UEFI_VARIABLE_DATA: vendor GUID, characters of the name, bytes of the data, name in UTF-16LE, data."""
    return vendor.bytes_le + struct.pack("<QQ", len(name), len(data)) + name.encode("utf-16-le") + data


def _boot_variable(name: str, data: bytes) -> TdxEvent:
    return TdxEvent(0, EV_EFI_VARIABLE_BOOT, _sha384(data), "", _variable(_EFI_GLOBAL_VARIABLE, name, data))


def _hashed(imr: int, event_type: int, payload: bytes) -> TdxEvent:
    return TdxEvent(imr, event_type, _sha384(payload), "", payload)


def _digest(value: bytes, field: str) -> bytes:
    if len(value) != 48:
        raise FormatError(f"tdx.measurement.{field} has invalid length {len(value)}, expected 48")
    return value


def _sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()
