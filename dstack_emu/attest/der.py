"""The part of DER that the protocol needs in addition to X.509: the PCK extension and the RA-TLS extensions.

`cryptography` encodes and parses certificates and CRLs; this module has the few primitive types in their custom
extensions. Lengths are definite, as DER requires (X.690 section 10.1).
"""

from dstack_emu.attest.errors import FormatError

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID, ENUMERATED, SEQUENCE = 0x01, 0x02, 0x03, 0x04, 0x06, 0x0A, 0x30


def tlv(tag: int, content: bytes) -> bytes:
    """Encode one element: tag, definite length, content."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def octet_string(content: bytes) -> bytes:
    """Encode an OCTET STRING."""
    return tlv(OCTET_STRING, content)


def sequence(*elements: bytes) -> bytes:
    """Encode a SEQUENCE of elements that are DER already."""
    return tlv(SEQUENCE, b"".join(elements))


def integer(value: int, tag: int = INTEGER) -> bytes:
    """Encode a non-negative INTEGER (or ENUMERATED) in the fewest bytes."""
    return tlv(tag, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def boolean(value: bool) -> bytes:
    """Encode a BOOLEAN."""
    return tlv(BOOLEAN, b"\xff" if value else b"\x00")


def oid(dotted: str) -> bytes:
    """Encode an OBJECT IDENTIFIER from its dotted form."""
    first, second, *rest = (int(part) for part in dotted.split("."))
    out = bytearray()
    for arc in (first * 40 + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | arc & 0x7F)
        out += bytes(reversed(groups))
    return tlv(OID, bytes(out))


def read(data: bytes, tag: int, what: str) -> tuple[bytes, bytes]:
    """Parse one element with the given tag; return its content and the bytes after it.

    Raises `FormatError`, which names `what`, if the tag differs, the length is indefinite or the content is truncated.
    """
    if data and data[0] != tag:
        raise FormatError(f"{what}: DER tag {tag:#04x} expected, got {data[0]:#04x}")
    start, end = span(data, 0, what)
    return data[start:end], data[end:]


def span(data: bytes, offset: int, what: str) -> tuple[int, int]:
    """Return the start and end of the content of the element at an offset; raise `FormatError` as `read` does."""
    if len(data) < offset + 2:
        raise FormatError(f"{what}: DER element expected, got {len(data) - offset} bytes")
    size, start = data[offset + 1], offset + 2
    if size & 0x80:
        count = size & 0x7F
        if not 1 <= count <= 4 or len(data) < start + count:
            raise FormatError(f"{what}: definite DER length of at most 4 bytes expected, got first byte {size:#04x}")
        start, size = start + count, int.from_bytes(data[start : start + count], "big")
        if size < 0x80 or size.bit_length() <= 8 * (count - 1):
            raise FormatError(f"{what}: the shortest form of a DER length expected, got {size} in {count} bytes")
    if len(data) < start + size:
        raise FormatError(f"{what}: {size} bytes of content announced, {len(data) - start} present")
    return start, start + size


def read_octet_string(data: bytes, what: str) -> bytes:
    """Parse an OCTET STRING without bytes after it; raise `FormatError`."""
    content, rest = read(data, OCTET_STRING, what)
    if rest:
        raise FormatError(f"{what}: {len(rest)} bytes after the OCTET STRING")
    return content
