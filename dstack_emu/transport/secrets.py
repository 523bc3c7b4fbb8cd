"""Secrets that no log, error or archive may show, found by their value in any text.

A program that was sent a token may repeat it: in an error, in JSON inside JSON, in a URL, or as the header that it got.
"""

import base64
import binascii
import re
from typing import Any, Final

REDACTED: Final = "(a secret was here)"
SHORTEST_LINE: Final = 24
"""Lines of a longer secret, such as a PEM file, are secrets of their own from this length on."""
_BASE64: Final = "[A-Za-z0-9+/_-]{0,2}"
_SLASHES: Final = r"\\{1,15}"
"""The backslashes of JSON within JSON, up to four times."""
_SHORT_ESCAPES: Final = {"\n": "n", "\r": "r", "\t": "t"}


class Secrets:
    """Known secrets. `redact` replaces each of them as it is, base64, percent-encoded or escaped as in JSON."""

    def __init__(self, *values: str) -> None:
        self._known: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        for value in values:
            self.learn(value)

    def learn(self, value: str) -> None:
        """Add a secret; an empty one is none."""
        for each in (value, *(line for line in value.split("\n") if len(line) >= SHORTEST_LINE and line != value)):
            if each.strip() and each not in self._known and not each.startswith("-----"):
                self._known.add(each)
                self._patterns.append(re.compile("|".join((_spelled(each), *_in_base64(each.encode())))))

    def redact(self, text: str) -> str:
        """Return a text without any of the secrets."""
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        return text

    def redact_all(self, value: Any) -> Any:
        """Return a JSON value without any of the secrets, in names and values."""
        if isinstance(value, dict):
            return {self.redact(name): self.redact_all(child) for name, child in value.items()}
        if isinstance(value, list):
            return [self.redact_all(child) for child in value]
        return self.redact(value) if isinstance(value, str) else value


def require_token(text: str, name: str) -> str:
    """Return a token that a header can hold: printable ASCII. Raises `ValueError`, which does not show it."""
    if not (text.isascii() and text.isprintable()):
        raise ValueError(f"{name}: printable ASCII characters expected, got others")
    return text


def _spelled(secret: str) -> str:
    r"""Return a pattern for a text, each character as it is, as %41, as A, or after up to 15 backslashes."""
    return "".join(map(_character, secret))


def _character(character: str) -> str:
    percent = "".join(f"%{byte:02x}" for byte in character.encode(errors="surrogateescape"))
    units = character.encode("utf-16-be", errors="surrogatepass")
    escaped = "".join(rf"{_SLASHES}u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
    plus = r"|\+" if character == " " else ""
    short = rf"|{_SLASHES}{_SHORT_ESCAPES[character]}" if character in _SHORT_ESCAPES else ""
    slashes = _SLASHES if character == "\\" else rf"(?:{_SLASHES})?{re.escape(character)}"
    return f"(?:{slashes}|(?i:{percent}|{escaped}){plus}{short})"


def _in_base64(secret: bytes) -> list[str]:
    """Return patterns for a secret within base64, wherever it begins in what was encoded.

    Its last and first digits may also encode what is beside it; they belong to the pattern.
    """
    found = []
    for before in range(3):
        encoded = binascii.b2a_base64(bytes(before) + secret, newline=False).decode()
        core = encoded[(0, 2, 3)[before] : (before + len(secret)) * 8 // 6]
        if len(core) >= len(base64.b64encode(b"xyz")):
            either = core.replace("+", "[+-]").replace("/", "[/_]")
            found.append(f"{_BASE64}{either}{_BASE64}={{0,2}}")
    return found
