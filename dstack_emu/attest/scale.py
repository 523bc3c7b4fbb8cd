"""The part of the SCALE codec that dstack's V0 attestations and CSRs use.

Compact lengths, little-endian u32 and u64, byte vectors, UTF-8 strings, options, vectors. Source of the format:
parity-scale-codec's specification; what is encoded with it: dstack `dstack-attest/src/attestation.rs` and
`ra-tls/src/cert.rs` at 312dc605. Decoding never allocates more than the input it was given.
"""

from collections.abc import Callable
from typing import TypeVar

from dstack_emu.attest.errors import FormatError

T = TypeVar("T")


def compact(value: int) -> bytes:
    """Encode a length in SCALE's compact form (1, 2 or 4 bytes; enough for anything that fits in memory here)."""
    if value < 1 << 6:
        return bytes((value << 2,))
    if value < 1 << 14:
        return (value << 2 | 1).to_bytes(2, "little")
    if value < 1 << 30:
        return (value << 2 | 2).to_bytes(4, "little")
    raise FormatError(f"SCALE: a length below 2^30 expected, got {value}")


def vec(data: bytes) -> bytes:
    """Encode a byte vector: compact length and bytes."""
    return compact(len(data)) + data


def text(value: str) -> bytes:
    """Encode a string as the vector of its UTF-8 bytes."""
    return vec(value.encode())


def option(value: bytes | None) -> bytes:
    """Encode an option whose content is encoded already."""
    return b"\x00" if value is None else b"\x01" + value


class Decoder:
    """Exact reads from SCALE bytes; every refusal names what was being read."""

    __slots__ = ("data", "offset")

    def __init__(self, data: bytes) -> None:
        self.data, self.offset = data, 0

    def take(self, size: int, what: str) -> bytes:
        """Read `size` bytes."""
        end = self.offset + size
        if end > len(self.data):
            raise FormatError(
                f"{what}: {size} bytes expected at offset {self.offset}, got {len(self.data) - self.offset}"
            )
        piece = self.data[self.offset : end]
        self.offset = end
        return piece

    def rest(self) -> bytes:
        """Read all that is left."""
        return self.take(len(self.data) - self.offset, "rest")

    def u32(self, what: str) -> int:
        """Read a little-endian u32."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """Read a little-endian u64."""
        return int.from_bytes(self.take(8, what), "little")

    def compact(self, what: str) -> int:
        """Read a compact length; a longer form than needed is refused, as by the original decoder."""
        first = self.take(1, what)[0]
        mode = first & 3
        if mode == 0:
            return first >> 2
        if mode == 3:
            raise FormatError(f"{what}: a length below 2^30 expected, got SCALE's big form")
        size = 2 if mode == 1 else 4
        value = int.from_bytes(bytes((first,)) + self.take(size - 1, what), "little") >> 2
        if value < (1 << 6 if size == 2 else 1 << 14):
            raise FormatError(f"{what}: out of range decoding Compact<u32>")
        return value

    def vec(self, what: str) -> bytes:
        """Read a byte vector."""
        return self.take(self.compact(what), what)

    def text(self, what: str) -> str:
        """Read a UTF-8 string."""
        try:
            return self.vec(what).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{what}: UTF-8 expected ({error.reason} at byte {error.start})") from error

    def boolean(self, what: str) -> bool:
        """Read a bool: 0 or 1."""
        value = self.take(1, what)[0]
        if value > 1:
            raise FormatError(f"{what}: bool expected, got byte {value}")
        return value == 1

    def option(self, read: Callable[[str], T], what: str) -> T | None:
        """Read an option by the given reader."""
        return read(what) if self.boolean(what) else None

    def many(self, read: Callable[[], T], what: str, most: int) -> tuple[T, ...]:
        """Read a vector of at most `most` items, each by the given reader."""
        count = self.compact(what)
        if count > most:
            raise FormatError(f"{what}: at most {most} expected, got {count}")
        return tuple(read() for _ in range(count))
