"""Hex text as most of dstack's parsers accept it: digits of either case, with or without a leading 0x, no blanks.

Formats with other rules have their own parsers: pRPC fields (every leading 0x is removed, and an error names the wrong
digit), event logs and requests to the verifier (no 0x).
"""

import binascii


def decode_hex(text: str) -> bytes:
    """Decode hex; raise `ValueError` on an odd number of digits or another character."""
    return binascii.unhexlify(text.removeprefix("0x"))
