"""Trust domains of each release: what they measure, what they are bound to, and what ends their boot."""

import hashlib
import json
from typing import Any

import pytest

from dstack_emu.attest.app_info import decode_app_info
from dstack_emu.attest.attestation import decode
from dstack_emu.attest.eventlog import replay_runtime, validate_preimages
from dstack_emu.attest.mr_config import compose_hash_config_id, document_config_id, key_provider_config_id
from dstack_emu.attest.quote import Quote
from dstack_emu.attest.release import RELEASES, Release
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, DomainSettings, KeyProvider, TrustDomain

SEED = Seed.of("releases")
INTEL = Intel(SEED)
IMAGE = OsImage.from_seed(SEED.derive, version="0.6.0")
V0_5, V0_6 = RELEASES["0.5"], RELEASES["0.6"]
KMS = KeyProvider("kms", "aabb")
BEFORE_KEYS = ["system-preparing", "app-id", "compose-hash", "gpu-policy-hash", "instance-id", "boot-mr-done"]
WITH_KEYS = ["key-provider", "storage-fs", "system-ready"]


def domain(
    release: Release = V0_6, *, user_config: str | None = None, mr_config_id: bytes | None = None, **members: Any
) -> TrustDomain:
    document = {"manifest_version": "3", "name": "app", "runner": "docker-compose", "kms_enabled": True} | members
    if release is V0_5:
        document["manifest_version"] = 2
    return TrustDomain(
        INTEL.platform("host"),
        IMAGE,
        AppCompose(json.dumps(document)),
        instance_seed=b"instance",
        settings=DomainSettings(mr_config_id=mr_config_id),
        user_config=user_config,
        release=release,
    )


def booted(domain: TrustDomain) -> TrustDomain:
    domain.boot()
    domain.complete(KMS, os_image_hash=b"\x99" * 32, mr_kms=b"\x88" * 32)
    return domain


def names(domain: TrustDomain) -> list[str]:
    return [event.event for event in domain.runtime_events]


def quoted_config_id(domain: TrustDomain) -> bytes:
    return Quote.parse(domain.attest(bytes(64)).quote).report.mr_config_id


def test_domain_of_0_6_measures_the_gpu_policy_and_no_kms() -> None:
    assert names(booted(domain())) == [*BEFORE_KEYS, "os-image-hash", *WITH_KEYS]


def test_domain_of_0_5_measures_the_kms_and_no_policy() -> None:
    before = [name for name in BEFORE_KEYS if name != "gpu-policy-hash"]
    assert names(booted(domain(V0_5))) == [*before, "mr-kms", "os-image-hash", *WITH_KEYS]


def test_init_scripts_are_measured_and_found_in_the_app_info() -> None:
    guest = booted(domain(init_script=["one", "two"]))
    hashes = tuple(hashlib.sha256(script).digest() for script in (b"one", b"two"))
    assert names(guest)[2:6] == ["compose-hash", "init-script-hash", "init-script-hash", "gpu-policy-hash"]
    assert decode_app_info(guest.attest(bytes(64))).init_script_hashes == hashes


def test_file_system_is_the_one_that_the_app_asks_for() -> None:
    events = {event.event: event.payload for event in booted(domain(storage_fs="EXT4")).runtime_events}
    assert events["storage-fs"] == b"ext4"


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_register_is_the_replay_of_the_events(release: Release) -> None:
    evidence = booted(domain(release)).attest(bytes(64))
    assert Quote.parse(evidence.quote).report.rt_mr3 == replay_runtime(evidence.runtime_events)


def test_log_of_version_2_is_made_if_the_app_asks_for_it() -> None:
    evidence = booted(domain(event_log_version=2)).attest(bytes(64))
    assert {event.version for event in evidence.runtime_events} == {2}
    validate_preimages(evidence.event_log)
    assert Quote.parse(evidence.quote).report.rt_mr3 == replay_runtime(evidence.runtime_events)
    assert decode(evidence.encode()) == evidence
    assert evidence.wire == 1


# ---- mr_config_id ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_domain_is_bound_to_its_compose_hash(release: Release) -> None:
    guest = booted(domain(release))
    assert quoted_config_id(guest) == b"\x01" + guest.compose_hash + bytes(15)


def test_domain_of_an_app_that_pins_its_provider_is_bound_by_a_document() -> None:
    guest = booted(domain(key_provider_id="aabb"))
    assert guest.launch_config.document is not None
    assert quoted_config_id(guest) == document_config_id(guest.launch_config.document)


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
@pytest.mark.parametrize("version", [1, 2])
def test_given_mr_config_id_that_fits_boots(version: int, release: Release) -> None:
    free = domain(release)
    config_id = (
        compose_hash_config_id(free.compose_hash)
        if version == 1
        else key_provider_config_id(free.compose_hash, free.app_id, "kms", b"\xaa\xbb")
    )
    assert quoted_config_id(booted(domain(release, mr_config_id=config_id))) == config_id


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("config_id", "words"),
    [
        (compose_hash_config_id(b"\x01" * 32), "Invalid mr_config_id"),
        (b"\x02" + bytes(47), "Invalid mr_config_id"),
        (b"\x04" + bytes(47), "Invalid mr_config_id version"),
    ],
)
def test_given_mr_config_id_that_does_not_fit_ends_the_boot(config_id: bytes, words: str, release: Release) -> None:
    guest = domain(release, mr_config_id=config_id)
    guest.boot()
    with pytest.raises(GuestError, match=f"^Failed to verify app: {words}$"):
        guest.complete(KMS, os_image_hash=b"\x99" * 32)
    assert names(guest)[-1] == "os-image-hash"


# ---- The app id ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_given_app_id_counts_unless_a_guest_of_0_5_gets_no_keys_from_a_kms(release: Release) -> None:
    given = b"\xcd" * 20

    def app_id(**members: Any) -> bytes:
        document = {"manifest_version": 2, "name": "app", "runner": "docker-compose"} | members
        compose = AppCompose(json.dumps(document))
        guest = TrustDomain(
            INTEL.platform("host"), IMAGE, compose, instance_seed=b"instance", app_id=given, release=release
        )
        guest.boot()
        return next(event.payload for event in guest.runtime_events if event.event == "app-id")

    assert app_id() == app_id(kms_enabled=True) == app_id(key_provider="kms") == given
    local = app_id(key_provider="local")
    assert (local == given) is (release is V0_6)


# ---- Refusals ----------------------------------------------------------------------------------------------


def refusal(guest: TrustDomain) -> str:
    with pytest.raises(GuestError) as caught:
        guest.boot()
    assert names(guest) == []
    return str(caught.value)


def test_requirement_that_fails_ends_the_boot_before_anything_is_measured() -> None:
    booted(domain(requirements={"os_version": ">=0.6.0"}))
    words = "Failed to verify app-compose policy: Unsupported dstack OS version: current 0.6.0, required >=0.6.1"
    assert refusal(domain(requirements={"os_version": ">=0.6.1"})) == words


def test_launch_token_is_looked_for_in_the_user_config() -> None:
    token = "unit-test-launch-token-0000000001"
    required = {"launch_token_hash": "28faa1319055d733ad9651f5ab7689c15b04609846bcd27b3c5bc8df6246f5a3"}
    booted(domain(requirements=required, user_config=json.dumps({"dstack": {"launch_token": token}})))
    assert refusal(domain(requirements=required, user_config="{}")) == (
        "Failed to verify app-compose policy: user_config is missing dstack.launch_token"
    )


def test_gpu_policy_that_cannot_be_evaluated_ends_the_boot() -> None:
    assert refusal(domain(requirements={"gpu_policy": {"rego": "package policy"}})).startswith(
        "Failed to measure app info: failed to verify GPU TEE attestation: failed to apply GPU Rego policy: "
    )


def test_unexpected_key_provider_ends_the_boot() -> None:
    guest = domain(key_provider_id="aabb", mr_config_id=bytes(48))
    guest.boot()
    with pytest.raises(GuestError, match="^Failed to verify app: Unexpected key provider id: aabc, expected: aabb$"):
        guest.complete(KeyProvider("kms", "aabc"), os_image_hash=b"\x99" * 32)


def test_pinned_key_provider_is_checked_by_the_document_first() -> None:
    guest = domain(key_provider_id="aabb")
    guest.boot()
    with pytest.raises(GuestError, match="^Failed to verify app: Invalid mr_config key_provider_id$"):
        guest.complete(KeyProvider("kms", "aabc"), os_image_hash=b"\x99" * 32)


def test_vm_config_has_the_members_of_real_hardware_in_their_order() -> None:
    assert list(json.loads(domain().vm_config_json)) == [
        "os_image_hash",
        "cpu_count",
        "memory_size",
        "qemu_version",
        "pci_hole64_size",
        "hugepages",
        "num_gpus",
        "num_nvswitches",
        "hotplug_off",
        "image",
        "host_share_mode",
        "ovmf_variant",
        "tdx_attestation_variant",
        "tdx_measurement",
        "spec_version",
    ]


def test_quote_header_has_an_id_of_the_platform() -> None:
    user_data = [Quote.parse(booted(domain()).attest(bytes(64)).quote).header.user_data for _ in range(2)]
    assert user_data[0] == user_data[1]
    assert user_data[0][16:] == bytes(4)
    assert user_data[0][:16] not in (bytes(16), INTEL.platform("host").ppid)
    other = INTEL.platform("another host").quote(domain().report(bytes(64)))
    assert Quote.parse(other).header.user_data[:16] != user_data[0][:16]
