"""The headers of a request: names are case-insensitive, and may be repeated."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

ROCKET_HEADERS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Permissions-Policy", "interest-cohort=()"),
)
"""What Rocket adds to every answer, and so KMS, guest agent, verifier and dstack-auth."""

RawHeaders = Sequence[tuple[bytes, bytes]]
"""Pairs of name, in lower case, and value, in the order in which they were sent."""


class Headers(Mapping[str, str]):
    """Headers by name; the first value counts if a name is repeated, as in Rust's `http` crate.

    Values are decoded as UTF-8; invalid bytes become surrogate escapes.
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: RawHeaders) -> None:
        self._raw = raw

    def __getitem__(self, name: str) -> str:
        key = name.lower().encode()
        for each, value in self._raw:
            if each == key:
                return value.decode(errors="surrogateescape")
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        key = name.lower().encode() if isinstance(name, str) else b""
        return any(each == key for each, _ in self._raw)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(each.decode(errors="surrogateescape") for each, _ in self._raw))

    def __len__(self) -> int:
        return len({each for each, _ in self._raw})

    def get_all(self, name: str) -> list[str]:
        """Return every value of one name, in the order in which they were sent."""
        key = name.lower().encode()
        return [value.decode(errors="surrogateescape") for each, value in self._raw if each == key]
