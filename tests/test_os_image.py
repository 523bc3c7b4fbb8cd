"""Whether registers are an image's, against hardware, a recorded made-up image, and every text of the real verifier."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cbor2
import pytest

from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import ACPI_EVENT_TYPE, ACPI_PAYLOAD, TdxEvent
from dstack_emu.attest.image import Registers
from dstack_emu.attest.os_image import (
    ImageInfo,
    cache_key,
    decode_cache_entry,
    decode_vm_config,
    encode_cache_entry,
    parse_manifest,
    require_checksums,
    verify_lite,
)
from dstack_emu.attest.quote import TdReport
from dstack_emu.attest.release import RELEASES
from dstack_emu.attest.vmconfig import TdxMeasurement, VmConfig
from tests.hardware import LITE, HardwareBoot, boot
from tests.recorded import tdx_lite_steps

Json = dict[str, Any]

LOG = "TDX lite attestation is missing named RTMR0 ACPI DATA digests: "
MATERIAL = "tdx lite measurement material does not match os_image_hash: "
DECODE = "failed to decode vm_config.tdx_measurement CBOR: TdxOsImageMeasurement: "
COMPUTE = "Failed to compute TDX expected measurements without image download: "


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def hardware() -> HardwareBoot:
    """A boot on real hardware, lite variant."""
    return boot(LITE)


@pytest.fixture(scope="module")
def report(hardware: HardwareBoot) -> TdReport:
    return hardware.report


@pytest.fixture(scope="module")
def config(hardware: HardwareBoot) -> VmConfig:
    return decode_vm_config(hardware.vm_config)


def refusal(vm_config: VmConfig, log: tuple[TdxEvent, ...], report: TdReport) -> str:
    with pytest.raises(VerificationError) as refused:
        verify_lite(vm_config, log, report, RELEASES["0.5"].measurement_documents)
    return str(refused.value)


def with_document(config: VmConfig, document: bytes, checksum_file: bytes | None = None) -> VmConfig:
    """The config of another document, bound to it by hashes unless a checksum file is given."""
    listed = f"{sha256(document)}  measurement.tdx.cbor\n".encode() if checksum_file is None else checksum_file
    return replace(
        config, os_image_hash=hashlib.sha256(listed).digest(), tdx_measurement=TdxMeasurement(listed, document)
    )


# ---- what holds


def test_hardware_boot_is_its_images(config: VmConfig, hardware: HardwareBoot, report: TdReport) -> None:
    assert config.tdx_attestation_variant == "lite"
    verify_lite(config, hardware.events, report)


def test_hardware_boot_needs_of_its_log_three_events_in_any_order(
    config: VmConfig, hardware: HardwareBoot, report: TdReport
) -> None:
    acpi = [event for event in hardware.events if event.is_acpi_data]
    assert len(acpi) == 3
    verify_lite(config, tuple(reversed(acpi)), report)
    assert refusal(config, tuple(acpi[:2]), report).startswith(f"{LOG}TDX lite attestation requires exactly 3")


def test_recorded_image_measures_register_by_register(report: TdReport) -> None:
    image = tdx_lite_steps()["emulated"]
    vm_config = decode_vm_config(json.dumps(image["vm_config"]))
    log = tuple(
        TdxEvent(0, ACPI_EVENT_TYPE, bytes.fromhex(digest), name, ACPI_PAYLOAD)
        for name, digest in image["acpi"].items()
    )
    fields = {"mrtd": "mr_td", "rtmr0": "rt_mr0", "rtmr1": "rt_mr1", "rtmr2": "rt_mr2"}
    quoted = {fields[name]: value for name, value in image["registers"].items()}
    good = replace(report, **{field: bytes.fromhex(value) for field, value in quoted.items()})
    verify_lite(vm_config, log, good)
    for register, field in (("MRTD", "mr_td"), ("RTMR0", "rt_mr0"), ("RTMR1", "rt_mr1"), ("RTMR2", "rt_mr2")):
        said = refusal(vm_config, log, replace(good, **{field: bytes(48)}))
        assert said == f"MRs do not match: {register} mismatch: expected={quoted[field]}, actual={'00' * 48}"


def test_first_register_that_differs_is_named(config: VmConfig, hardware: HardwareBoot, report: TdReport) -> None:
    wrong = replace(report, mr_td=bytes(48), rt_mr0=bytes(48), rt_mr2=bytes(48))
    assert refusal(config, hardware.events, wrong).startswith("MRs do not match: MRTD mismatch: expected=fd685522")
    wrong = replace(report, rt_mr1=bytes(48), rt_mr2=bytes(48))
    assert refusal(config, hardware.events, wrong).startswith("MRs do not match: RTMR1 mismatch: expected=2023546e")


def test_the_rest_of_the_config_is_not_looked_at(config: VmConfig, hardware: HardwareBoot, report: TdReport) -> None:
    other = replace(config, cpu_count=64, num_gpus=8, hugepages=True, pic=True, image="another", swtpm=True, num_nics=3)
    verify_lite(other, hardware.events, report)
    assert "RTMR0 mismatch" in refusal(replace(other, memory_size=4 << 30), hardware.events, report)


# ---- what does not, in the order of the checks


def test_config_that_is_none() -> None:
    with pytest.raises(VerificationError, match="^Failed to decode VM config: Failed to parse vm config: "):
        decode_vm_config("{")
    assert decode_vm_config("") == VmConfig()


def test_document_is_required(config: VmConfig, hardware: HardwareBoot, report: TdReport) -> None:
    said = refusal(replace(config, tdx_measurement=None), hardware.events, report)
    assert said == "tdx lite attestation requires vm_config.tdx_measurement"


def _wrong_hash(config: VmConfig) -> tuple[VmConfig, str]:
    assert config.tdx_measurement
    actual = sha256(config.tdx_measurement.checksum_file)
    return (
        replace(config, os_image_hash=b"\xab" * 32),
        f"{MATERIAL}os_image_hash mismatch: expected sha256(sha256sum.txt)={'ab' * 32}, actual={actual}",
    )


def _wrong_checksum_file(config: VmConfig) -> tuple[VmConfig, str]:
    assert config.tdx_measurement
    changed = config.tdx_measurement.checksum_file + b"\n"
    document = replace(config.tdx_measurement, checksum_file=changed)
    claimed = config.os_image_hash.hex()
    return (
        replace(config, tdx_measurement=document),
        f"{MATERIAL}os_image_hash mismatch: expected sha256(sha256sum.txt)={claimed}, actual={sha256(changed)}",
    )


def _unlisted(config: VmConfig) -> tuple[VmConfig, str]:
    assert config.tdx_measurement
    document = config.tdx_measurement.measurement
    listed = f"{sha256(document)} *measurement.tdx.cbor\n".encode()
    return with_document(config, document, listed), f"{MATERIAL}sha256sum.txt is missing measurement.tdx.cbor"


def _listed_twice(config: VmConfig) -> tuple[VmConfig, str]:
    assert config.tdx_measurement
    document = config.tdx_measurement.measurement
    listed = f"{sha256(document)}  measurement.tdx.cbor\n".encode() * 2
    said = f"{MATERIAL}sha256sum.txt contains duplicate measurement.tdx.cbor entries"
    return with_document(config, document, listed), said


def _swapped_document(config: VmConfig) -> tuple[VmConfig, str]:
    assert config.tdx_measurement
    other = config.tdx_measurement.measurement[:-1] + b"\x00"
    listed = sha256(config.tdx_measurement.measurement)
    return (
        replace(config, tdx_measurement=replace(config.tdx_measurement, measurement=other)),
        f"{MATERIAL}measurement.tdx.cbor hash mismatch: sha256sum.txt={listed}, actual={sha256(other)}",
    )


def _other_version(config: VmConfig) -> tuple[VmConfig, str]:
    assert config.tdx_measurement
    document = cbor2.loads(config.tdx_measurement.measurement) | {"version": 2}
    return with_document(config, cbor2.dumps(document)), f"{DECODE}unsupported version 2, expected 3"


def _no_cbor(config: VmConfig) -> tuple[VmConfig, str]:
    return with_document(config, b"\xff"), f"{DECODE}failed to decode CBOR: …"


def _memory(config: VmConfig) -> tuple[VmConfig, str]:
    return (
        replace(config, memory_size=2500 << 20),
        f"{COMPUTE}TDX lite attestation without image download requires memory_size == 2147483648 bytes (2048 MiB) or "
        ">= 2952790016 bytes (2816 MiB); got 2621440000 bytes",
    )


def _other_memory(config: VmConfig) -> tuple[VmConfig, str]:
    return replace(config, memory_size=4 << 30), "MRs do not match: RTMR0 mismatch: expected=…"


def _qemu(config: VmConfig) -> tuple[VmConfig, str]:
    said = "failed to resolve QEMU measurement options: Failed to parse QEMU version: Invalid version number: …"
    return replace(config, qemu_version="8.x.2"), COMPUTE + said


def _other_qemu(config: VmConfig) -> tuple[VmConfig, str]:
    return replace(config, qemu_version="9.1.0"), "MRs do not match: MRTD mismatch: expected=…"


@pytest.mark.parametrize(
    "change",
    [
        _wrong_hash,
        _wrong_checksum_file,
        _unlisted,
        _listed_twice,
        _swapped_document,
        _other_version,
        _no_cbor,
        _memory,
        _other_memory,
        _qemu,
        _other_qemu,
    ],
)
def test_changed_config_is_refused_at_its_own_check(
    change: Callable[[VmConfig], tuple[VmConfig, str]], config: VmConfig, hardware: HardwareBoot, report: TdReport
) -> None:
    changed, expected = change(config)
    head, ellipsis, _ = expected.partition("…")
    said = refusal(changed, hardware.events, report)
    assert said == expected if not ellipsis else said.startswith(head)


def _relabelled(log: tuple[TdxEvent, ...]) -> tuple[TdxEvent, ...]:
    return tuple(replace(event, event="acpi-rsdp") if event.event == "acpi-loader" else event for event in log)


def _shortened(log: tuple[TdxEvent, ...]) -> tuple[TdxEvent, ...]:
    return tuple(replace(event, digest=b"\0" * 32) if event.event == "acpi-tables" else event for event in log)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda log: (), "requires exactly 3 RTMR0 ACPI DATA events; found 0 candidates and 0 RTMR0 events"),
        (
            lambda log: tuple(event for event in log if event.event != "acpi-rsdp"),
            "requires exactly 3 RTMR0 ACPI DATA events; found 2 candidates and 2 RTMR0 events",
        ),
        (_relabelled, "requires exactly one RTMR0 ACPI DATA event named acpi-loader; found 0"),
    ],
)
def test_log_without_three_named_acpi_digests_is_refused(
    change: Callable[[tuple[TdxEvent, ...]], tuple[TdxEvent, ...]],
    cause: str,
    config: VmConfig,
    hardware: HardwareBoot,
    report: TdReport,
) -> None:
    assert refusal(config, change(hardware.events), report) == f"{LOG}TDX lite attestation {cause}"


def test_acpi_digest_of_another_size_is_refused(config: VmConfig, hardware: HardwareBoot, report: TdReport) -> None:
    said = refusal(config, _shortened(hardware.events), report)
    assert said == f"{LOG}TDX RTMR0 ACPI DATA event acpi-tables has invalid digest length 32, expected 48"


def test_check_comes_before_the_next(config: VmConfig, hardware: HardwareBoot, report: TdReport) -> None:
    bad_memory = replace(config, memory_size=1)
    no_cbor, _ = _no_cbor(bad_memory)
    wrong_hash = replace(no_cbor, os_image_hash=bytes(32))
    assert refusal(bad_memory, hardware.events, report).startswith(COMPUTE)
    assert refusal(bad_memory, (), report).startswith(LOG)
    assert refusal(no_cbor, (), report).startswith(DECODE)
    assert refusal(wrong_hash, (), report).startswith(MATERIAL)


def test_long_document_is_judged_alike(config: VmConfig, hardware: HardwareBoot, report: TdReport) -> None:
    assert config.tdx_measurement
    listed = config.tdx_measurement.checksum_file + f"{'0' * 64}  other\n".encode() * 2000
    long = with_document(config, config.tdx_measurement.measurement, listed)
    verify_lite(long, hardware.events, report)
    assert refusal(replace(long, os_image_hash=bytes(32)), hardware.events, report).startswith(MATERIAL)


# ---- the legacy variant's parts

GOOD = "a" * 64


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("", "Checksum verification failed: sha256sum: sha256sum.txt: no properly formatted checksum lines found"),
        (f"{GOOD}\n", "image manifest entry is missing a path"),
        (f"{GOOD}  a b\n", "image manifest line 1 has extra fields"),
        (f"{GOOD}  a\n\n{GOOD}  ../b\n", "image manifest line 3 has an unsafe path"),
        (f"{GOOD}  /b\n", "image manifest line 1 has an unsafe path"),
        (f"{GOOD}  b/\n", "image manifest line 1 has an unsafe path"),
        (f"{GOOD}  ..\n", "image manifest line 1 has an unsafe path"),
        (f"{GOOD}  sha256sum.txt\n", "image manifest must not recursively list sha256sum.txt"),
        (f"{GOOD}  a\n{GOOD} *a\n", "sha256sum.txt contains duplicate a entries"),
        (f"{GOOD[1:]}  a\n", "Checksum verification failed: sha256sum.txt line 1: 64 hex digits, two spaces and …"),
        (f"{GOOD}\ta\n", "Checksum verification failed: sha256sum.txt line 1: 64 hex digits, two spaces and …"),
    ],
)
def test_manifest_refused(manifest: str, reason: str) -> None:
    head, ellipsis, _ = reason.partition("…")
    with pytest.raises(FormatError) as refused:
        parse_manifest(manifest.encode())
    assert str(refused.value) == reason if not ellipsis else str(refused.value).startswith(head)


def test_manifest_of_binary_mode_checks_the_file_without_the_star() -> None:
    (line,) = parse_manifest(f"{GOOD} *ovmf.fd\r\n".encode())
    assert (line.name, line.listed) == ("ovmf.fd", "*ovmf.fd")


def test_checksums_are_judged_in_the_words_of_sha256sum() -> None:
    manifest = parse_manifest(f"{GOOD}  a\n{GOOD}  b\n{GOOD}  c\n".encode())
    good = bytes.fromhex(GOOD)
    require_checksums(manifest, {"a": good, "b": good, "c": good})
    with pytest.raises(FormatError) as refused:
        require_checksums(manifest, {"a": None, "b": bytes(32), "c": good})
    assert str(refused.value) == (
        "Checksum verification failed: sha256sum: a: No such file or directory\n"
        "sha256sum: WARNING: 1 listed file could not be read\n"
        "sha256sum: WARNING: 1 computed checksum did NOT match\n"
    )


@pytest.mark.parametrize("missing", ["cmdline", "kernel", "initrd", "bios"])
def test_metadata_needs_what_is_measured(missing: str) -> None:
    document = {"bios": "a", "kernel": "b", "cmdline": "c", "initrd": "d"}
    assert ImageInfo.parse(json.dumps(document).encode()) == ImageInfo("", False)
    del document[missing]
    with pytest.raises(FormatError, match=f"^Failed to parse image metadata: missing field `{missing}`$"):
        ImageInfo.parse(json.dumps(document).encode())


def test_cache_key_is_of_what_upstreams_types_write(config: VmConfig, hardware: HardwareBoot) -> None:
    legacy = VmConfig.parse('{"memory_size":2147483648,"os_image_hash":"ABCD","unknown":1,"cpu_count":2}')
    written = (
        '{"os_image_hash":"abcd","cpu_count":2,"memory_size":2147483648,"pci_hole64_size":0,"hugepages":false,'
        '"num_gpus":0,"num_nvswitches":0,"hotplug_off":false,"host_share_mode":""}'
    )
    assert cache_key(legacy) == sha256(written.encode())


def test_cache_entry_survives_and_what_is_none_is_passed_over() -> None:
    registers = Registers(*(bytes([n]) * 48 for n in range(4)))
    entry = encode_cache_entry(registers)
    assert json.loads(entry)["version"] == 3
    assert decode_cache_entry(entry) == registers
    for other in (b"", b"[]", b'{"version":3}', entry.replace(b'"version":3', b'"version":2'), entry[:-9], b"null"):
        assert decode_cache_entry(other) is None


def test_document_travels_in_base64(config: VmConfig) -> None:
    assert config.tdx_measurement
    written = json.loads(config.to_json())["tdx_measurement"]["measurement"]
    assert base64.b64decode(written) == config.tdx_measurement.measurement
