"""The headers of a request: names are compared without regard to case, and one name may be there several times."""

from collections.abc import Iterator, Mapping, Sequence

RawHeaders = Sequence[tuple[bytes, bytes]]
"""Names in lower case and values, in the order in which they were sent."""


class Headers(Mapping[str, str]):
    """Headers by name; the first value counts if a name is repeated, as in Rust's `http` crate.

    Values are decoded as UTF-8; bytes that are none become surrogate escapes.
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: RawHeaders) -> None:
        self._raw = raw

    def __getitem__(self, name: str) -> str:
        wanted = name.lower().encode()
        for each, value in self._raw:
            if each == wanted:
                return value.decode(errors="surrogateescape")
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        wanted = name.lower().encode() if isinstance(name, str) else b""
        return any(each == wanted for each, _ in self._raw)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(each.decode(errors="surrogateescape") for each, _ in self._raw))

    def __len__(self) -> int:
        return len({each for each, _ in self._raw})

    def get_all(self, name: str) -> list[str]:
        """Return every value of one name, in the order in which they were sent."""
        wanted = name.lower().encode()
        return [value.decode(errors="surrogateescape") for each, value in self._raw if each == wanted]
