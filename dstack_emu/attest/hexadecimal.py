"""Hex text as most of dstack's parsers read it: digits of either case, with 0x in front or without, no blanks.

Formats with rules of their own read theirs themselves: a pRPC field (every 0x in front is dropped, and the wrong digit
is named), an event log (no 0x).
"""

import binascii


def decode_hex(text: str) -> bytes:
    """Decode hex; raise `ValueError` on an odd number of digits or another character."""
    return binascii.unhexlify(text.removeprefix("0x"))
