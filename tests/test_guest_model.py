"""A thousand random apps: each guest decides as a model says that is written from the documents alone.

The model is a table: each value of each member with the releases that accept it, from the reference of app-compose.json
and its requirements. It shares no code with the guest. A guest that boots where the model refuses would be laxer than a
real one.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pytest

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import RELEASES
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, DomainSettings, KeyProvider, TrustDomain

SEED = Seed.of("model")
INTEL = Intel(SEED)
IMAGE = OsImage.from_seed(SEED.derive, version="0.6.0")
KMS_ID = "aabb"
TOKEN = "unit-test-launch-token-0000000001"
# Of upstream's own unit test.
TOKEN_HASH = "28faa1319055d733ad9651f5ab7689c15b04609846bcd27b3c5bc8df6246f5a3"
ABSENT: Any = object()


@dataclass(frozen=True, slots=True)
class Choice:
    """A member's values: those that a guest accepts, those that it refuses, and those that only one release refuses."""

    good: tuple[Any, ...]
    bad: tuple[Any, ...] = ()
    bad_in_0_5: tuple[Any, ...] = ()
    bad_in_0_6: tuple[Any, ...] = ()

    def draw(self, source: random.Random, badness: float) -> Any:
        """Draw a value, seldom one that somebody refuses."""
        refused = (*self.bad, *self.bad_in_0_5, *self.bad_in_0_6)
        return source.choice(refused if refused and source.random() < badness else self.good)

    def is_refused(self, value: Any, release: str) -> bool:
        """Tell whether a guest of that release refuses this value, whatever else there is."""
        here = self.bad_in_0_5 if release == "0.5" else self.bad_in_0_6
        return any(value is each or (type(value) is type(each) and value == each) for each in (*self.bad, *here))


BOOLEAN: Final = Choice((ABSENT, True, False), ("yes", 1, None))
MEMBERS: Final[Mapping[str, Choice]] = {
    "manifest_version": Choice((1, 2), (ABSENT, None, True, 2.5, -1, "03", "4", "", "0"), ("2", "3"), (3, 0)),
    "name": Choice(("app", ""), (ABSENT, 1, None)),
    "runner": Choice(("docker-compose", "bash"), (ABSENT, ["bash"], None)),
    "docker_compose_file": Choice((ABSENT, None, "services: {}"), ({}, 1)),
    "public_logs": BOOLEAN,
    "public_sysinfo": BOOLEAN,
    "public_tcbinfo": BOOLEAN,
    "kms_enabled": Choice((True,), ("yes", 1, None)),
    "gateway_enabled": BOOLEAN,
    "no_instance_id": BOOLEAN,
    "secure_time": BOOLEAN,
    "features": Choice((ABSENT, [], ["kms"]), ("kms", [1])),
    "allowed_envs": Choice((ABSENT, ["A"]), ("A", [None])),
    "storage_fs": Choice((ABSENT, None, "zfs", "EXT4"), (1, "btrfs")),
    "swap_size": Choice((ABSENT, 0, "2G", "0x10"), ("", "2X", -1)),
    "init_script": Choice((ABSENT, None, "one"), ([1], ["x"] * 6), (["one"], ["one", "two"])),
    "key_provider_id": Choice((ABSENT, "", KMS_ID), ("0xaa", 1, "aabc")),
    "a_member_of_tomorrow": Choice((ABSENT, 1, {})),
}
NEW_MEMBERS: Final[Mapping[str, Choice]] = {
    "snapshotter": Choice((ABSENT, None), bad_in_0_6=("zfs", "stargz")),
    "event_log_version": Choice((ABSENT, 1, 2), bad_in_0_6=(0, 3, "2")),
    "verity_volumes": Choice((ABSENT, []), bad_in_0_6=([{}], {})),
}
"""Members that 0.5 does not read at all; a snapshotter needs another runner than those drawn here."""
REQUIREMENTS: Final[Mapping[str, Choice]] = {
    "os_version": Choice((ABSENT, None, ">=0.6.0", "0.6", "*"), (">=0.6.1", "0.7", "six", 6)),
    "platforms": Choice((ABSENT, None, ["dstack-tdx"]), ([], ["dstack-gcp-tdx"], ["tdx"], "dstack-tdx")),
    "tdx_measure_acpi_tables": Choice((ABSENT, None, False), (True, "no")),
    "launch_token_hash": Choice((ABSENT, None, TOKEN_HASH), ("00" * 32, "xyz", "aabb")),
    "gpu_policy": Choice((ABSENT, {}, {"allow_debug": True}), ({"rego": "package a"}, {"more": 1}, None)),
    "health_check": Choice((ABSENT, False), ("yes",)),
    "more": Choice((ABSENT,), (1,)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """An app, and what its host bound it to."""

    members: dict[str, Any]
    requirements: dict[str, Any] | None
    bound: str

    @property
    def app_compose(self) -> str:
        """Its app-compose.json."""
        document = {name: value for name, value in self.members.items() if value is not ABSENT}
        if self.requirements is not None:
            document["requirements"] = {n: value for n, value in self.requirements.items() if value is not ABSENT}
        return json.dumps(document)


def draw(source: random.Random) -> Case:
    badness = source.choice((0.0, 0.02, 0.1))
    members = {name: choice.draw(source, badness) for name, choice in {**MEMBERS, **NEW_MEMBERS}.items()}
    requirements = None
    if source.random() < 0.5:
        requirements = {name: choice.draw(source, badness) for name, choice in REQUIREMENTS.items()}
    if source.random() < (0.9 if requirements is not None else 0.2):
        members["manifest_version"] = "3"
    if source.random() < 0.1:
        members["init_script"] = ["one", "two"]
    return Case(members, requirements, source.choice(("", "", "", "00" * 48, "01" + "22" * 32 + "00" * 15)))


def model_boots(case: Case, release: str) -> bool:
    """Decide as the documents say."""
    members = case.members
    read = MEMBERS if release == "0.5" else {**MEMBERS, **NEW_MEMBERS}
    if any(choice.is_refused(members[name], release) for name, choice in read.items()):
        return False
    if case.bound.startswith("01"):
        return False  # the hash of another app-compose.json
    if release == "0.5":
        return True
    if members["manifest_version"] != "3" and (
        case.requirements is not None or members["init_script"] == ["one", "two"]
    ):
        return False
    return case.requirements is None or not any(
        choice.is_refused(case.requirements[name], release) for name, choice in REQUIREMENTS.items()
    )


def guest_boots(case: Case, release: str) -> bool:
    try:
        domain = TrustDomain(
            INTEL.platform("host"),
            IMAGE,
            AppCompose(case.app_compose),
            instance_seed=b"instance",
            user_config=json.dumps({"dstack": {"launch_token": TOKEN}}),
            settings=DomainSettings(mr_config_id=bytes.fromhex(case.bound) if case.bound else None),
            release=RELEASES[release],
        )
        domain.boot()
        domain.complete(KeyProvider("kms", KMS_ID), os_image_hash=b"\x99" * 32, mr_kms=b"\x88" * 32)
    except (FormatError, GuestError):
        return False
    return True


@pytest.mark.parametrize("release", ["0.5", "0.6"])
def test_guest_decides_as_the_documents_say(release: str) -> None:
    source = random.Random(20260928)
    decisions = []
    for _ in range(1000):
        case = draw(source)
        decisions.append(model_boots(case, release))
        assert guest_boots(case, release) is decisions[-1], (case.app_compose, case.bound)
    assert 150 < sum(decisions) < 850, "both decisions are met often enough"
