"""The events that a machine measures while it boots an image, and the registers that follow from them."""

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Final, Self
from uuid import UUID

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import ACPI_PAYLOAD, TdxEvent, replay_register
from dstack_emu.attest.image.measurement import ImageMeasurement
from dstack_emu.attest.image.memory import HIGH_MEMORY, LOW_MEMORY
from dstack_emu.attest.image.td_hob import TdHobWitness
from dstack_emu.attest.vmconfig import VmConfig

EV_SEPARATOR: Final = 0x4
EV_EVENT_TAG: Final = 0x6
EV_PLATFORM_CONFIG_FLAGS: Final = 0xA
EV_EFI_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
EV_EFI_VARIABLE_BOOT: Final = 0x80000002
EV_EFI_BOOT_SERVICES_APPLICATION: Final = 0x80000003
EV_EFI_ACTION: Final = 0x80000007
EV_EFI_PLATFORM_FIRMWARE_BLOB2: Final = 0x8000000A
EV_EFI_HANDOFF_TABLES2: Final = 0x8000000B

ACPI_EVENT_NAMES: Final = ("acpi-loader", "acpi-rsdp", "acpi-tables")

AcpiDigests = tuple[bytes, bytes, bytes]
"""SHA-384 of the three blobs that QEMU hands to the firmware, in the order of ACPI_EVENT_NAMES."""


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


def require_lite_memory_size(measurement: ImageMeasurement, memory_size: int) -> None:
    """Refuse a memory size for which QEMU patches the kernel unlike the measurement document's."""
    if measurement.kernel_header_normalized or memory_size == LOW_MEMORY or memory_size >= HIGH_MEMORY:
        return
    hint = (
        ". This restriction only applies to images whose OVMF does not normalize the kernel setup header, because "
        "QEMU's rewrite moves the initrd with guest RAM; re-emit the image to remove it"
    )
    raise FormatError(
        "TDX lite attestation without image download requires "
        f"memory_size == {LOW_MEMORY} bytes ({LOW_MEMORY >> 20} MiB) "
        f"or >= {HIGH_MEMORY} bytes ({HIGH_MEMORY >> 20} MiB); got {memory_size} bytes"
        f"{'' if measurement.cmdline is None else hint}"
    )


def _require_rootfs_hash(cmdline: str) -> None:
    """Refuse a command line that pins no root file system."""
    name = "dstack.rootfs_hash"
    values = [word.removeprefix(f"{name}=") for word in cmdline.split() if word.startswith(f"{name}=")]
    if not values:
        fault = f"{name} is required in amd sev-snp measured cmdline"
    elif not values[0]:
        fault = f"{name} must not be empty"
    elif not re.fullmatch("(?:[0-9a-fA-F]{2})+", values[0]):
        fault = f"{name} must be valid hex"
    elif len(values[0]) != 64:
        fault = f"{name} must be 32 bytes"
    else:
        return
    raise FormatError(f"failed to parse {name} from tdx.measurement.image.base_cmdline: {fault}")


def boot_event_log(
    measurement: ImageMeasurement, vm_config: VmConfig, acpi_digests: AcpiDigests, kernel_size: int = 0
) -> tuple[TdxEvent, ...]:
    """List the boot events of IMR 0 to 2, payloads kept, in the order in which hardware logs them.

    kernel_size only fills a payload that no digest covers. Raises FormatError for a memory size that the
    document does not fit, a bad witness, or a digest that is not 48 bytes, checked in upstream's order.
    """
    require_lite_memory_size(measurement, vm_config.memory_size)
    try:
        witness = TdHobWitness.parse(measurement.td_hob)
    except FormatError as error:
        raise FormatError(f"failed to measure TD HOB from witness: {error}") from error
    td_hob = _sha384(witness.td_hob(vm_config.memory_size))
    kernel = _digest(measurement.kernel_authenticode, "image.kernel_authenticode")
    initrd = _digest(measurement.initrd_sha384, "image.initrd_sha384")
    if measurement.cmdline is not None:
        _require_rootfs_hash(measurement.cmdline)
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
    require_lite_memory_size(measurement, vm_config.memory_size)
    two_pass = QemuOptions.of(vm_config).two_pass_add_pages
    mrtd = _digest(measurement.mrtd_two_pass if two_pass else measurement.mrtd_single_pass, "tdvf.mrtd")
    events = boot_event_log(measurement, vm_config, acpi_digests)
    return Registers(mrtd, *(replay_register(events, imr) for imr in range(3)))


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """What a VM config says of QEMU, by an explicit setting or else by its version.

    `pic` (the legacy interrupt controller) is in the ACPI tables, and so in RTMR0; `two_pass_add_pages` is how the
    firmware's pages are added and measured, and so in MRTD.
    """

    version: tuple[int, ...]
    pic: bool
    two_pass_add_pages: bool

    @classmethod
    def of(cls, vm_config: VmConfig) -> Self:
        """Resolve them; raise `FormatError` for a version that is none or before 8.0.0."""
        try:
            version = (9, 1, 0) if vm_config.qemu_version is None else _qemu_version(vm_config.qemu_version)
            if version < (8, 0, 0):
                raise FormatError(f"Unsupported QEMU version: {version}")
        except FormatError as error:
            raise FormatError(f"failed to resolve QEMU measurement options: {error}") from error
        before_9, pic, two_pass = version < (9, 0, 0), vm_config.pic, vm_config.qemu_single_pass_add_pages
        return cls(version, before_9 if pic is None else pic, before_9 if two_pass is None else two_pass)


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
    """Return UEFI_VARIABLE_DATA: vendor GUID, characters of the name, bytes of the data, name in UTF-16LE, data."""
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
