"""Ethereum addresses: their text, of which the case of the letters is a checksum.

Source: EIP-55. Text in lowercase has no checksum, and is accepted.
"""

import re
from typing import Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.keccak import keccak

ADDRESS_SIZE: Final = 20
"""Bytes."""
_TEXT: Final = re.compile(r"0x[0-9a-fA-F]{40}")


def encode_address(address: bytes) -> str:
    """Return the text of 20 bytes: `0x` and 40 digits, letters upper-case where the checksum has a high bit."""
    digits = address.hex()
    if digits.isdecimal():
        return f"0x{digits}"
    marks = keccak(digits.encode()).hex()
    spelt = (digit.upper() if mark >= "8" else digit for digit, mark in zip(digits, marks, strict=False))
    return "0x" + "".join(spelt)


def decode_address(text: str) -> bytes:
    """Return the 20 bytes of a text; raise `FormatError` if it is no address, or its checksum is wrong.

    As viem, which upstream decodes with: letters are all in lowercase, or have the checksum.
    """
    if not _TEXT.fullmatch(text):
        raise FormatError(f"an address expected, 0x and 40 hex digits, got {text!r:.80}")
    address = bytes.fromhex(text[2:])
    if text != text.lower() and text != encode_address(address):
        raise FormatError(f"the address {text} has a wrong checksum; expected {encode_address(address)}, or lowercase")
    return address
