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
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from attest.errors import FormatError


def _decode_hex(value: object) -> object:
    """Decode hex text of either case; no 0x and no blanks (`bytes.fromhex` would skip blanks)."""
    return binascii.unhexlify(value) if isinstance(value, str) else value


def _decode_base64(value: object) -> object:
    """Decode standard base64 with its padding, part of it or none, and no stray bits in the last letter."""
    if not isinstance(value, str):
        return value
    body = value.rstrip("=")
    decoded = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    if not base64.b64encode(decoded).decode().startswith(value):
        raise ValueError("not canonical base64")
    return decoded


def _refuse_surrogates(value: str) -> str:
    value.encode()
    return value


def _encode_hex(value: bytes) -> str:
    return value.hex()


def _encode_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


_U32 = Annotated[int, Field(ge=0, lt=1 << 32)]
_U64 = Annotated[int, Field(ge=0, lt=1 << 64)]
_Text = Annotated[str, AfterValidator(_refuse_surrogates)]
_Hex = Annotated[bytes, BeforeValidator(_decode_hex), PlainSerializer(_encode_hex, when_used="json")]
_Base64 = Annotated[bytes, BeforeValidator(_decode_base64), PlainSerializer(_encode_base64, when_used="json")]

_WIRE = ConfigDict(extra="ignore", frozen=True, strict=True)


class MeasurementDocument(BaseModel):
    """An image's `sha256sum.txt` and the measurement file that it binds; both base64 in JSON."""

    model_config = _WIRE

    checksum_file: _Base64
    measurement: _Base64


class TdxMeasurement(MeasurementDocument):
    """The document whose `measurement` is `measurement.tdx.cbor`, to the byte."""


class VmConfig(BaseModel):
    """One machine as its host launched it; field order is the order on the wire.

    `tdx_attestation_variant` alone says how the boot is judged: a `tdx_measurement` may accompany a legacy
    boot too. `qemu_single_pass_add_pages` true selects the two-pass MRTD: the name is upstream's, and wrong.
    """

    model_config = _WIRE

    os_image_hash: _Hex = b""
    cpu_count: _U32 = 0
    memory_size: _U64 = 0
    qemu_single_pass_add_pages: bool | None = None
    pic: bool | None = None
    qemu_version: _Text | None = None
    pci_hole64_size: _U64 = 0
    hugepages: bool = False
    num_gpus: _U32 = 0
    num_nvswitches: _U32 = 0
    num_nics: _U32 = 1
    num_verity_volumes: _U32 = 0
    swtpm: bool = False
    hotplug_off: bool = False
    image: _Text | None = None
    host_share_mode: _Text = ""
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
            document = json.loads(text, object_pairs_hook=_unique_members, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"Failed to parse vm config: {error}") from error
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            reason = ": ".join((*map(str, first["loc"]), first["msg"]))
            raise FormatError(f"Failed to parse vm config: {reason}") from error

    def to_json(self) -> str:
        """Write the text that the VMM hands to its guest: compact, `spec_version` 1 appended last.

        Left out are absent options and those later additions that have their default, so that older texts
        keep their bytes.
        """
        document = self.model_dump(mode="json", exclude_none=True)
        for name in ("num_nics", "num_verity_volumes", "swtpm", "tdx_attestation_variant"):
            if document[name] == type(self).model_fields[name].default:
                del document[name]
        return json.dumps(document | {"spec_version": 1}, separators=(",", ":"), ensure_ascii=False)


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"duplicate field `{name}`")
        members[name] = value
    return members


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"expected value, got {constant}")
