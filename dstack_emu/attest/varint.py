"""Unsigned LEB128: seven bits a byte, the lowest first; all bytes but the last have their high bit set.

Protobuf's varints and the numbers of a TD HOB witness are written so.
"""

MAX_BYTES = 10
"""The most that 64 bits take."""


def encode_varint(number: int) -> bytes:
    """Encode a number that is not negative in as few bytes as it takes."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Read the number of at most 64 bits that begins at `at`; return it and where it ends.

    Raises `EOFError` if there is no last byte before `end`, `OverflowError` if the number is longer than 64 bits.
    """
    value = 0
    for shift in range(0, 7 * MAX_BYTES, 7):
        if at >= end:
            raise EOFError
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise OverflowError
            return value, at
    raise OverflowError
