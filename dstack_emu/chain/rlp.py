"""RLP, Ethereum's encoding of byte strings and of lists of them.

Operators' commands sign transactions without the extra `eth`, so no library for it is there; tests compare with `rlp`.

Source: Ethereum Yellow Paper, appendix B.
"""

from collections.abc import Sequence
from typing import TypeAlias

from dstack_emu.attest.errors import FormatError

Item: TypeAlias = "bytes | Sequence[Item]"

_SHORT, _STRING, _LIST = 55, 0x80, 0xC0
MAX_DEPTH = 8
"""How deep lists may be nested: an access list of a transaction has three levels."""


def encode(item: Item) -> bytes:
    """Encode a byte string or a list."""
    if isinstance(item, bytes):
        return item if len(item) == 1 and item[0] < _STRING else _head(len(item), _STRING) + item
    body = b"".join(map(encode, item))
    return _head(len(body), _LIST) + body


def number(value: int) -> bytes:
    """Return a number as RLP has it: big-endian without leading zeros, nothing for 0."""
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def decode(data: bytes) -> "Item":
    """Decode exactly one item; raise `FormatError` for anything but its shortest encoding."""
    item, end = _decode(data, 0, MAX_DEPTH)
    if end != len(data):
        raise FormatError(f"RLP: {len(data) - end} bytes follow the item")
    return item


def _head(size: int, kind: int) -> bytes:
    if size <= _SHORT:
        return bytes([kind + size])
    length = number(size)
    return bytes([kind + _SHORT + len(length)]) + length


def _decode(data: bytes, at: int, depth: int) -> "tuple[Item, int]":
    if at < len(data) and data[at] < _STRING:
        return data[at : at + 1], at + 1
    kind, start, end = _span(data, at)
    if kind == _STRING:
        if end - start == 1 and data[start] < _STRING:
            raise FormatError("RLP: a byte below 0x80 is encoded as itself")
        return data[start:end], end
    if not depth:
        raise FormatError(f"RLP: at most {MAX_DEPTH} levels of lists expected")
    members = list[Item]()
    while start < end:
        member, start = _decode(data, start, depth - 1)
        members.append(member)
    if start != end:
        raise FormatError("RLP: a member is longer than its list")
    return members, end


def _span(data: bytes, at: int) -> tuple[int, int, int]:
    """Return the kind of the item at a place, and where its content begins and ends."""
    if at >= len(data):
        raise FormatError("RLP: the data end where an item is expected")
    kind = _LIST if data[at] >= _LIST else _STRING
    size, start = data[at] - kind, at + 1
    if size > _SHORT:
        start = at + 1 + size - _SHORT
        length = data[at + 1 : start]
        size = int.from_bytes(length, "big")
        if not length or length[0] == 0 or size <= _SHORT:
            raise FormatError("RLP: a length is not in its shortest form")
    if start + size > len(data):
        raise FormatError(f"RLP: an item of {size} bytes at {at} exceeds the {len(data)} bytes there are")
    return kind, start, start + size
