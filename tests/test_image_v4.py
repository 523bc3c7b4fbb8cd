"""Measurement documents of version 4, of images of dstack 0.6.0: against real hardware and upstream's digests."""

import base64
import hashlib
import struct
from dataclasses import replace

import cbor2
import pytest

from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.image import (
    AcpiDigests,
    ImageMeasurement,
    boot_event_log,
    file_authenticode,
    measure,
    os_image_hash,
    sha256sum_txt,
)
from dstack_emu.attest.image.boot import EV_EFI_HANDOFF_TABLES2
from dstack_emu.attest.os_image import lite_measurement
from dstack_emu.attest.release import RELEASES
from dstack_emu.attest.vmconfig import TdxMeasurement, VmConfig
from dstack_emu.deployment.machine_site import MEGABYTE, measured_memory
from dstack_emu.simulator.image import GIB, OsImage
from tests.test_image import UNSIGNED_KERNEL, pe_kernel

BOOTED = base64.b64decode(
    "o2d2ZXJzaW9uBGVpbWFnZaRnY21kbGluZXkBEmNvbnNvbGU9dHR5UzAgaW5pdD0vaW5pdCBwYW5pYz0xIG5ldC5pZm5hbWVzPTAgYmlvc2Rl"
    "dm5hbWU9MCBtY2U9b2ZmIG9vcHM9cGFuaWMgcGNpPW5vZWFybHkgcmFuZG9tLnRydXN0X2NwdT15IHJhbmRvbS50cnVzdF9ib290bG9hZGVy"
    "PW4gdHNjPXJlbGlhYmxlIG5vLWt2bWNsb2NrIGRzdGFjay5yb290ZnNfaGFzaD04NDNkMjZkZDc5MzQ0ZWNhODEzYzU3N2FmYzg5ODRmZjFj"
    "YTc5NDc3MjA1YmJiM2MwYjBjODQ2OWNhOTM3ZjJmIGRzdGFjay5yb290ZnNfc2l6ZT01OTIyMjQyNTZza2VybmVsX2F1dGhlbnRpY29kZVgw"
    "4rNpi0Y916LmoLEOWmowKjs5zhoXlQirRsfiMtzpxN0gW/UiKocUsnlsCXerKdNceBhrZXJuZWxfaGVhZGVyX25vcm1hbGl6ZWT1bWluaXRy"
    "ZF9zaGEzODRYMPw0SQHr93Ip1w6E+Vgi5v7tugOWH5QJ2kLrRyGnKo7W3i2ZsFjxbegL7+WF2AzbMGR0ZHZmo2Rvdm1maXByZTIwMjUwNWRt"
    "cnRkomtzaW5nbGVfcGFzc1gwG1x/g3vTuY6cpCe5Vh2UcVw43navYOgnpbMXTBjmR3qXEdyU4hYDiNtcdGpzBpISaHR3b19wYXNzWDDHV6j7"
    "HoMitL/ln9xL508TGwDiOAYpf7v6hP0tb3moH7P510G6tw+aCEzX39LN+h1mdGRfaG9iTIAQCQQABgkCCwIQEA=="
)
"""The document of the image `dstack-0.6.0-v1attest`, which a TDX host booted with 2 GiB on 2026-09-14.

From upstream's dstack/verifier/fixtures/tdx-lite-v1-attest.json at f51db4ca, as are MEASURED and MRTD.
"""

MEASURED = (
    "0b8772e5b0b41b83e6044a68397e02f49fb47066b4fbe4917ea2c45c64f323fdacbb37948f821ebaf8bc9c938ba8a749",
    "e2b3698b463dd7a2e6a0b10e5a6a302a3b39ce1a179508ab46c7e232dce9c4dd205bf5222a8714b2796c0977ab29d35c",
    "1fb5131405de515fb00205eb87af9ecf7394ccff92ddcfbe7765bcadc0a829712f045aef33eba215efae2c702b4875db",
    "fc344901ebf77229d70e84f95822e6feedba03961f9409da42eb4721a72a8ed6de2d99b058f16de80befe585d80cdb30",
)
"""The events of that boot that an image determines: TD HOB, kernel, command line, initrd."""

MRTD = "c757a8fb1e8322b4bfe59fdc4be74f131b00e23806297fbbfa84fd2d6f79a81fb3f9d741bab70f9a084cd7dfd2cdfa1d"
ACPI: AcpiDigests = (bytes(48), bytes(48), bytes(48))
MACHINE = VmConfig(memory_size=2 * GIB, qemu_version="8.2.2")

SAMPLE = ImageMeasurement(
    cmdline_sha384=bytes.fromhex(
        "bb4154e6e429e184bc63d544ae5720f868e5859b378b13bab69860e1fc65c09f1b67277bba010841fbe8bc3619e58d58"
    ),
    kernel_authenticode=b"\x22" * 48,
    initrd_sha384=b"\x33" * 48,
    mrtd_single_pass=b"\x44" * 48,
    mrtd_two_pass=b"\x55" * 48,
    td_hob=b"\x66" * 16,
    cmdline=f"console=ttyS0 init=/init panic=1 dstack.rootfs_hash={'1' * 64} dstack.rootfs_size=4096",
    kernel_header_normalized=True,
)
"""The document of upstream's test `tdx_measurement_document_cbor_is_stable` (dstack-mr/src/tdx.rs at 1b6a4fe9).

The digest of its command line is that of `rtmr2_command_line_event_digest_is_stable` there.
"""


def bound(document: bytes) -> VmConfig:
    checksums = sha256sum_txt({"measurement.tdx.cbor": document})
    return replace(
        MACHINE,
        os_image_hash=os_image_hash(checksums),
        tdx_attestation_variant="lite",
        tdx_measurement=TdxMeasurement(checksums, document),
    )


def test_document_of_a_booted_image_gives_the_events_and_mrtd_that_hardware_measured() -> None:
    measurement = ImageMeasurement.decode(BOOTED)
    events = boot_event_log(measurement, MACHINE, ACPI)
    measured = {event.digest.hex() for event in events}
    assert set(MEASURED) <= measured
    assert events[0].event_type == EV_EFI_HANDOFF_TABLES2
    assert events[0].digest.hex() == MEASURED[0]
    assert measure(measurement, MACHINE, ACPI).mrtd.hex() == MRTD
    assert measurement.encode() == BOOTED


def test_document_is_encoded_as_upstream_encodes_it() -> None:
    """The digest is of the golden bytes of upstream's `tdx_measurement_document_cbor_is_stable`."""
    data = SAMPLE.encode()
    assert hashlib.sha256(data).hexdigest() == "9b9948ab143ffa5430bc3c98614d04f68b9eea205381540f5c7e2223c0d50d98"
    assert ImageMeasurement.decode(data) == SAMPLE


def test_kernel_whose_file_has_the_header_of_qemu_is_measured_as_the_file() -> None:
    """UNSIGNED_KERNEL is of upstream's dstack-mr: of the kernel as QEMU patches it for 2 GiB. The fields are QEMU's."""
    kernel = bytearray(pe_kernel())
    assert file_authenticode(bytes(kernel)).hex() != UNSIGNED_KERNEL
    initrd_at = (0x8000_0000 - 0x28000 - 1 - 5_000_000) & ~0xFFF
    kernel[0x210], kernel[0x211] = 0xB0, kernel[0x211] | 0x80
    struct.pack_into("<II", kernel, 0x218, initrd_at, 5_000_000)
    struct.pack_into("<II", kernel, 0x224, 0xFE00, 0x20000)
    assert file_authenticode(bytes(kernel)).hex() == UNSIGNED_KERNEL


def test_release_0_6_reads_it_and_0_5_does_not() -> None:
    """0.5.11 and 312dc605 know version 3 alone (`TdxOsImageMeasurement::from_cbor_slice` of dstack-types)."""
    config = bound(BOOTED)
    assert lite_measurement(config, RELEASES["0.6"].measurement_documents) == ImageMeasurement.decode(BOOTED)
    with pytest.raises(VerificationError, match="failed to decode CBOR: missing field `cmdline_sha384`$"):
        lite_measurement(config, RELEASES["0.5"].measurement_documents)


@pytest.mark.parametrize("mebibytes", [512, 1024, 2047, 2815])
def test_memory_is_free_if_the_header_is_normalized(mebibytes: int) -> None:
    """`tdx_measurements_from_measurement_document` (dstack-mr/src/tdx.rs at 1b6a4fe9) restricts other images alone."""
    machine = replace(MACHINE, memory_size=mebibytes * MEGABYTE)
    measurement = ImageMeasurement.decode(BOOTED)
    digests = {event.digest.hex() for event in boot_event_log(measurement, machine, ACPI)}
    assert set(MEASURED[1:]) <= digests
    image = OsImage.of_config(bound(BOOTED))
    assert measured_memory(mebibytes * MEGABYTE, image) == mebibytes * MEGABYTE
    with pytest.raises(FormatError, match=r"requires memory_size == 2147483648 .* re-emit the image to remove it$"):
        boot_event_log(replace(measurement, kernel_header_normalized=False), machine, ACPI)


@pytest.mark.parametrize(
    ("cmdline", "fault"),
    [
        ("console=ttyS0", "dstack.rootfs_hash is required in amd sev-snp measured cmdline"),
        ("dstack.rootfs_hash= x", "dstack.rootfs_hash must not be empty"),
        ("dstack.rootfs_hash=zz", "dstack.rootfs_hash must be valid hex"),
        ("dstack.rootfs_hash=abab", "dstack.rootfs_hash must be 32 bytes"),
    ],
)
def test_command_line_has_to_pin_a_root_file_system(cmdline: str, fault: str) -> None:
    """`rootfs_hash_from_cmdline` and `decode_required_hex` (dstack-mr/src/sev.rs at 312dc605)."""
    measurement = replace(ImageMeasurement.decode(BOOTED), cmdline=cmdline)
    with pytest.raises(FormatError) as refusal:
        measure(measurement, MACHINE, ACPI)
    assert str(refusal.value) == (
        f"failed to parse dstack.rootfs_hash from tdx.measurement.image.base_cmdline: {fault}"
    )


def test_document_is_refused_with_trailing_bytes_or_a_wrong_type() -> None:
    """Upstream's `cbor_decoders_reject_trailing_bytes` (dstack-types, PR #1275)."""
    document = cbor2.loads(BOOTED)
    for image in ({"kernel_header_normalized": 1}, {"cmdline": b"x"}):
        with pytest.raises(FormatError, match="failed to decode CBOR: field `"):
            ImageMeasurement.decode(cbor2.dumps({**document, "image": {**document["image"], **image}}))
    with pytest.raises(FormatError, match="failed to decode CBOR: 1 trailing bytes"):
        ImageMeasurement.decode(BOOTED + b"\0")
    fifth = {**document, "version": 5, "image": {**document["image"], "cmdline_sha384": b""}}
    with pytest.raises(FormatError, match="unsupported version 5, expected 3 or 4$"):
        ImageMeasurement.decode(cbor2.dumps(fifth))
