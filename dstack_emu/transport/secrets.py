"""Secrets that no log, error or archive may show, found by their value in any text.

A program that was sent a token may repeat it: in an error, in JSON inside JSON, in a URL, or as the header that it got.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Final, Self

REDACTED: Final = "(a secret was here)"
SHORTEST_LINE: Final = 24
"""Lines of a longer secret, such as a PEM file, are secrets of their own from this length on."""
_BASE64: Final = "[A-Za-z0-9+/_-]{0,2}"
_SLASHES: Final = r"\\\\{0,14}"
"""The backslashes of JSON within JSON, up to four times."""
_SHORT_ESCAPES: Final = {"\n": "n", "\r": "r", "\t": "t"}


@dataclass(frozen=True, slots=True)
class _Secret:
    """A secret: a pattern for it as text, one for it as text or in base64, and digits one of which its base64 has."""

    text: re.Pattern[str]
    text_or_base64: re.Pattern[str]
    digits: tuple[str, ...]

    @classmethod
    def of(cls, value: str) -> Self:
        text, digits = _spelled(value), _in_base64(value.encode())
        return cls(re.compile(text), re.compile("|".join((text, *map(_with_neighbours, digits)))), tuple(digits))


class Secrets:
    """Known secrets. `redact` replaces each of them as it is, base64, percent-encoded or escaped as in JSON."""

    def __init__(self, *values: str) -> None:
        self._known: dict[str, _Secret] = {}
        for value in values:
            self.learn(value)

    def learn(self, value: str) -> None:
        """Add a secret; an empty one is none."""
        for each in (value, *(line for line in value.split("\n") if len(line) >= SHORTEST_LINE and line != value)):
            if each.strip() and each not in self._known and not each.startswith("-----"):
                self._known[each] = _Secret.of(each)

    def redact(self, text: str) -> str:
        """Return a text without any of the secrets."""
        for secret in self._known.values():
            standard = text.replace("-", "+").replace("_", "/")  # quick to search, unlike the pattern for base64
            is_in_base64 = any(digits in standard for digits in secret.digits)
            text = (secret.text_or_base64 if is_in_base64 else secret.text).sub(REDACTED, text)
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
    r"""Return a pattern for a text, each character as it is, as %41, as \u0041, or after up to 15 backslashes."""
    return "".join(map(_character, secret))


def _character(character: str) -> str:
    """Return a pattern whose alternatives begin with a literal each: `re` skips quickly what begins with none."""
    percent = "".join(f"%{_hex(byte)}" for byte in character.encode(errors="surrogateescape"))
    units = character.encode("utf-16-be", errors="surrogatepass")
    escaped = "".join(f"{_SLASHES}[uU]{_hex(*units[at : at + 2])}" for at in range(0, len(units), 2))
    ways = [_SLASHES] if character == "\\" else [re.escape(character), _SLASHES + re.escape(character)]
    ways += [percent, escaped]
    ways += [r"\+"] if character == " " else []
    ways += [_SLASHES + _SHORT_ESCAPES[character]] if character in _SHORT_ESCAPES else []
    return f"(?:{'|'.join(ways)})"


def _hex(*values: int) -> str:
    """Return a pattern for bytes in hex, in either case."""
    return "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in bytes(values).hex())


def _in_base64(secret: bytes) -> list[str]:
    """Return the digits that are within base64 of the secret, one text for each place where it may begin."""
    found = []
    for before in range(3):
        encoded = binascii.b2a_base64(bytes(before) + secret, newline=False).decode()
        digits = encoded[(0, 2, 3)[before] : (before + len(secret)) * 8 // 6]
        if len(digits) >= len(base64.b64encode(b"xyz")):
            found.append(digits)
    return found


def _with_neighbours(digits: str) -> str:
    """Return a pattern for such digits in either alphabet, with those beside them that may encode the secret, too."""
    either = digits.replace("+", "[+-]").replace("/", "[/_]")
    return f"{_BASE64}{either}{_BASE64}={{0,2}}"
