"""The VM configuration: what a host says it launched, as JSON text beside the quote.

Nothing in it is trusted by itself. A verifier computes the registers that such a machine would have and
compares them with the quote; an honest guest only carries the text along.

What this module does not do: unwrap a text whose member `vm_config` is a string (the caller knows where it
got the text), judge `os_image_hash`, or measure anything (`attest.image` does).

Source of truth: `VmConfig` of upstream's dstack-types and its VMM (312dc605), read through serde_json.
"""

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.strict_json import ConstantError, StrictJson

_Reader = Callable[[Any], Any]

_JSON: Final = StrictJson()


@dataclass(frozen=True, slots=True)
class MeasurementDocument:
    """An image's `sha256sum.txt` and the measurement file that it binds; both base64 in JSON."""

    checksum_file: bytes
    measurement: bytes

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read the JSON object; raise `ValueError`."""
        members = _object(value)
        read = {}
        for name in ("checksum_file", "measurement"):
            if name not in members:
                raise ValueError(f"missing field `{name}`")
            read[name] = _read(name, _base64, members[name])
        return cls(**read)

    def to_json(self) -> dict[str, str]:
        """The JSON object."""
        return {name: base64.b64encode(content).decode() for name, content in asdict(self).items()}


class TdxMeasurement(MeasurementDocument):
    """The document whose `measurement` is `measurement.tdx.cbor`, to the byte."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class VmConfig:
    """One machine as its host launched it; field order is the order on the wire.

    `cpu_count` and the `num_` fields are u32, the others that count are u64. `tdx_attestation_variant` alone says how
    the boot is judged: a `tdx_measurement` may accompany a legacy boot too. `qemu_single_pass_add_pages` true selects
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
        try:
            document = _object(_JSON.parse(text))
            read = {name: _read(name, reader, document[name]) for name, reader in _MEMBERS.items() if name in document}
        except ConstantError as error:
            raise FormatError(f"Failed to parse vm config: expected value, got {error.constant}") from error
        except ValueError as error:
            raise FormatError(f"Failed to parse vm config: {error}") from error
        return cls(**read)

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


def _read(name: str, reader: _Reader, value: Any) -> Any:
    try:
        return reader(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"object expected, got {_kind(value)}")
    return value


def _unsigned(bits: int) -> _Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << bits:
            raise ValueError(f"integer of {bits} bits, not negative, expected, got {_kind(value)}")
        return value

    return read


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"true or false expected, got {_kind(value)}")
    return value


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"text expected, got {_kind(value)}")
    value.encode()  # a lone surrogate is no text
    return value


def _hex(value: Any) -> bytes:
    """Decode hex text of either case; no 0x and no blanks (`bytes.fromhex` would skip blanks)."""
    return binascii.unhexlify(_text(value))


def _base64(value: Any) -> bytes:
    """Decode standard base64 with its padding, part of it or none, and no stray bits in the last letter."""
    text = _text(value)
    body = text.rstrip("=")
    decoded = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    if not base64.b64encode(decoded).decode().startswith(text):
        raise ValueError("not canonical base64")
    return decoded


def _one_of(*names: str) -> _Reader:
    def read(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"{' or '.join(map(repr, names))} expected, got {_kind(value)}")
        return value

    return read


def _optional(reader: _Reader) -> _Reader:
    return lambda value: None if value is None else reader(value)


def _kind(value: Any) -> str:
    return f"{json.dumps(value):.40}"


_MEMBERS: Final[Mapping[str, _Reader]] = MappingProxyType(
    {
        "os_image_hash": _hex,
        "cpu_count": _unsigned(32),
        "memory_size": _unsigned(64),
        "qemu_single_pass_add_pages": _optional(_boolean),
        "pic": _optional(_boolean),
        "qemu_version": _optional(_text),
        "pci_hole64_size": _unsigned(64),
        "hugepages": _boolean,
        "num_gpus": _unsigned(32),
        "num_nvswitches": _unsigned(32),
        "num_nics": _unsigned(32),
        "num_verity_volumes": _unsigned(32),
        "swtpm": _boolean,
        "hotplug_off": _boolean,
        "image": _optional(_text),
        "host_share_mode": _text,
        "ovmf_variant": _optional(_one_of("pre202505")),
        "tdx_attestation_variant": _one_of("legacy", "lite"),
        "tdx_measurement": _optional(TdxMeasurement.from_json),
        "gcp_measurement": _optional(MeasurementDocument.from_json),
        "aws_measurement": _optional(MeasurementDocument.from_json),
    }
)
"""How each member is read, in the order in which they are written."""

_LATER_ADDITIONS: Final[Mapping[str, object]] = MappingProxyType(
    {"num_nics": 1, "num_verity_volumes": 0, "swtpm": False, "tdx_attestation_variant": "legacy"}
)
"""Members that are written only where they differ from this."""
