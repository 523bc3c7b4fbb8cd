"""Mutations of bytes from a seed, and stretched inputs, whose cost is to grow no faster than their size."""

from collections.abc import Sequence
from random import Random
from typing import Final

_PIECES: Final = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\xff\xff\xff\xff",
    b'"',
    b"[",
    b"{",
    b"\xc1",
    b"\r\n",
    b"%",
    b"-1",
    b"1e999",
)
_SIZES: Final = (1, 2, 4, 16, 64, 1000)


def mutated(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """Change bytes in one to four places; `others` may lend pieces."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(data))
        end = min(len(data), at + chance.choice(_SIZES))
        match chance.randrange(8):
            case 0 if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
            case 1:
                piece = chance.choice(_PIECES)
                data = data[:at] + piece + data[at + len(piece) :]
            case 2:
                data = data[:at] + data[end:]
            case 3 if not chance.randrange(4):
                data = data[:at]
            case 4:
                data = data[:at] + chance.randbytes(chance.randint(1, 8)) + data[at:]
            case 5:
                data = data[:end] + data[at:]
            case 6:
                data = data[:at] + chance.choice(_PIECES) + data[at:]
            case _:
                other = chance.choice(others)
                begin = chance.randint(0, len(other))
                data = data[:at] + other[begin : begin + end - at] + data[end:]
    return data


def stretched(data: bytes, chance: Random) -> tuple[bytes, bytes, bytes]:
    """Choose a piece of an input to be repeated: what is before it, the piece, and what is after it.

    Two pieces in three reach from one delimiter to the next of its kind, so that a list has many members.
    """
    at = chance.randrange(len(data)) if data else 0
    if chance.randrange(3) and data:
        end = data.find(data[at : at + 1], at + 1)
        if 0 < end - at < 4096:
            return data[:at], data[at:end], data[end:]
    size = chance.choice((1, 1, 2, 3, 8, 40))
    return data[:at], data[at : at + size] or b"[", data[at + size :]
