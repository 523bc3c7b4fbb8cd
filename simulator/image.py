"""A synthetic OS image, derived from a seed, and the VM that boots it.

Firmware, kernel and initrd are random bytes unless they are given, since nothing runs them. Command line, initrd, TD
HOB and all other events are measured as real ones, so a verifier accepts a boot by the image's own measurement
document.

Not here: a TDVF, a kernel PE or a root filesystem. Therefore MRTDs and kernel digest differ from those that upstream's
tools would compute from these files, and the image supports the lite variant only. ACPI digests belong to no tables,
but differ if the tables of two VMs would differ.

Source of truth: upstream's image directory and dstack-vmm (312dc605), QEMU's device order in its dstack-mr.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import TdxEvent
from dstack_emu.attest.image import (
    ACPI_EVENT_NAMES,
    MEASUREMENT_FILE,
    OVMF_VARIANT,
    AcpiDigests,
    ImageMeasurement,
    QemuOptions,
    Registers,
    TdHobWitness,
    boot_event_log,
    cmdline_sha384,
    file_authenticode,
    initrd_sha384,
    kernel_authenticode,
    measure,
    os_image_hash,
    sha256sum_txt,
)
from dstack_emu.attest.release import DEFAULT
from dstack_emu.attest.vmconfig import TdxMeasurement, VmConfig

GIB = 1 << 30

# Where the firmware of real images has its TD_HOB and TEMP_MEM sections.
TD_HOB_WITNESS = TdHobWitness(hob_page=0x809, ranges=((0x800, 6), (0x809, 2), (0x80B, 2), (0x810, 16)))

# The fields that determine QEMU's ACPI tables.
_ACPI_FIELDS = {
    "cpu_count",
    "memory_size",
    "pic",
    "qemu_version",
    "pci_hole64_size",
    "hugepages",
    "num_gpus",
    "num_nvswitches",
    "num_nics",
    "num_verity_volumes",
    "swtpm",
    "hotplug_off",
    "host_share_mode",
}


_SAME_SHARE_MODES = {"": "9p", "vhd": "vvfat"}
"""Modes that attach the same devices as another one."""

_QEMU_OF_NEW_TABLES = (9, 2, 0)


def _qemu_fields(vm_config: VmConfig) -> dict[str, str | bool | None]:
    """Return one version of QEMU for all whose tables are alike, and `pic` where it is not that version's.

    Tables differ by the legacy interrupt controller, which QEMU has by default before 9.0, and by what changed in 9.2.
    Source: `dstack-mr/src/{machine,acpi}.rs` at 312dc605, and the compatibility switch of its `dstack-acpi-tables`.
    """
    qemu = QemuOptions.of(vm_config)
    if qemu.version >= _QEMU_OF_NEW_TABLES:
        return {"qemu_version": "9.2.0", "pic": True if qemu.pic else None}
    return {"qemu_version": "8.2.2" if qemu.pic else "9.1.0", "pic": None}


def placeholder_digest(label: str, content: bytes) -> bytes:
    """Return a synthetic measurement (48 bytes) of bytes whose format cannot be measured."""
    return hashlib.sha384(f"dstack-emu {label}\0".encode() + content).digest()


def is_bootable(kernel: bytes) -> bool:
    """Return whether the bytes begin like a kernel that a firmware boots (a PE)."""
    return kernel.startswith(b"MZ")


def kernel_digest(kernel: bytes, initrd_size: int, *, normalized: bool = False) -> bytes:
    """Return a kernel's digest, synthetic unless it is a PE; raise FormatError for a PE that cannot be measured.

    A firmware that normalizes its header measures the file as it is.
    """
    if not is_bootable(kernel):
        return placeholder_digest("kernel", kernel)
    return file_authenticode(kernel) if normalized else kernel_authenticode(kernel, initrd_size)


@dataclass(frozen=True, slots=True)
class ImageParts:
    """Given parts of an image; the others are synthetic. `cmdline` is that of metadata.json."""

    firmware: bytes | None = None
    kernel: bytes | None = None
    initrd: bytes | None = None
    cmdline: str | None = None


@dataclass(frozen=True, slots=True)
class OsImage:
    """An image directory in memory, without the rootfs, of which only a hash is in the command line.

    `files` are ovmf.fd, bzImage, initramfs.cpio.gz, metadata.json, measurement.tdx.cbor, sha256sum.txt and
    digest.txt.
    """

    name: str
    version: str
    files: Mapping[str, bytes] = field(repr=False, hash=False)
    measurement: ImageMeasurement = field(repr=False)
    os_image_hash: bytes

    @classmethod
    def from_seed(
        cls,
        derive: Callable[[str, int], bytes],
        name: str = "dstack-emu",
        version: str = DEFAULT.version,
        given: ImageParts | None = None,
    ) -> Self:
        """Make an image; `derive(label, n)` returns n bytes, always the same ones for the same label.

        Another name or version gives another image, like another release. Given parts are used unchanged; a given
        kernel that is a bootable PE is measured as one.
        """
        given = given or ImageParts()

        def content(part: str, size: int) -> bytes:
            return derive(f"os-image/{name}/{version}/{part}", size)

        kernel = content("bzImage", 4096) if given.kernel is None else given.kernel
        initrd = content("initramfs.cpio.gz", 4096) if given.initrd is None else given.initrd
        cmdline = f"console=ttyS0 dstack.rootfs_hash={content('rootfs', 32).hex()} dstack.rootfs_size=4096"
        return cls.build(
            name=name,
            version=version,
            firmware=content("ovmf.fd", 4096) if given.firmware is None else given.firmware,
            kernel=kernel,
            kernel_authenticode=kernel_digest(kernel, len(initrd)),
            initrd=initrd,
            cmdline=cmdline if given.cmdline is None else given.cmdline,
            git_revision=content("git", 20).hex(),
        )

    @classmethod
    def build(
        cls,
        *,
        name: str,
        version: str,
        firmware: bytes,
        kernel: bytes,
        kernel_authenticode: bytes,
        initrd: bytes,
        cmdline: str,
        git_revision: str,
    ) -> Self:
        """Assemble an image directory from its parts and measure it.

        `kernel_authenticode` is 48 bytes: `attest.image.kernel_authenticode` of a real kernel, `placeholder_digest` of
        anything else. MRTDs are always synthetic.
        """
        measurement = ImageMeasurement(
            cmdline_sha384=cmdline_sha384(cmdline),
            kernel_authenticode=kernel_authenticode,
            initrd_sha384=initrd_sha384(initrd),
            mrtd_single_pass=placeholder_digest("mrtd single pass", firmware),
            mrtd_two_pass=placeholder_digest("mrtd two pass", firmware),
            td_hob=TD_HOB_WITNESS.encode(),
        )
        metadata = {
            "bios": "ovmf.fd",
            "kernel": "bzImage",
            "cmdline": cmdline,
            "initrd": "initramfs.cpio.gz",
            "rootfs": "rootfs.img.parted.verity",
            "version": version,
            "git_revision": git_revision,
            "shared_ro": True,
            "is_dev": False,
            "ovmf_variant": OVMF_VARIANT,
        }
        checked = {
            "ovmf.fd": firmware,
            "bzImage": kernel,
            "initramfs.cpio.gz": initrd,
            "metadata.json": (json.dumps(metadata, indent=4) + "\n").encode(),
            MEASUREMENT_FILE: measurement.encode(),
        }
        checksum_file = sha256sum_txt(checked)
        image_hash = os_image_hash(checksum_file)
        files = checked | {"sha256sum.txt": checksum_file, "digest.txt": f"{image_hash.hex()}\n".encode()}
        return cls(name, version, MappingProxyType(files), measurement, image_hash)

    @classmethod
    def of_config(cls, vm_config: VmConfig, name: str = "given", version: str = "") -> Self:
        """Return the image that a VM config's measurement document describes; its other files are unknown.

        Raises FormatError if the config has no document, or an invalid one.
        """
        document = vm_config.tdx_measurement
        if document is None:
            raise FormatError("vm_config: tdx_measurement expected, got none")
        files = {MEASUREMENT_FILE: document.measurement, "sha256sum.txt": document.checksum_file}
        measurement = ImageMeasurement.decode(document.measurement)
        return cls(name, version, MappingProxyType(files), measurement, os_image_hash(document.checksum_file))

    def vm_config(
        self,
        cpu_count: int = 2,
        memory_size: int = 2 * GIB,
        *,
        num_gpus: int = 0,
        num_nvswitches: int = 0,
        num_nics: int = 1,
        hugepages: bool = False,
        swtpm: bool = False,
        hotplug_off: bool = False,
        qemu_version: str = "8.2.2",
    ) -> VmConfig:
        """Describe a VM that boots this image, for lite attestation.

        Such a VM has exactly 2 GiB, or at least 2.75 GiB; `boot` refuses other sizes.
        """
        return VmConfig(
            os_image_hash=self.os_image_hash,
            cpu_count=cpu_count,
            memory_size=memory_size,
            qemu_version=qemu_version,
            hugepages=hugepages,
            num_gpus=num_gpus,
            num_nvswitches=num_nvswitches,
            num_nics=num_nics,
            swtpm=swtpm,
            hotplug_off=hotplug_off,
            image=f"{self.name}-{self.version}",
            host_share_mode="9p",
            ovmf_variant=OVMF_VARIANT,
            tdx_attestation_variant="lite",
            tdx_measurement=TdxMeasurement(
                checksum_file=self.files["sha256sum.txt"], measurement=self.files[MEASUREMENT_FILE]
            ),
        )

    @staticmethod
    def acpi_digests(vm_config: VmConfig) -> AcpiDigests:
        """Return synthetic digests of QEMU's ACPI blobs, a function of the VM's devices and not of the image.

        VMs whose tables are the same for upstream's dstack-mr have the same digests. Raises `FormatError`.
        """
        fields = {name: getattr(vm_config, name) for name in _ACPI_FIELDS} | _qemu_fields(vm_config)
        fields["host_share_mode"] = _SAME_SHARE_MODES.get(vm_config.host_share_mode, vm_config.host_share_mode)
        devices = json.dumps(fields, sort_keys=True).encode()
        loader, rsdp, tables = (placeholder_digest(name, devices) for name in ACPI_EVENT_NAMES)
        return loader, rsdp, tables

    def boot(self, vm_config: VmConfig) -> tuple[Registers, tuple[TdxEvent, ...]]:
        """Boot this image on the VM that `vm_config` describes, whichever image `vm_config` names.

        Raises FormatError for a VM whose registers the measurement document does not determine.
        """
        acpi_digests = self.acpi_digests(vm_config)
        registers = measure(self.measurement, vm_config, acpi_digests)
        return registers, boot_event_log(
            self.measurement, vm_config, acpi_digests, kernel_size=len(self.files.get("bzImage", b""))
        )
