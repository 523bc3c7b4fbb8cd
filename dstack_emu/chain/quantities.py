"""Values of JSON-RPC: numbers and bytes as text with 0x, and the parameters that clients send."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.attest.keccak import keccak
from dstack_emu.chain.errors import InvalidParamsError

_QUANTITY: Final = re.compile(r"0x[0-9a-fA-F]{1,64}")
_DATA: Final = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
MAX_DATA: Final = 256 * 1024
"""Bytes of a call's data; the gas of a block does not pay for more."""
MAX_NUMBER: Final = 2**53
"""The largest number that every client can write in JSON; times and counts are smaller."""


def quantity(value: int) -> str:
    """Return a number as JSON-RPC has it, without leading zeros."""
    return hex(value)


def data(value: bytes) -> str:
    """Return bytes as JSON-RPC has them."""
    return "0x" + value.hex()


def checksummed(address: bytes) -> str:
    """Return an address in the spelling with a checksum in its capitals (EIP-55)."""
    text = address.hex()
    digest = keccak(text.encode()).hex()
    return "0x" + "".join(c.upper() if int(digest[place], 16) >= 8 else c for place, c in enumerate(text))


def parse_quantity(value: object, name: str) -> int:
    """Read a number; raise `InvalidParamsError`, which names the parameter."""
    if isinstance(value, str) and _QUANTITY.fullmatch(value):
        return int(value, 16)
    raise InvalidParamsError(f"{name}: a number in hex, such as 0x1f, expected, got {value!r:.80}")


def parse_number(value: object, name: str, most: int = MAX_NUMBER) -> int:
    """Read a number as the methods for tests take it: in hex, or a JSON number of at least 0."""
    number = value if isinstance(value, int) and not isinstance(value, bool) else parse_quantity(value, name)
    if not 0 <= number <= most:
        raise InvalidParamsError(f"{name}: a number of 0 to {most} expected, got {number}")
    return number


def parse_data(value: object, name: str, size: int | None = None) -> bytes:
    """Read bytes, of one size if it is given; raise `InvalidParamsError`."""
    if not isinstance(value, str) or len(value) > 2 * MAX_DATA + 2 or not _DATA.fullmatch(value):
        wanted = f"of at most {MAX_DATA}" if size is None else f"of {size}"
        raise InvalidParamsError(f"{name}: hex with 0x, {wanted} bytes, expected, got {value!r:.80}")
    found = bytes.fromhex(value[2:])
    if size is not None and len(found) != size:
        raise InvalidParamsError(f"{name}: {size} bytes expected, got {len(found)}")
    return found


def parse_address(value: object, name: str) -> bytes:
    """Read an address of 20 bytes."""
    return parse_data(value, name, 20)


def parse_hash(value: object, name: str) -> bytes:
    """Read a hash of 32 bytes."""
    return parse_data(value, name, 32)


@dataclass(frozen=True, slots=True)
class Params:
    """The parameters of a request, by their place."""

    values: tuple[Any, ...]

    @classmethod
    def of(cls, value: object) -> "Params":
        """Read the member `params`: a list, or nothing."""
        if value is None:
            return cls(())
        if not isinstance(value, list):
            raise InvalidParamsError("params: a list expected")
        return cls(tuple(value))

    def get(self, place: int, default: object = None) -> Any:
        """Return a parameter, or the default if it was not sent or is null."""
        found = self.values[place] if place < len(self.values) else None
        return default if found is None else found

    def number(self, place: int, name: str, default: int | None = None) -> int:
        """Return a number."""
        value = self.get(place)
        return default if value is None and default is not None else parse_number(value, name)

    def address(self, place: int = 0) -> bytes:
        """Return an address."""
        return parse_address(self.get(place), "address")

    def hash(self, place: int = 0) -> bytes:
        """Return a hash."""
        return parse_hash(self.get(place), "hash")

    def members(self, place: int, name: str) -> Mapping[str, Any]:
        """Return an object."""
        value = self.get(place)
        if not isinstance(value, dict):
            raise InvalidParamsError(f"{name}: an object expected, got {value!r:.80}")
        return value
