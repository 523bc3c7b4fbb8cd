"""Verifies that a quote's registers are those of the OS image in its VM config, without network and disk.

The lite variant is completely verified here: the config contains the image's measurement document, which is bound by
the image's hash. The legacy variant measures a downloaded image; its manifest, its metadata and the entries of a
measurement cache are parsed here, and `transport.image_store` does the rest.

Success does not prove that the ACPI tables are harmless (the lite variant takes their digests from the event log, which
the host controls), or that the image is trustworthy (a webhook decides by its hash).

Source of truth: dstack `verifier/src/verification.rs`, `dstack-types/src/lib.rs`, `dstack-mr/src/tdx.rs` at 312dc605;
order and texts were seen on a real dstack-verifier. `sha256sum -c` is that of GNU coreutils.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final, Self

from dstack_emu.attest.app_info import vm_config_of
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import RTMR_SIZE, TdxEvent
from dstack_emu.attest.image import (
    ACPI_EVENT_NAMES,
    MEASUREMENT_FILE,
    MEASUREMENT_VERSIONS,
    AcpiDigests,
    ImageMeasurement,
    Registers,
    measure,
    os_image_hash,
    sha256sum_entry,
)
from dstack_emu.attest.quote import TdReport
from dstack_emu.attest.vmconfig import TdxMeasurement, VmConfig

CHECKSUM_FILE: Final = "sha256sum.txt"
METADATA_FILE: Final = "metadata.json"

CACHE_VERSION: Final = 3
"""The version of entries of a measurement cache; entries of other versions are ignored."""


def decode_vm_config(text: str) -> VmConfig:
    """Parse the VM config of a request or of evidence; raise `VerificationError`."""
    try:
        return vm_config_of(text)
    except FormatError as error:
        raise VerificationError(f"Failed to decode VM config: {error}") from error


def require_registers(expected: Registers, report: TdReport) -> None:
    """Compare computed and quoted registers, MRTD first; raise `VerificationError` for the first one that differs."""
    quoted = Registers(report.mr_td, *report.rtmrs[:3])
    for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2"):
        computed, got = getattr(expected, name), getattr(quoted, name)
        if computed != got:
            raise VerificationError(
                f"MRs do not match: {name.upper()} mismatch: expected={computed.hex()}, actual={got.hex()}"
            )


# ---- The lite variant


def verify_lite(
    vm_config: VmConfig,
    event_log: Sequence[TdxEvent],
    report: TdReport,
    versions: Collection[int] = MEASUREMENT_VERSIONS,
) -> None:
    """Verify a boot by the measurement document in its VM config; raise `VerificationError` for the first failure.

    Checks and order are upstream's: there is a document, it belongs to the named image, it can be parsed, the log has
    three named ACPI digests, registers can be computed, and they are the quoted ones. The rest of the log is ignored.
    """
    measurement = lite_measurement(vm_config, versions)
    require_registers(lite_registers(measurement, vm_config, acpi_digests(event_log)), report)


def lite_measurement(vm_config: VmConfig, versions: Collection[int] = MEASUREMENT_VERSIONS) -> ImageMeasurement:
    """Return the measurement document in a VM config; raise `VerificationError` if there is none for its image.

    It has to be of one of the versions.

    Parsing the config has already verified the OVMF variant: there is only one.
    """
    document = vm_config.tdx_measurement
    if document is None:
        raise VerificationError("tdx lite attestation requires vm_config.tdx_measurement")
    try:
        require_document(vm_config.os_image_hash, document)
    except FormatError as error:
        raise VerificationError(f"tdx lite measurement material does not match os_image_hash: {error}") from error
    try:
        return ImageMeasurement.decode(document.measurement, versions)
    except FormatError as error:
        raise VerificationError(f"failed to decode vm_config.tdx_measurement CBOR: {error}") from error


def require_document(claimed_hash: bytes, document: TdxMeasurement) -> None:
    """Verify that a measurement document belongs to the image with that hash; raise `FormatError`."""
    actual = os_image_hash(document.checksum_file)
    if actual != claimed_hash:
        raise FormatError(
            f"os_image_hash mismatch: expected sha256(sha256sum.txt)={claimed_hash.hex()}, actual={actual.hex()}"
        )
    listed = sha256sum_entry(document.checksum_file, MEASUREMENT_FILE)
    found = hashlib.sha256(document.measurement).digest()
    if listed != found:
        raise FormatError(f"{MEASUREMENT_FILE} hash mismatch: sha256sum.txt={listed.hex()}, actual={found.hex()}")


def lite_registers(measurement: ImageMeasurement, vm_config: VmConfig, digests: AcpiDigests) -> Registers:
    """Compute the registers of a boot; raise `VerificationError` if that is not possible."""
    try:
        return measure(measurement, vm_config, digests)
    except FormatError as error:
        raise VerificationError(
            f"Failed to compute TDX expected measurements without image download: {error}"
        ) from error


def acpi_digests(event_log: Sequence[TdxEvent]) -> AcpiDigests:
    """Return the digests of QEMU's ACPI blobs, by the names of the events; raise `VerificationError`."""
    found = {}
    candidates = [event for event in event_log if event.is_acpi_data]
    if len(candidates) != len(ACPI_EVENT_NAMES):
        raise _no_acpi_digests(
            f"TDX lite attestation requires exactly 3 RTMR0 ACPI DATA events; found {len(candidates)} candidates and "
            f"{sum(event.imr == 0 for event in event_log)} RTMR0 events"
        )
    for name in ACPI_EVENT_NAMES:
        named = [event.digest for event in candidates if event.event == name]
        if len(named) != 1:
            raise _no_acpi_digests(
                f"TDX lite attestation requires exactly one RTMR0 ACPI DATA event named {name}; found {len(named)}"
            )
        if len(named[0]) != RTMR_SIZE:
            raise _no_acpi_digests(
                f"TDX RTMR0 ACPI DATA event {name} has invalid digest length {len(named[0])}, expected {RTMR_SIZE}"
            )
        found[name] = named[0]
    return found["acpi-loader"], found["acpi-rsdp"], found["acpi-tables"]


def _no_acpi_digests(cause: str) -> VerificationError:
    return VerificationError(f"TDX lite attestation is missing named RTMR0 ACPI DATA digests: {cause}")


# ---- The legacy variant: the files of an unpacked image


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The facts about an image in metadata.json; the version is empty if there is none.

    `kernel_header_normalized` says that its firmware normalizes the setup header before it measures the kernel.
    """

    version: str
    is_dev: bool
    kernel_header_normalized: bool = False

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Parse metadata.json; raise `FormatError` if upstream could not use it."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"Failed to parse image metadata: {error}") from error
        if not isinstance(document, dict):
            raise FormatError(f"Failed to parse image metadata: object expected, got {type(document).__name__}")
        for name in ("cmdline", "kernel", "initrd", "bios"):
            if not isinstance(document.get(name), str):
                raise FormatError(f"Failed to parse image metadata: missing field `{name}`")
        version, is_dev = document.get("version", ""), document.get("is_dev", False)
        if not isinstance(version, str) or not isinstance(is_dev, bool):
            raise FormatError("Failed to parse image metadata: version: text, is_dev: true or false expected")
        normalized = document.get("kernel_header_normalized", False)
        if not isinstance(normalized, bool):
            raise FormatError("Failed to parse image metadata: kernel_header_normalized: true or false expected")
        return cls(version, is_dev, normalized)


@dataclass(frozen=True, slots=True)
class ManifestLine:
    """A line of sha256sum.txt: the name of the file, its 32-byte hash, and the word that lists it."""

    name: str
    digest: bytes
    listed: str


def parse_manifest(checksum_file: bytes) -> tuple[ManifestLine, ...]:
    """Parse the manifest of an image: flat names, only checksum lines, no file twice; raise `FormatError`.

    This is stricter than upstream, whose `sha256sum -c` ignores other lines and accepts a file that is listed twice.
    """
    try:
        text = checksum_file.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"Failed to read {CHECKSUM_FILE}: {error}") from error
    lines: list[ManifestLine] = []
    names: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words:
            continue
        if len(words) == 1:
            raise FormatError("image manifest entry is missing a path")
        if len(words) > 2:
            raise FormatError(f"image manifest line {number} has extra fields")
        name = words[1]
        if "/" in name or name in (".", "..") or "\0" in name:
            raise FormatError(f"image manifest line {number} has an unsafe path")
        if name == CHECKSUM_FILE:
            raise FormatError(f"image manifest must not recursively list {CHECKSUM_FILE}")
        checked = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](\S+)", line.rstrip("\r"))
        if checked is None:
            raise FormatError(
                f"Checksum verification failed: {CHECKSUM_FILE} line {number}: 64 hex digits, two spaces and a file "
                "name expected"
            )
        if checked[2] in names:
            raise FormatError(f"{CHECKSUM_FILE} contains duplicate {checked[2]} entries")
        names.add(checked[2])
        lines.append(ManifestLine(checked[2], bytes.fromhex(checked[1]), name))
    if not lines:
        raise FormatError(
            f"Checksum verification failed: sha256sum: {CHECKSUM_FILE}: no properly formatted checksum lines found"
        )
    return tuple(lines)


def require_checksums(manifest: Sequence[ManifestLine], found: Mapping[str, bytes | None]) -> None:
    """Compare hashes (None: no such file) with the manifest; raise `FormatError` with the text of `sha256sum -c`."""
    missing = [line.name for line in manifest if found[line.name] is None]
    wrong = sum(found[line.name] not in (None, line.digest) for line in manifest)
    said = [f"sha256sum: {name}: No such file or directory" for name in missing]
    if missing:
        many = "files" if len(missing) > 1 else "file"
        said.append(f"sha256sum: WARNING: {len(missing)} listed {many} could not be read")
    if wrong:
        many = "checksums" if wrong > 1 else "checksum"
        said.append(f"sha256sum: WARNING: {wrong} computed {many} did NOT match")
    if said:
        raise FormatError("Checksum verification failed: " + "\n".join(said) + "\n")


# ---- The legacy variant: measurements that were computed before


def cache_key(vm_config: VmConfig) -> str:
    """Return the name of a cache entry: the SHA-256, in hex, of the config as upstream's types encode it."""
    document = json.loads(vm_config.to_json())
    del document["spec_version"]  # added by the VMM, and dropped by upstream's parser
    return hashlib.sha256(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def encode_cache_entry(registers: Registers) -> bytes:
    """Encode an entry of a measurement cache."""
    measurements = {name: value.hex() for name, value in asdict(registers).items()}
    return json.dumps({"version": CACHE_VERSION, "measurements": measurements}, separators=(",", ":")).encode()


def decode_cache_entry(data: bytes) -> Registers | None:
    """Parse an entry of a measurement cache; return None if it has another version or is invalid."""
    try:
        document = json.loads(data)
        measurements = document["measurements"]
        if document["version"] != CACHE_VERSION:
            return None
        return Registers(**{field.name: bytes.fromhex(measurements[field.name]) for field in fields(Registers)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
