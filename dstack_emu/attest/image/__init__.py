"""Measuring an OS image: from its files or its measurement document to boot events, MRTD and RTMR0 to 2.

A TD's firmware extends each boot event's digest into a register: MR = sha384(MR ‖ digest), from 48 zero
bytes. What an image contributes (kernel, command line, initrd, MRTD of the firmware) is the same for every
machine and is in `measurement.tdx.cbor`; what the machine contributes is its memory size, through the TD
HOB, and its ACPI tables.

What this package does not do: compute an MRTD from a firmware's TDVF sections, generate ACPI tables (QEMU
does; digests of them come in as arguments), follow boot protocols older than 2.12, or decide anything about a
quote. That registers equal these proves nothing by itself: ACPI digests taken from an event log are
claims of the host.

Source of truth: upstream's dstack-mr and dstack-types (312dc605), and event logs of real hardware; TD HOB: PI
specification vol. 3; payloads: TCG PC Client Platform Firmware Profile; kernel header: QEMU `hw/i386/x86.c`.
"""

from dstack_emu.attest.image.boot import (
    ACPI_EVENT_NAMES,
    AcpiDigests,
    QemuOptions,
    Registers,
    boot_event_log,
    measure,
)
from dstack_emu.attest.image.checksums import (
    CHECKED_FILES,
    MEASUREMENT_FILE,
    os_image_hash,
    sha256sum_entry,
    sha256sum_txt,
)
from dstack_emu.attest.image.files import cmdline_sha384, file_authenticode, initrd_sha384, kernel_authenticode
from dstack_emu.attest.image.measurement import MEASUREMENT_VERSIONS, OVMF_VARIANT, ImageMeasurement
from dstack_emu.attest.image.td_hob import TdHobWitness

__all__ = [
    "ACPI_EVENT_NAMES",
    "CHECKED_FILES",
    "MEASUREMENT_FILE",
    "MEASUREMENT_VERSIONS",
    "OVMF_VARIANT",
    "AcpiDigests",
    "ImageMeasurement",
    "QemuOptions",
    "Registers",
    "TdHobWitness",
    "boot_event_log",
    "cmdline_sha384",
    "file_authenticode",
    "initrd_sha384",
    "kernel_authenticode",
    "measure",
    "os_image_hash",
    "sha256sum_entry",
    "sha256sum_txt",
]
