"""Semantic versions, and the requirements on them that `requirements.os_version` of an app-compose is written in.

The grammar and the meaning of a requirement are those of Rust's crate `semver` 1 (Cargo's): comparators joined by
commas, a bare version means `^`, and a pre-release satisfies a requirement only if one of its comparators names a
pre-release of the same major, minor and patch.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal, Self

from dstack_emu.attest.errors import FormatError

MAX_COMPARATORS: Final = 32

Operator = Literal["=", ">", ">=", "<", "<=", "~", "^", ""]
"""The empty one is a wildcard's: `1.*`."""

_NUMBER: Final = r"(?:0|[1-9][0-9]{0,19})"
_PRE: Final = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_TAIL: Final = rf"(?:-(?P<pre>{_PRE}(?:\.{_PRE})*))?(?:\+(?P<build>[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?"
_VERSION: Final = re.compile(rf"(?P<major>{_NUMBER})\.(?P<minor>{_NUMBER})\.(?P<patch>{_NUMBER}){_TAIL}")
_COMPARATOR: Final = re.compile(
    rf"(?P<op>>=|<=|[=><~^]?) *(?P<major>{_NUMBER})"
    rf"(?:\.(?:(?P<minor>{_NUMBER})(?:\.(?:(?P<patch>{_NUMBER}){_TAIL}|(?P<wild_patch>[*xX])))?|(?P<wild>[*xX](?:\.[*xX])?)))?"
)

_PreKey = tuple[bool, tuple[tuple[bool, int, str], ...]]


@dataclass(frozen=True, slots=True)
class Version:
    """A version: three numbers, and texts of pre-release and build, which may be empty."""

    major: int
    minor: int
    patch: int
    pre: str = ""
    build: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `major.minor.patch[-pre][+build]`; raise `FormatError`."""
        found = _VERSION.fullmatch(text)
        if found is None:
            raise FormatError(f"semantic version expected, got {text!r:.40}")
        major, minor, patch = (int(found[name]) for name in ("major", "minor", "patch"))
        return cls(major, minor, patch, found["pre"] or "", found["build"] or "")

    def __str__(self) -> str:
        pre, build = self.pre and f"-{self.pre}", self.build and f"+{self.build}"
        return f"{self.major}.{self.minor}.{self.patch}{pre}{build}"


@dataclass(frozen=True, slots=True)
class Comparator:
    """One condition on a version; what it leaves open is None."""

    operator: Operator
    major: int
    minor: int | None = None
    patch: int | None = None
    pre: str = ""

    def __str__(self) -> str:
        numbers = ".".join(str(number) for number in (self.major, self.minor, self.patch) if number is not None)
        wildcard = ".*" if self.operator == "" else ""
        return f"{self.operator}{numbers}{wildcard}{self.pre and f'-{self.pre}'}"

    def admits(self, version: Version) -> bool:
        """Return whether a version fulfils it, pre-releases compared like all others."""
        order = self._order(version)
        if order == 0 and self.patch is None and version.pre and self.operator not in ("^", ">", "<"):
            return False  # an open comparator means versions that are no pre-releases
        match self.operator:
            case "=" | "":
                return order == 0
            case ">":
                return order > 0
            case ">=":
                return order >= 0
            case "<":
                return order < 0
            case "<=":
                return order <= 0
            case "~":
                return order >= 0 and self._agrees(version, 2)
            case "^":
                return order >= 0 and self._agrees(version, self._caret_depth())

    def names_pre_release_of(self, version: Version) -> bool:
        """Return whether it names a pre-release of this version's three numbers."""
        named = self.major, self.minor, self.patch
        return bool(self.pre) and named == (version.major, version.minor, version.patch)

    def _order(self, version: Version) -> int:
        """Compare a version with this one, as far as this one goes: negative if it is below, 0 if it agrees."""
        for ours, theirs in zip(self._numbers(), (version.major, version.minor, version.patch), strict=False):
            if ours != theirs:
                return 1 if theirs > ours else -1
        if self.patch is None:
            return 0
        theirs_pre, ours_pre = _pre_key(version.pre), _pre_key(self.pre)
        return (theirs_pre > ours_pre) - (theirs_pre < ours_pre)

    def _numbers(self) -> tuple[int, ...]:
        return tuple(number for number in (self.major, self.minor, self.patch) if number is not None)

    def _agrees(self, version: Version, depth: int) -> bool:
        ours = self._numbers()[:depth]
        return ours == (version.major, version.minor, version.patch)[: len(ours)]

    def _caret_depth(self) -> int:
        """Return how many numbers `^` holds fast: up to the first that is not zero."""
        return next((at for at, number in enumerate(self._numbers(), 1) if number), 3)


@dataclass(frozen=True, slots=True)
class VersionRequirement:
    """Comparators that all have to hold; none at all is `*`, any version that is no pre-release."""

    comparators: tuple[Comparator, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a requirement such as `>=0.6.0, <0.7`; raise `FormatError`."""
        stripped = text.strip(" ")
        if stripped in ("*", "x", "X"):
            return cls(())
        pieces = stripped.split(",")
        if len(pieces) > MAX_COMPARATORS:
            raise FormatError("excessive number of version comparators")
        return cls(tuple(_parse_comparator(piece.strip(" ")) for piece in pieces))

    def __str__(self) -> str:
        return ", ".join(map(str, self.comparators)) or "*"

    def admits(self, version: Version) -> bool:
        """Return whether a version fulfils the requirement."""
        if not all(comparator.admits(version) for comparator in self.comparators):
            return False
        return not version.pre or any(each.names_pre_release_of(version) for each in self.comparators)


def _parse_comparator(text: str) -> Comparator:
    found = _COMPARATOR.fullmatch(text)
    if found is None:
        raise FormatError(f"version comparator expected, got {text!r:.40}")
    is_wildcard = found["wild"] or found["wild_patch"]
    operator: Operator = found["op"] or ("" if is_wildcard else "^")  # type: ignore[assignment]  # the pattern's choices
    minor, patch = (None if found[name] is None else int(found[name]) for name in ("minor", "patch"))
    return Comparator(operator, int(found["major"]), minor, patch, found["pre"] or "")


def _pre_key(pre: str) -> _PreKey:
    """Order pre-releases: none is above any, numbers are below words, and more identifiers are above fewer."""
    identifiers = pre.split(".") if pre else []
    key = tuple((not each.isdigit(), int(each) if each.isdigit() else 0, each) for each in identifiers)
    return not pre, key
