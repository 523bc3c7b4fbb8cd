"""The table of releases: what users name, what it says of each, and that two of them differ in every field."""

import dataclasses

import pytest

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import DEFAULT, RELEASES, Release, release
from dstack_emu.attest.version import EMULATOR

# Sources do not agree whether 0.6.0 has it; a capture of 0.6.0 does not.
OFF_IN_BOTH = {"measures_storage_encryption"}


def test_release_is_found_by_its_name() -> None:
    assert [(name, release(name).name, release(name).version) for name in RELEASES] == [
        ("0.5", "0.5", "0.5.11"),
        ("0.6", "0.6", "0.6.0"),
    ]


@pytest.mark.parametrize("name", ["0.7", "next", "", "0.5.11"])
def test_unknown_release_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(FormatError, match=rf"^dstack release: 0\.5 or 0\.6 expected, got '{name}'$"):
        release(name)


def test_default_is_one_of_the_table() -> None:
    assert DEFAULT is RELEASES[DEFAULT.name]


def test_every_field_is_a_difference() -> None:
    equal = {
        field.name
        for field in dataclasses.fields(Release)
        if getattr(RELEASES["0.5"], field.name) == getattr(RELEASES["0.6"], field.name)
    }
    assert equal == OFF_IN_BOTH


def test_revision_names_the_emulator_and_not_the_release() -> None:
    assert {each.revision for each in RELEASES.values()} == {f"dstack-emu-{EMULATOR}"}
