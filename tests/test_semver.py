"""Semantic versions and requirements as Rust's `semver` reads them; the cases are those of its documentation."""

import itertools

import pytest

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.semver import Version, VersionRequirement


@pytest.mark.parametrize("text", ["0.6.0", "1.0.0-alpha.1", "1.0.0-0.3.7+build.5", "10.20.30+001"])
def test_version_is_written_as_it_was_read(text: str) -> None:
    assert str(Version.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "1", "0.6", "v0.6.0", "0.6.0.1", "01.6.0", "0.6.0-", "0.6.0-01", " 0.6.0", "0.6.x"]
)
def test_text_that_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="^semantic version expected, got "):
        Version.parse(text)


@pytest.mark.parametrize(
    ("requirement", "shown"),
    [
        (">=0.6.0", ">=0.6.0"),
        (">= 0.6.0 , <0.7", ">=0.6.0, <0.7"),
        ("0.6", "^0.6"),
        ("1", "^1"),
        ("~1.2.3-rc.1", "~1.2.3-rc.1"),
        ("=1.2.3+build", "=1.2.3"),
        ("1.*", "1.*"),
        ("1.2.x", "1.2.*"),
        ("1.*.*", "1.*"),
        (">=1.*", ">=1"),
        ("*", "*"),
    ],
)
def test_requirement_is_written_in_its_own_form(requirement: str, shown: str) -> None:
    assert str(VersionRequirement.parse(requirement)) == shown


@pytest.mark.parametrize(
    "requirement",
    [
        "",
        "not-semver",
        ">=0.6.0,",
        ">=0.6.0 <0.7",
        "0.6.0.1",
        "01.0",
        ">=*",
        "*, 1",
        "1.*.3",
        "=>1",
        ",".join(["1"] * 33),
    ],
)
def test_text_that_is_no_requirement_is_refused(requirement: str) -> None:
    with pytest.raises(FormatError, match="version comparator"):
        VersionRequirement.parse(requirement)


@pytest.mark.parametrize(
    ("requirement", "admitted", "refused"),
    [
        ("=1.2.3", ["1.2.3", "1.2.3+build"], ["1.2.4", "1.2.3-rc"]),
        ("=1.2", ["1.2.0", "1.2.9"], ["1.3.0", "1.2.0-rc"]),
        (">1.2.3", ["1.2.4", "2.0.0"], ["1.2.3", "1.2.3-rc", "1.2.4-rc"]),
        (">1.2", ["1.3.0"], ["1.2.9", "1.1.0"]),
        (">=0.6.0", ["0.6.0", "0.6.1", "1.0.0"], ["0.5.11", "0.6.0-rc1", "0.7.0-rc1"]),
        (">=0.6.0-rc1", ["0.6.0-rc1", "0.6.0-rc5", "0.6.0", "0.6.1"], ["0.6.0-beta", "0.6.1-rc1"]),
        (">=0.6.0, <0.7.0", ["0.6.0", "0.6.9"], ["0.5.0", "0.7.0", "0.7.0-rc1"]),
        (">=1.2, <=1.2.3-beta", [], ["1.2.3-alpha"]),
        ("<1.2", ["1.1.9", "0.1.0"], ["1.2.0", "1.2.1"]),
        ("<=1.2", ["1.2.9", "1.1.0"], ["1.3.0"]),
        ("~1.2.3", ["1.2.3", "1.2.9"], ["1.3.0", "1.2.2"]),
        ("~1.2", ["1.2.0", "1.2.9"], ["1.3.0", "1.1.0"]),
        ("~1", ["1.0.0", "1.9.0"], ["2.0.0"]),
        ("1.2.3", ["1.2.3", "1.9.0"], ["1.2.2", "2.0.0"]),
        ("0.2.3", ["0.2.3", "0.2.9"], ["0.2.2", "0.3.0"]),
        ("0.0.3", ["0.0.3"], ["0.0.4", "0.0.2"]),
        ("0.0", ["0.0.0", "0.0.9"], ["0.1.0"]),
        ("0", ["0.0.0", "0.9.0"], ["1.0.0"]),
        ("1.*", ["1.0.0", "1.9.9"], ["2.0.0", "1.0.0-rc"]),
        ("*", ["0.0.1", "9.9.9"], ["1.0.0-rc"]),
    ],
)
def test_requirement_admits(requirement: str, admitted: list[str], refused: list[str]) -> None:
    parsed = VersionRequirement.parse(requirement)
    assert [text for text in admitted if not parsed.admits(Version.parse(text))] == []
    assert [text for text in refused if parsed.admits(Version.parse(text))] == []


def test_pre_releases_are_ordered() -> None:
    ordered = ["alpha", "alpha.1", "alpha.beta", "beta", "beta.2", "beta.11", "rc.1"]
    for below, above in itertools.pairwise(ordered):
        requirement = VersionRequirement.parse(f">1.0.0-{below}")
        assert requirement.admits(Version.parse(f"1.0.0-{above}")), (below, above)
