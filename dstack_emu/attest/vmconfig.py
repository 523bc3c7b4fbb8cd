"""The VM configuration: what a host says it launched, as JSON text beside the quote.

Nothing in it is trusted by itself. A verifier computes the registers that such a machine would have and
compares them with the quote; an honest guest only carries the text along.

What this module does not do: unwrap a text whose member `vm_config` is a string (the caller knows where it
got the text), verify `os_image_hash`, or measure anything (`attest.image` does).

Source of truth: `VmConfig` of upstream's dstack-types and its VMM (312dc605), read through serde_json.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.json_struct import (
    Reader,
    one_of,
    optional,
    parse_json,
    read_base64,
    read_boolean,
    read_hex,
    read_members,
    read_text,
    unsigned,
)

MAX_LENGTH: Final = 1024 * 1024
"""The maximum length of a configuration in characters. With an image's measurement documents it has about 10,000."""

MAX_VALUES: Final = 4096
"""The maximum number of JSON values of a configuration, which has about thirty."""


@dataclass(frozen=True, slots=True)
class MeasurementDocument:
    """An image's `sha256sum.txt` and the measurement file that it binds; both base64 in JSON."""

    checksum_file: bytes
    measurement: bytes

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read the JSON object; raise `ValueError`."""
        members = {"checksum_file": read_base64, "measurement": read_base64}
        return cls(**read_members(value, members, required=tuple(members)))

    def to_json(self) -> dict[str, str]:
        """Return the JSON object."""
        return {name: base64.b64encode(content).decode() for name, content in asdict(self).items()}


class TdxMeasurement(MeasurementDocument):
    """The document whose `measurement` is `measurement.tdx.cbor`, to the byte."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class VmConfig:
    """One machine as its host launched it; field order is the order on the wire.

    `cpu_count` and the `num_` fields are u32, the others that count are u64. `tdx_attestation_variant` alone says how
    the boot is verified: a `tdx_measurement` may accompany a legacy boot too. `qemu_single_pass_add_pages` true selects
    the two-pass MRTD: the name is upstream's, and wrong.
    """

    os_image_hash: bytes = b""
    cpu_count: int = 0
    memory_size: int = 0
    qemu_single_pass_add_pages: bool | None = None
    pic: bool | None = None
    qemu_version: str | None = None
    pci_hole64_size: int = 0
    hugepages: bool = False
    num_gpus: int = 0
    num_nvswitches: int = 0
    num_nics: int = 1
    num_verity_volumes: int = 0
    swtpm: bool = False
    hotplug_off: bool = False
    image: str | None = None
    host_share_mode: str = ""
    ovmf_variant: Literal["pre202505"] | None = None
    tdx_attestation_variant: Literal["legacy", "lite"] = "legacy"
    tdx_measurement: TdxMeasurement | None = None
    gcp_measurement: MeasurementDocument | None = None
    aws_measurement: MeasurementDocument | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a configuration as serde would: unknown members ignored, absent ones defaulted, types exact.

        Stricter than upstream in two ways: a JSON array is no configuration, and no member, known or not, may
        be named twice. Raises FormatError, its text beginning with upstream's `Failed to parse vm config: `.
        """
        require_size(text)
        try:
            return cls(**read_members(parse_json(text, MAX_VALUES), _MEMBERS))
        except ValueError as error:
            raise FormatError(f"Failed to parse vm config: {error}") from error

    def to_json(self) -> str:
        """Write the text that the VMM hands to its guest: compact, `spec_version` 1 appended last.

        Left out are absent options and those later additions that have their default, so that older texts
        keep their bytes.
        """
        document: dict[str, Any] = {}
        for name in _MEMBERS:
            value = getattr(self, name)
            if value is None or (name in _LATER_ADDITIONS and value == _LATER_ADDITIONS[name]):
                continue
            if isinstance(value, bytes):
                value = value.hex()
            elif isinstance(value, MeasurementDocument):
                value = value.to_json()
            document[name] = value
        return json.dumps(document | {"spec_version": 1}, separators=(",", ":"), ensure_ascii=False)


def require_size(text: str) -> None:
    """Raise `FormatError` if a configuration has more than MAX_LENGTH characters."""
    if len(text) > MAX_LENGTH:
        raise FormatError(f"Failed to parse vm config: at most {MAX_LENGTH} characters expected, got {len(text)}")


_MEMBERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "os_image_hash": read_hex,
        "cpu_count": unsigned(32),
        "memory_size": unsigned(64),
        "qemu_single_pass_add_pages": optional(read_boolean),
        "pic": optional(read_boolean),
        "qemu_version": optional(read_text),
        "pci_hole64_size": unsigned(64),
        "hugepages": read_boolean,
        "num_gpus": unsigned(32),
        "num_nvswitches": unsigned(32),
        "num_nics": unsigned(32),
        "num_verity_volumes": unsigned(32),
        "swtpm": read_boolean,
        "hotplug_off": read_boolean,
        "image": optional(read_text),
        "host_share_mode": read_text,
        "ovmf_variant": optional(one_of("pre202505")),
        "tdx_attestation_variant": one_of("legacy", "lite"),
        "tdx_measurement": optional(TdxMeasurement.from_json),
        "gcp_measurement": optional(MeasurementDocument.from_json),
        "aws_measurement": optional(MeasurementDocument.from_json),
    }
)
"""How each member is read, in the order in which they are written."""

_LATER_ADDITIONS: Final[Mapping[str, object]] = MappingProxyType(
    {"num_nics": 1, "num_verity_volumes": 0, "swtpm": False, "tdx_attestation_variant": "legacy"}
)
"""Members that are written only where they differ from this."""
