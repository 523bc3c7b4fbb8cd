"""Bytes that an input has as text."""

import base64
import binascii


def from_hex(text: str) -> bytes:
    """Decode hex, with 0x before it or not; return no bytes for what is none."""
    try:
        return binascii.unhexlify(text[2:] if text[:2] in ("0x", "0X") else text)
    except ValueError:
        return b""


def from_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, padded or not; return no bytes for what is none."""
    body = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except ValueError:
        return b""


def as_utf8(text: str) -> bytes:
    """Encode a text of JSON, whose escapes can spell half of a surrogate pair: a `?` replaces that."""
    return text.encode(errors="replace")
