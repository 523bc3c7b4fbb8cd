"""Measured boots, against quotes and logs of real hardware and values that upstream's dstack-mr computed."""

import hashlib
import json
import re
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import TdxEvent, replay_register
from dstack_emu.attest.image import (
    MEASUREMENT_FILE,
    AcpiDigests,
    ImageMeasurement,
    Registers,
    TdHobWitness,
    boot_event_log,
    cmdline_sha384,
    initrd_sha384,
    kernel_authenticode,
    measure,
    os_image_hash,
    sha256sum_entry,
    sha256sum_txt,
)
from dstack_emu.attest.quote import TdReport
from dstack_emu.attest.release import RELEASES
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.simulator.image import GIB, OsImage, placeholder_digest
from tests.hardware import LEGACY, LITE, LITE_GET_QUOTE, boot
from tests.recorded import tdx_lite_steps

Json = dict[str, Any]


@pytest.fixture(scope="module")
def steps() -> Json:
    document: Json = tdx_lite_steps()
    return document


@pytest.fixture(scope="module")
def measurement(steps: Json) -> ImageMeasurement:
    return ImageMeasurement.decode(bytes.fromhex(steps["fixture"]["cbor"]))


@pytest.fixture(scope="module")
def acpi(steps: Json) -> AcpiDigests:
    loader, rsdp, tables = (
        bytes.fromhex(row["digest"]) for row in steps["fixture"]["events"] if row["name"].startswith("acpi-")
    )
    return loader, rsdp, tables


@pytest.fixture(scope="module")
def machine() -> VmConfig:
    return VmConfig(memory_size=2 * GIB, qemu_version="8.2.2", tdx_attestation_variant="lite")


def registers_of_report(report: TdReport) -> Registers:
    return Registers(report.mr_td, report.rt_mr0, report.rt_mr1, report.rt_mr2)


def registers_from_hex(registers: dict[str, str]) -> Registers:
    return Registers(**{name: bytes.fromhex(value) for name, value in registers.items()})


def boot_events(events: Iterable[TdxEvent]) -> tuple[TdxEvent, ...]:
    return tuple(event for event in events if event.imr < 3)


# Registers and events of real boots


def test_document_encodes_to_the_same_bytes_when_decoded_from_hardware_fixture(
    steps: Json, measurement: ImageMeasurement
) -> None:
    data = bytes.fromhex(steps["fixture"]["cbor"])
    assert len(data) == 384
    assert measurement.encode() == data


def test_td_hob_equals_fixture_bytes_at_2_gib(steps: Json, measurement: ImageMeasurement) -> None:
    witness = TdHobWitness.parse(measurement.td_hob)
    assert witness == TdHobWitness(0x809, ((0x800, 6), (0x809, 2), (0x80B, 2), (0x810, 16)))
    assert witness.encode() == measurement.td_hob
    assert witness.td_hob(2 * GIB).hex() == steps["fixture"]["td_hob"]


def test_td_hob_digest_equals_for_each_memory_size(steps: Json, measurement: ImageMeasurement) -> None:
    witness = TdHobWitness.parse(measurement.td_hob)
    digests = steps["td_hob_sha384"]
    assert len(digests) == 6
    assert {size: hashlib.sha384(witness.td_hob(int(size))).hexdigest() for size in digests} == digests


def test_each_event_and_running_value_equals_fixture(
    steps: Json, measurement: ImageMeasurement, machine: VmConfig, acpi: AcpiDigests
) -> None:
    events = boot_event_log(measurement, machine, acpi)
    expected = sorted(steps["fixture"]["events"], key=lambda row: int(row["imr"]))
    rows = []
    for imr in range(3):
        ours = [event for event in events if event.imr == imr]
        rows += [
            (event.imr, event.event_type, event.digest.hex(), replay_register(ours[: count + 1], imr).hex())
            for count, event in enumerate(ours)
        ]
    assert rows == [(row["imr"], row["event_type"], row["digest"], row["after"]) for row in expected]


def test_registers_equal_fixture_when_measured(
    steps: Json, measurement: ImageMeasurement, machine: VmConfig, acpi: AcpiDigests
) -> None:
    assert measure(measurement, machine, acpi) == registers_from_hex(steps["fixture"]["registers"])


def test_registers_equal_hardware_quote_when_measured_from_its_attestation(acpi: AcpiDigests) -> None:
    config = VmConfig.parse(boot(LITE).vm_config)
    assert config.tdx_measurement is not None
    assert os_image_hash(config.tdx_measurement.checksum_file) == config.os_image_hash
    assert config.os_image_hash.hex().startswith("e6f5cfec")
    bound = sha256sum_entry(config.tdx_measurement.checksum_file, MEASUREMENT_FILE)
    assert bound == hashlib.sha256(config.tdx_measurement.measurement).digest()
    measurement = ImageMeasurement.decode(config.tdx_measurement.measurement)
    assert measure(measurement, config, acpi) == registers_of_report(boot(LITE).report)


def test_event_rows_equal_hardware_log_when_boot_is_computed(acpi: AcpiDigests) -> None:
    hardware = boot(LITE_GET_QUOTE)
    config = VmConfig.parse(hardware.vm_config)
    assert config == VmConfig.parse(boot(LITE).vm_config)
    assert config.tdx_measurement is not None
    computed = boot_event_log(ImageMeasurement.decode(config.tdx_measurement.measurement), config, acpi)
    logged = boot_events(hardware.events)
    # This log was stripped of payloads, ACPI's apart: the rows must agree in the rest and in their order.
    assert [replace(event, event_payload=b"") for event in computed] == [
        replace(event, event_payload=b"") for event in logged
    ]
    registers = registers_of_report(hardware.report)
    assert tuple(replay_register(logged, imr) for imr in range(3)) == (
        registers.rtmr0,
        registers.rtmr1,
        registers.rtmr2,
    )


def test_full_log_with_payloads_equals_another_hardware_boot_at_64_gib(measurement: ImageMeasurement) -> None:
    hardware = boot(LEGACY)
    logged = hardware.events
    config = VmConfig.parse(hardware.vm_config)
    assert config.memory_size == 64 * GIB

    loader, rsdp, tables = (event.digest for event in logged if event.event_type == 0xA)
    (kernel,) = (event.digest for event in logged if event.event_type == 0x80000003)
    cmdline, initrd = (event.digest for event in logged if event.imr == 2)
    booted = replace(measurement, kernel_authenticode=kernel, cmdline_sha384=cmdline, initrd_sha384=initrd)
    computed = boot_event_log(booted, config, (loader, rsdp, tables), kernel_size=0x7DD400)
    # Guests of that release did not name the ACPI events yet.
    assert [(event.imr, event.event_type, event.digest) for event in computed] == [
        (event.imr, event.event_type, event.digest) for event in logged
    ]
    assert {event.event for event in logged} == {""}
    payloads = tuple(hashlib.sha256(event.event_payload).hexdigest() for event in computed)
    assert payloads == hardware.payload_hashes
    assert computed[0].digest.hex().startswith("8ae1e425")

    quoted = registers_of_report(hardware.report)
    ours = measure(booted, config, (loader, rsdp, tables))
    assert replace(ours, mrtd=quoted.mrtd) == quoted


def test_upstreams_made_up_image_measures_to_its_recorded_registers(steps: Json) -> None:
    emulated = steps["emulated"]
    files = {name: bytes.fromhex(content) for name, content in emulated["files"].items()}
    config = VmConfig.parse(json.dumps(emulated["vm_config"]))
    assert config.tdx_measurement is not None
    shuffled = dict(reversed(files.items()))
    assert sha256sum_txt(shuffled) == config.tdx_measurement.checksum_file
    assert os_image_hash(sha256sum_txt(files)).hex().startswith("b9b336f1")
    assert os_image_hash(sha256sum_txt(files)) == config.os_image_hash

    measurement = ImageMeasurement.decode(files[MEASUREMENT_FILE])
    assert measurement.cmdline_sha384 == cmdline_sha384(json.loads(files["metadata.json"])["cmdline"])
    assert measurement.initrd_sha384 == initrd_sha384(files["initramfs.cpio.gz"])
    loader, rsdp, tables = map(bytes.fromhex, emulated["acpi"].values())
    assert measure(measurement, config, (loader, rsdp, tables)) == registers_from_hex(emulated["registers"])


# Refusals of a measurement, each from the fixture with one thing changed


@pytest.mark.parametrize("memory_size", [0, 2 * GIB - 1, 2 * GIB + 1, 0xB0000000 - 1])
def test_measure_refuses_memory_size_that_the_document_does_not_cover(
    measurement: ImageMeasurement, machine: VmConfig, acpi: AcpiDigests, memory_size: int
) -> None:
    config = replace(machine, memory_size=memory_size)
    with pytest.raises(FormatError) as refusal:
        measure(measurement, config, acpi)
    assert str(refusal.value) == (
        "TDX lite attestation without image download requires memory_size == 2147483648 bytes (2048 MiB) "
        f"or >= 2952790016 bytes (2816 MiB); got {memory_size} bytes"
    )
    with pytest.raises(FormatError, match="requires memory_size"):
        boot_event_log(measurement, config, acpi)


@pytest.mark.parametrize(
    ("qemu_version", "single_pass_setting", "two_pass"),
    [
        ("8.0.0", None, True),
        ("8.99.99", None, True),
        ("9.0.0", None, False),
        (None, None, False),
        ("8.2.2", False, False),
        ("9.1.0", True, True),
    ],
)
def test_mrtd_follows_qemu_version_unless_set(
    measurement: ImageMeasurement,
    machine: VmConfig,
    acpi: AcpiDigests,
    qemu_version: str | None,
    single_pass_setting: bool | None,
    two_pass: bool,
) -> None:
    config = replace(machine, qemu_version=qemu_version, qemu_single_pass_add_pages=single_pass_setting)
    expected = measurement.mrtd_two_pass if two_pass else measurement.mrtd_single_pass
    assert measure(measurement, config, acpi).mrtd == expected


@pytest.mark.parametrize(
    ("qemu_version", "reason"),
    [
        ("7.9.9", "Unsupported QEMU version: (7, 9, 9)"),
        (
            "8.2",
            "Failed to parse QEMU version: Version string must have exactly 3 parts (major.minor.patch), got 2",
        ),
        ("8.x.1", "Failed to parse QEMU version: Invalid version number: invalid digit found in string"),
        (
            "8..1",
            "Failed to parse QEMU version: Invalid version number: cannot parse integer from empty string",
        ),
        (
            "8.1.4294967296",
            "Failed to parse QEMU version: Invalid version number: number too large to fit in target type",
        ),
    ],
)
def test_measure_refuses_qemu_version_even_when_the_setting_would_decide(
    measurement: ImageMeasurement, machine: VmConfig, acpi: AcpiDigests, qemu_version: str, reason: str
) -> None:
    config = replace(machine, qemu_version=qemu_version, qemu_single_pass_add_pages=True)
    with pytest.raises(FormatError) as refusal:
        measure(measurement, config, acpi)
    assert str(refusal.value) == f"failed to resolve QEMU measurement options: {reason}"


def test_measure_refuses_wrong_lengths_in_upstreams_order(
    measurement: ImageMeasurement, machine: VmConfig, acpi: AcpiDigests
) -> None:
    broken = replace(
        measurement,
        mrtd_two_pass=b"m",
        td_hob=b"\x80",
        kernel_authenticode=b"kk",
        initrd_sha384=b"",
        cmdline_sha384=bytes(49),
    )
    repairs = [
        ("mrtd_two_pass", "tdx.measurement.tdvf.mrtd has invalid length 1, expected 48"),
        ("td_hob", "failed to measure TD HOB from witness: truncated TD HOB witness varuint"),
        (
            "kernel_authenticode",
            "tdx.measurement.image.kernel_authenticode has invalid length 2, expected 48",
        ),
        ("initrd_sha384", "tdx.measurement.image.initrd_sha384 has invalid length 0, expected 48"),
        ("cmdline_sha384", "tdx.measurement.image.kernel_cmdline_sha384 has invalid length 49, expected 48"),
    ]
    for name, reason in repairs:
        with pytest.raises(FormatError) as refusal:
            measure(broken, machine, acpi)
        assert str(refusal.value) == reason
        broken = replace(broken, **{name: getattr(measurement, name)})
    assert measure(broken, machine, acpi) == measure(measurement, machine, acpi)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "truncated TD HOB witness varuint"),
        ("80100904000609020b021080", "truncated TD HOB witness varuint"),
        ("80100904000609020b0210", "truncated TD HOB witness varuint"),
        ("80100904000609020b02101000", "TD HOB witness has trailing bytes"),
        ("ffffffffffffffffffff01", "TD HOB witness varuint is too large"),
        ("ffffffffffff3f0000", "TD HOB base address overflow"),
        ("8010090100ffffffffff1f", "TD HOB range overflow"),
    ],
)
def test_witness_refuses_malformed_bytes(data: str, reason: str) -> None:
    with pytest.raises(FormatError, match=f"^{reason}$"):
        TdHobWitness.parse(bytes.fromhex(data))


@pytest.mark.parametrize(
    ("witness", "reason"),
    [
        (TdHobWitness(1, ()), "needs ranges"),
        (TdHobWitness(1, ((2, 1),)), "not above the HOB"),
        (TdHobWitness(1, ((1, 0),)), "none empty"),
        (TdHobWitness(1, ((1, 2), (2, 1))), "must not overlap"),
    ],
)
def test_witness_refuses_to_encode_what_no_firmware_has(witness: TdHobWitness, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        witness.encode()


@given(
    start=st.integers(0, 1 << 30),
    spans=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 20)), min_size=1, max_size=8),
    hob=st.integers(0, 1 << 30),
)
def test_witness_survives_encoding(start: int, spans: list[tuple[int, int]], hob: int) -> None:
    ranges = []
    for gap, pages in spans:
        ranges.append((start + gap, pages))
        start += gap + pages
    witness = TdHobWitness(ranges[0][0] + hob, tuple(ranges))
    assert TdHobWitness.parse(witness.encode()) == witness


# The measurement document and sha256sum.txt


def changed_document(steps: Json, change: Callable[[Json], object]) -> bytes:
    document = cbor2.loads(bytes.fromhex(steps["fixture"]["cbor"]))
    change(document)
    return cbor2.dumps(document)


def test_document_decodes_in_any_order_with_unknown_members_and_trailing_bytes(
    steps: Json, measurement: ImageMeasurement
) -> None:
    data = bytes.fromhex(steps["fixture"]["cbor"])
    canonical = cbor2.dumps(cbor2.loads(data), canonical=True)
    assert canonical != data
    assert ImageMeasurement.decode(canonical) == measurement
    assert ImageMeasurement.decode(changed_document(steps, lambda d: d.update(x=1))) == measurement
    assert ImageMeasurement.decode(data + b"\0") == measurement


def set_version(value: object) -> Callable[[Json], object]:
    return lambda document: document.update(version=value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_version(2), "unsupported version 2, expected 3"),
        (set_version(True), "failed to decode CBOR: field `version` is bool, expected int"),
        (set_version(3.0), "failed to decode CBOR: field `version` is float, expected int"),
        (lambda d: d.pop("image"), "failed to decode CBOR: missing field `image`"),
        (lambda d: d.update(version=2, tdvf={}), "failed to decode CBOR: missing field `mrtd`"),
        (lambda d: d["tdvf"].pop("td_hob"), "failed to decode CBOR: missing field `td_hob`"),
        (
            lambda d: d["tdvf"].update(ovmf="x"),
            "failed to decode CBOR: unknown variant `x`, expected `pre202505`",
        ),
        (
            lambda d: d["image"].update(initrd_sha384="ab" * 48),
            "failed to decode CBOR: field `initrd_sha384` is str, expected bytes",
        ),
    ],
)
def test_document_refused_when_one_member_is_wrong(steps: Json, change: Callable[[Json], object], reason: str) -> None:
    with pytest.raises(FormatError) as refusal:
        ImageMeasurement.decode(changed_document(steps, change), RELEASES["0.5"].measurement_documents)
    assert str(refusal.value) == f"TdxOsImageMeasurement: {reason}"


@pytest.mark.parametrize("data", ["", "ff", "00", "80", "a367", "a1808080", "a26776657273696f6e036776657273696f6e03"])
def test_document_refused_when_it_is_no_map_of_text(data: str) -> None:
    with pytest.raises(FormatError, match=r"^TdxOsImageMeasurement: failed to decode CBOR: "):
        ImageMeasurement.decode(bytes.fromhex(data))


@given(st.binary(max_size=64))
def test_document_raises_nothing_foreign_on_any_bytes(data: bytes) -> None:
    with pytest.raises(FormatError):
        ImageMeasurement.decode(data)


HASH = "ab" * 32


@pytest.mark.parametrize(
    "text",
    [f"{HASH}  name\n", f"\n \n{HASH}\tname\r\n", f"{HASH.upper()} name extra", f"00 other\n{HASH} name"],
)
def test_sha256sum_entry_found_by_second_word(text: str) -> None:
    assert sha256sum_entry(text.encode(), "name").hex() == HASH


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "sha256sum.txt is missing name"),
        (f"{HASH} *name\n".encode(), "sha256sum.txt is missing name"),
        (f"{HASH} name\n{HASH} name\n".encode(), "sha256sum.txt contains duplicate name entries"),
        (f"\n{HASH}\n{HASH} name\n".encode(), "sha256sum.txt line 2 is missing filename"),
        (f"{HASH}00 name\n".encode(), "sha256sum.txt name hash has invalid length 33, expected 32"),
        (b"zz name\n", "sha256sum.txt name hash is not valid hex: "),
        (b"\xff", "sha256sum.txt is not valid UTF-8: "),
    ],
)
def test_sha256sum_entry_refused(text: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match="^" + re.escape(reason)):
        sha256sum_entry(text, "name")


def test_sha256sum_txt_refuses_a_file_that_no_image_lists() -> None:
    with pytest.raises(FormatError, match=r"^no line in sha256sum\.txt for digest\.txt$"):
        sha256sum_txt({"ovmf.fd": b"", "digest.txt": b""})


# The kernel's digest


def pe_kernel(certificates: tuple[int, int] = (0, 0)) -> bytes:
    """A bzImage header, boot protocol 2.15, on a PE32+: two sections out of order, bytes behind them."""
    kernel = bytearray((7 * i + (i >> 8)) & 0xFF for i in range(0x2004))
    struct.pack_into("<H", kernel, 0x206, 0x020F)
    kernel[0x211] = 1
    struct.pack_into("<H", kernel, 0x236, 0x0040)
    struct.pack_into("<I", kernel, 0x3C, 0x40)
    struct.pack_into("<4sHH12xHHH", kernel, 0x40, b"PE", 0x8664, 2, 0xA0, 0x206, 0x20B)
    struct.pack_into("<I", kernel, 0x58 + 60, 0x400)
    struct.pack_into("<II", kernel, 0x58 + 144, *certificates)
    for header, (size, start) in zip((0xF8, 0x120), ((0x800, 0x1400), (0x1000, 0x400)), strict=True):
        struct.pack_into("<II", kernel, header + 16, size, start)
    return bytes(kernel)


# Of these bytes, computed by upstream's dstack-mr (312dc605).
UNSIGNED_KERNEL = "fa303b78d0d92231a485d450b7cbe1a9c8feb1e45a34890b107048789bd3dc5a7d908dee648605577a604a3d63ecb39f"
UNSIGNED_KERNEL_1536_MIB = (
    "0070ac478b02981a8a7781c1aba72e7a3e205daa42130e849ae6b9ac179ed898f868fb8a98aa529c2356d653a169f53e"
)
SIGNED_KERNEL = "ed9b75662984abcec09195eba78942979cefac6f9cb6ef577f8828e8e87803d0a4c7f2106ee64a065d57f195fc461ed1"


@pytest.mark.parametrize(
    ("kernel", "memory_size", "digest"),
    [
        (pe_kernel(), 0x80000000, UNSIGNED_KERNEL),
        (pe_kernel(), 0xB0000000, UNSIGNED_KERNEL),
        (pe_kernel(), 64 * GIB, UNSIGNED_KERNEL),
        (pe_kernel(), 0x60000000, UNSIGNED_KERNEL_1536_MIB),
        (pe_kernel((0x1F00, 0x100)), 0x80000000, SIGNED_KERNEL),
    ],
)
def test_kernel_digest_equals_upstreams_for_the_patched_pe(kernel: bytes, memory_size: int, digest: str) -> None:
    assert kernel_authenticode(kernel, 5_000_000, memory_size).hex() == digest


def test_kernel_digest_ignores_checksum_and_certificates_but_no_code() -> None:
    signed = pe_kernel((0x1F00, 0x100))

    def changed(offset: int) -> str:
        kernel = bytearray(signed)
        kernel[offset] ^= 1
        return kernel_authenticode(bytes(kernel), 5_000_000).hex()

    assert changed(0x58 + 64) == SIGNED_KERNEL
    assert changed(0x2003) == SIGNED_KERNEL
    assert changed(0x600) != SIGNED_KERNEL


@pytest.mark.parametrize(
    ("offset", "patch", "initrd_size", "reason"),
    [
        (0, b"", 0x80000000, "initrd is too large"),
        (0x206, b"\x0b\x02", 0, "kernel boot protocol 0x020b"),
        (0x211, b"\0", 0, "loaded low"),
        (0x40, b"NE", 0, "invalid PE signature"),
        (0x3C, b"\0\0\1\0", 0, "PE signature at 0x10000 is beyond"),
        (0x58 + 60, b"\xff\xff", 0, "size of headers 65535"),
        (0x46, b"\xff\xff", 0, "is beyond its 8196 bytes"),
    ],
)
def test_kernel_refused_when_it_is_no_modern_pe(offset: int, patch: bytes, initrd_size: int, reason: str) -> None:
    kernel = bytearray(pe_kernel())
    kernel[offset : offset + len(patch)] = patch
    with pytest.raises(FormatError, match=reason):
        kernel_authenticode(bytes(kernel), initrd_size)


def test_kernel_refused_when_too_short() -> None:
    with pytest.raises(FormatError, match=r"^the kernel image is too short: 4095 bytes"):
        kernel_authenticode(bytes(4095), 0)


# VmConfig

# Every member, read and written by upstream's dstack-types (312dc605).
FULL_CONFIG = (
    '{"os_image_hash":"aabb","cpu_count":2,"memory_size":18446744073709551615,"qemu_single_pass_add_pages":true,'
    '"pic":false,"qemu_version":"8.2.2","pci_hole64_size":5,"hugepages":true,"num_gpus":1,"num_nvswitches":2,'
    '"num_nics":3,"num_verity_volumes":4,"swtpm":true,"hotplug_off":true,"image":"é\\u0001\x7f/\\n\u2028",'
    '"host_share_mode":"9p","ovmf_variant":"pre202505","tdx_attestation_variant":"lite",'
    '"tdx_measurement":{"checksum_file":"","measurement":"AQ=="},'
    '"gcp_measurement":{"checksum_file":"AQ==","measurement":"AA=="},'
    '"aws_measurement":{"checksum_file":"","measurement":"AA=="}}'
)
EMPTY_CONFIG = (
    '{"os_image_hash":"","cpu_count":0,"memory_size":0,"pci_hole64_size":0,"hugepages":false,"num_gpus":0,'
    '"num_nvswitches":0,"hotplug_off":false,"host_share_mode":""}'
)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (FULL_CONFIG, FULL_CONFIG),
        (FULL_CONFIG.replace("aabb", "AaBb").replace('"AQ=="', '"AQ"'), FULL_CONFIG),
        (EMPTY_CONFIG, EMPTY_CONFIG),
        (
            ' {"mr_config": "x", "spec_version": 2, "pic": null, "num_nics": 1, "swtpm": false}\n',
            EMPTY_CONFIG,
        ),
        ('{"tdx_attestation_variant": "legacy"}', EMPTY_CONFIG),
    ],
)
def test_config_writes_upstreams_members_in_order_then_spec_version(text: str, written: str) -> None:
    assert VmConfig.parse(text).to_json() == written.removesuffix("}") + ',"spec_version":1}'


def test_config_of_hardware_survives_but_for_the_order_of_one_nested_object() -> None:
    text = boot(LITE_GET_QUOTE).vm_config
    written = VmConfig.parse(text).to_json()
    assert list(json.loads(written).items()) == list(json.loads(text).items())
    # The VMM of that day wrote measurement before checksum_file.
    assert sorted(written) == sorted(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{} x", "Extra data"),
        ("null", "object expected, got null"),
        ('{"x":NaN}', "expected value, got NaN"),
        ('{"cpu_count":1,"cpu_count":1}', "duplicate field `cpu_count`"),
        ('{"x":' + "[" * 100_000 + "]" * 100_000 + "}", "at most 4096 JSON values expected, got more"),
        ('{"cpu_count":4294967296}', "cpu_count: integer of 32 bits, not negative, expected, got 4294967296"),
        ('{"cpu_count":-1}', "cpu_count: integer of 32 bits, not negative, expected, got -1"),
        ('{"cpu_count":2.0}', "cpu_count: integer of 32 bits, not negative, expected, got 2.0"),
        ('{"cpu_count":true}', "cpu_count: integer of 32 bits, not negative, expected, got true"),
        ('{"cpu_count":null}', "cpu_count: integer of 32 bits, not negative, expected, got null"),
        (
            '{"memory_size":18446744073709551616}',
            "memory_size: integer of 64 bits, not negative, expected, got 18446744073709551616",
        ),
        ('{"pic":1}', "pic: true or false expected, got 1"),
        ('{"image":"\\ud800"}', "image: 'utf-8' codec can't encode"),
        ('{"os_image_hash":"0xab"}', "os_image_hash: Non-hexadecimal digit found"),
        ('{"os_image_hash":"ab cd"}', "os_image_hash: Odd-length string"),
        ('{"os_image_hash":"ab  cd"}', "os_image_hash: Non-hexadecimal digit found"),
        ('{"os_image_hash":null}', "os_image_hash: text expected, got null"),
        ('{"ovmf_variant":"x"}', "ovmf_variant: 'pre202505' expected, got "),
        ('{"tdx_attestation_variant":"Lite"}', "tdx_attestation_variant: 'legacy' or 'lite' expected, got \"Lite\""),
        ('{"tdx_attestation_variant":null}', "tdx_attestation_variant: 'legacy' or 'lite' expected, got null"),
        ('{"tdx_measurement":{"measurement":""}}', "tdx_measurement: missing field `checksum_file`"),
    ],
)
def test_config_refused_when_one_member_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(FormatError, match="^" + re.escape(f"Failed to parse vm config: {reason}")):
        VmConfig.parse(text)


@pytest.mark.parametrize("encoded", ["A", "AR==", "AQ===", "AQ==\\n", "A-_=", "AQ==AQ==", "="])
def test_config_refuses_base64_that_upstream_refuses(encoded: str) -> None:
    with pytest.raises(FormatError, match=r"^Failed to parse vm config: tdx_measurement: measurement: "):
        VmConfig.parse('{"tdx_measurement":{"checksum_file":"","measurement":"' + encoded + '"}}')


# The made-up image


def derive(label: str, size: int) -> bytes:
    return hashlib.shake_256(f"test seed {label}".encode()).digest(size)


@pytest.fixture(scope="module")
def image() -> OsImage:
    return OsImage.from_seed(derive)


def test_image_equals_when_made_from_the_same_seed_only(image: OsImage) -> None:
    assert OsImage.from_seed(derive) == image
    assert OsImage.from_seed(lambda label, size: derive("other " + label, size)).os_image_hash != image.os_image_hash
    assert OsImage.from_seed(derive, version="0.5.12").os_image_hash != image.os_image_hash
    # Pinned, so that another process, another day or another edit cannot change what a seed means unnoticed.
    assert image.os_image_hash.hex() == "ea8e7f8f4f936d2b915b4c5bad8be3e49617f2dba4a6b5a4f27b6b619b1bfbae"
    older = OsImage.from_seed(derive, version="0.5.11")
    assert older.os_image_hash.hex() == "089ee62cd2a9f9bdce834ca95df76abed9ffc386d8b4fca7cdccad4458be2b62"


def test_image_directory_passes_sha256sum_and_carries_required_metadata(image: OsImage, tmp_path: Path) -> None:
    for name, content in image.files.items():
        (tmp_path / name).write_bytes(content)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "sha256sum.txt"], cwd=tmp_path, check=True)
    lines = (tmp_path / "sha256sum.txt").read_text().splitlines()
    names = [line.split("  ")[1] for line in lines]
    assert names == ["ovmf.fd", "bzImage", "initramfs.cpio.gz", "metadata.json", "measurement.tdx.cbor"]
    assert (tmp_path / "digest.txt").read_text() == image.os_image_hash.hex() + "\n"
    assert hashlib.sha256((tmp_path / "sha256sum.txt").read_bytes()).digest() == image.os_image_hash
    metadata = json.loads((tmp_path / "metadata.json").read_bytes())
    assert {name: metadata[name] for name in ("bios", "kernel", "initrd", "version")} == {
        "bios": "ovmf.fd",
        "kernel": "bzImage",
        "initrd": "initramfs.cpio.gz",
        "version": "0.6.0",
    }
    assert re.search(r"(^| )dstack\.rootfs_hash=[0-9a-f]{64}( |$)", metadata["cmdline"])


def test_vm_config_of_the_image_carries_all_that_measuring_needs(image: OsImage) -> None:
    config = VmConfig.parse(image.vm_config().to_json())
    assert config == image.vm_config()
    assert config.tdx_attestation_variant == "lite"
    assert config.tdx_measurement is not None
    assert os_image_hash(config.tdx_measurement.checksum_file) == config.os_image_hash
    document = ImageMeasurement.decode(config.tdx_measurement.measurement)
    assert sha256sum_entry(config.tdx_measurement.checksum_file, MEASUREMENT_FILE) == (
        hashlib.sha256(config.tdx_measurement.measurement).digest()
    )
    registers, events = image.boot(config)
    acpi = [event.digest for event in events if event.event.startswith("acpi-")]
    assert measure(document, config, (acpi[0], acpi[1], acpi[2])) == registers
    assert [replay_register(events, imr) for imr in range(3)] == [registers.rtmr0, registers.rtmr1, registers.rtmr2]


def changed_registers(before: Registers, after: Registers) -> set[str]:
    return {name for name, value in asdict(before).items() if value != asdict(after)[name]}


@pytest.mark.parametrize(
    ("machine_change", "registers"),
    [
        ({}, set()),
        ({"image": "another name"}, set()),
        ({"cpu_count": 3}, {"rtmr0"}),
        ({"num_gpus": 1}, {"rtmr0"}),
        ({"num_nics": 2}, {"rtmr0"}),
        ({"swtpm": True}, {"rtmr0"}),
        ({"memory_size": 3 * GIB}, {"rtmr0"}),
        ({"qemu_single_pass_add_pages": False}, {"mrtd"}),
        ({"qemu_version": "9.1.0"}, {"mrtd", "rtmr0"}),
        ({"qemu_version": "8.0.0"}, set()),
        ({"qemu_version": "8.99.9"}, set()),
        ({"qemu_version": "9.1.0", "pic": True}, {"mrtd"}),
        ({"qemu_version": "9.1.0", "pic": True, "qemu_single_pass_add_pages": True}, set()),
        ({"pic": True}, set()),
        ({"pic": False}, {"rtmr0"}),
        ({"host_share_mode": ""}, set()),
        ({"host_share_mode": "vvfat"}, {"rtmr0"}),
    ],
)
def test_machine_shows_in_its_registers(image: OsImage, machine_change: Json, registers: set[str]) -> None:
    config = image.vm_config()
    before, _ = image.boot(config)
    after, _ = image.boot(replace(config, **machine_change))
    assert changed_registers(before, after) == registers


@pytest.mark.parametrize(
    ("one", "other", "registers"),
    [
        ("9.0.0", "9.1.99", set()),
        ("9.1.99", "9.2.0", {"rtmr0"}),
        ("9.2.0", "10.1.0", set()),
        (None, "9.1.0", set()),
    ],
)
def test_version_of_qemu_shows_where_its_tables_do(
    image: OsImage, one: str | None, other: str, registers: set[str]
) -> None:
    config = image.vm_config()
    before, _ = image.boot(replace(config, qemu_version=one))
    after, _ = image.boot(replace(config, qemu_version=other))
    assert changed_registers(before, after) == registers


@pytest.mark.parametrize("version", ["7.2.0", "8", "8.2.x"])
def test_version_of_qemu_that_upstream_does_not_know_is_refused(image: OsImage, version: str) -> None:
    with pytest.raises(FormatError, match="^failed to resolve QEMU measurement options: "):
        image.boot(replace(image.vm_config(), qemu_version=version))


@pytest.mark.parametrize(
    ("part", "registers"),
    [
        ("firmware", {"mrtd"}),
        ("kernel", {"rtmr1"}),
        ("initrd", {"rtmr2"}),
        ("cmdline", {"rtmr2"}),
        ("git_revision", set()),
    ],
)
def test_one_changed_byte_of_the_image_shows_in_its_register_and_hash(part: str, registers: set[str]) -> None:
    def build(**change: Any) -> OsImage:
        parts = {
            "firmware": b"f",
            "kernel": b"k",
            "initrd": b"i",
            "cmdline": "c",
            "git_revision": "g",
        } | change
        digest = placeholder_digest("kernel", parts["kernel"])
        return OsImage.build(name="n", version="1.2.3", kernel_authenticode=digest, **parts)

    before = build()
    after = build(**{part: "C" if part in ("cmdline", "git_revision") else b"X"})
    assert after.os_image_hash != before.os_image_hash
    config = before.vm_config()
    assert changed_registers(before.boot(config)[0], after.boot(config)[0]) == registers


def test_image_refuses_to_boot_with_a_memory_size_it_cannot_measure(image: OsImage) -> None:
    with pytest.raises(FormatError, match=r"got 1073741824 bytes$"):
        image.boot(image.vm_config(memory_size=GIB))
