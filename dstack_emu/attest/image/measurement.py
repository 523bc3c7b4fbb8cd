"""`measurement.tdx.cbor`: what an image brings to the registers of every TD it boots in."""

from dataclasses import dataclass
from typing import Final, Self, TypeVar

import cbor2

from dstack_emu.attest.errors import FormatError

MEASUREMENT_VERSION: Final = 3
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
    """The measurement document.

    The digests are 48 bytes each and td_hob is an encoded TdHobWitness, but neither is checked before
    `measure` needs it, as upstream. kernel_authenticode is of the kernel as patched for 2 GiB, or for 2.75
    GiB and more.
    """

    cmdline_sha384: bytes
    kernel_authenticode: bytes
    initrd_sha384: bytes
    mrtd_single_pass: bytes
    mrtd_two_pass: bytes
    td_hob: bytes

    def encode(self) -> bytes:
        """Encode as upstream's image build does: definite lengths, this order (not CBOR's canonical one)."""
        document = {
            "version": MEASUREMENT_VERSION,
            "image": {
                "cmdline_sha384": self.cmdline_sha384,
                "kernel_authenticode": self.kernel_authenticode,
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
    def decode(cls, data: bytes) -> Self:
        """Decode a document: any member order, unknown members and trailing bytes are accepted.

        Hash the bytes that came, never a re-encoding. Raises FormatError, its text beginning with upstream's
        `TdxOsImageMeasurement: `.
        """
        try:
            if len(data) > MAX_DOCUMENT_SIZE:
                raise FormatError(f"at most {MAX_DOCUMENT_SIZE} bytes expected, got {len(data)}")
            document = cbor2.loads(data, allow_duplicate_keys=False, strict_hashable_types=True)
            version = _member(document, "version", int)
            image = _member(document, "image", dict)
            tdvf = _member(document, "tdvf", dict)
            mrtd = _member(tdvf, "mrtd", dict)
            if (ovmf := _member(tdvf, "ovmf", str)) != OVMF_VARIANT:
                raise FormatError(f"unknown variant `{ovmf}`, expected `{OVMF_VARIANT}`")
            measurement = cls(
                cmdline_sha384=_member(image, "cmdline_sha384", bytes),
                kernel_authenticode=_member(image, "kernel_authenticode", bytes),
                initrd_sha384=_member(image, "initrd_sha384", bytes),
                mrtd_single_pass=_member(mrtd, "single_pass", bytes),
                mrtd_two_pass=_member(mrtd, "two_pass", bytes),
                td_hob=_member(tdvf, "td_hob", bytes),
            )
        except (cbor2.CBORDecodeError, FormatError) as error:
            raise FormatError(f"TdxOsImageMeasurement: failed to decode CBOR: {error}") from error
        if version != MEASUREMENT_VERSION:
            raise FormatError(f"TdxOsImageMeasurement: unsupported version {version}, expected {MEASUREMENT_VERSION}")
        return measurement
