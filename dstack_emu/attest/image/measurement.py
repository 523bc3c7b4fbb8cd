"""`measurement.tdx.cbor`: what an image brings to the registers of every TD it boots in.

Images of dstack 0.6.0 have version 4, with the text of the command line instead of its digest, and a member that says
whether the firmware normalizes the kernel's setup header. Source of that version: dstack-mr `src/tdx.rs` at 1b6a4fe9,
and a document that real hardware booted.
"""

import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import cbor2

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.image.files import cmdline_sha384

MEASUREMENT_VERSIONS: Final = (3, 4)
OVMF_VARIANT: Final = "pre202505"
MAX_DOCUMENT_SIZE: Final = 64 * 1024
"""The maximum size of the document in bytes; an image's has about 500."""

_T = TypeVar("_T")


def _member(container: object, name: str, kind: type[_T]) -> _T:
    if type(container) is not dict or name not in container:
        raise FormatError(f"missing field `{name}`")
    value = container[name]
    # Exact types: CBOR's true is no integer, though Python's True is one.
    if type(value) is not kind:
        raise FormatError(f"field `{name}` is {type(value).__name__}, expected {kind.__name__}")
    return value


@dataclass(frozen=True, slots=True)
class ImageMeasurement:
    """The measurement document: of version 4 if it has a `cmdline`, else of version 3.

    The digests are 48 bytes each and td_hob is an encoded TdHobWitness, but neither is checked before
    `measure` needs it, as upstream. kernel_authenticode is of the kernel as patched for 2 GiB, or for 2.75
    GiB and more; or of the kernel's file, for any memory, if the firmware normalizes its header.
    """

    cmdline_sha384: bytes
    kernel_authenticode: bytes
    initrd_sha384: bytes
    mrtd_single_pass: bytes
    mrtd_two_pass: bytes
    td_hob: bytes
    cmdline: str | None = None
    kernel_header_normalized: bool = False

    def encode(self) -> bytes:
        """Encode as upstream's image build does: definite lengths, this order (not CBOR's canonical one)."""
        normalized = {"kernel_header_normalized": True} if self.kernel_header_normalized else {}
        document = {
            "version": 3 if self.cmdline is None else 4,
            "image": {
                **({"cmdline_sha384": self.cmdline_sha384} if self.cmdline is None else {"cmdline": self.cmdline}),
                "kernel_authenticode": self.kernel_authenticode,
                **normalized,
                "initrd_sha384": self.initrd_sha384,
            },
            "tdvf": {
                "ovmf": OVMF_VARIANT,
                "mrtd": {"single_pass": self.mrtd_single_pass, "two_pass": self.mrtd_two_pass},
                "td_hob": self.td_hob,
            },
        }
        return cbor2.dumps(document)

    @classmethod
    def decode(cls, data: bytes, versions: Collection[int] = MEASUREMENT_VERSIONS) -> Self:
        """Decode a document of one of the versions: any member order and unknown members are accepted.

        Trailing bytes are accepted behind version 3 alone. Hash the bytes that came, never a re-encoding. Raises
        FormatError, its text beginning with upstream's `TdxOsImageMeasurement: `.
        """
        try:
            if len(data) > MAX_DOCUMENT_SIZE:
                raise FormatError(f"at most {MAX_DOCUMENT_SIZE} bytes expected, got {len(data)}")
            stream = io.BytesIO(data)
            document = cbor2.load(stream, allow_duplicate_keys=False, strict_hashable_types=True)
            version = _member(document, "version", int)
            image = _member(document, "image", dict)
            tdvf = _member(document, "tdvf", dict)
            mrtd = _member(tdvf, "mrtd", dict)
            if (ovmf := _member(tdvf, "ovmf", str)) != OVMF_VARIANT:
                raise FormatError(f"unknown variant `{ovmf}`, expected `{OVMF_VARIANT}`")
            has_text = version == 4 and 4 in versions
            if has_text and stream.tell() != len(data):
                raise FormatError(f"{len(data) - stream.tell()} trailing bytes, expected none")
            measurement = cls(
                **_read_cmdline(image) if has_text else {"cmdline_sha384": _member(image, "cmdline_sha384", bytes)},
                kernel_authenticode=_member(image, "kernel_authenticode", bytes),
                initrd_sha384=_member(image, "initrd_sha384", bytes),
                mrtd_single_pass=_member(mrtd, "single_pass", bytes),
                mrtd_two_pass=_member(mrtd, "two_pass", bytes),
                td_hob=_member(tdvf, "td_hob", bytes),
            )
        except (cbor2.CBORDecodeError, FormatError) as error:
            raise FormatError(f"TdxOsImageMeasurement: failed to decode CBOR: {error}") from error
        if version not in versions:
            expected = " or ".join(map(str, versions))
            raise FormatError(f"TdxOsImageMeasurement: unsupported version {version}, expected {expected}")
        return measurement


def _read_cmdline(image: dict[str, object]) -> dict[str, Any]:
    """Read what version 4 has beside the members of version 3."""
    text = _member(image, "cmdline", str)
    normalized = _member(image, "kernel_header_normalized", bool) if "kernel_header_normalized" in image else False
    return {"cmdline": text, "cmdline_sha384": cmdline_sha384(text), "kernel_header_normalized": normalized}
