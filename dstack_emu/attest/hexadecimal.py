"""Hex text as most of dstack's parsers read it: digits of either case, with a leading 0x or without, no blanks.

Formats with rules of their own have readers of their own: a pRPC field (every leading 0x is dropped, and the wrong
digit is named), an event log and a request to the verifier (no 0x).
"""

import binascii


def decode_hex(text: str) -> bytes:
    """Decode hex; raise `ValueError` on an odd number of digits or another character."""
    return binascii.unhexlify(text.removeprefix("0x"))
