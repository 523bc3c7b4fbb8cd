"""What each release measures at boot, in order; who an app is; and what its host binds it to."""

import dataclasses
import hashlib
import json
from typing import Any

import pytest

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.boot import (
    AppIdentity,
    LaunchConfig,
    events_before_keys,
    events_from_kms,
    events_with_keys,
    guest_app_id,
    guest_instance_id,
    launch_config,
)
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.mr_config import (
    MrConfigDocument,
    compose_hash_config_id,
    document_config_id,
    key_provider_config_id,
    verify_mr_config_id,
)
from dstack_emu.attest.release import RELEASES

V0_5, V0_6 = RELEASES["0.5"], RELEASES["0.6"]
IDENTITY = AppIdentity(
    app_id=b"\x11" * 20,
    compose_hash=b"\x22" * 32,
    instance_id=b"\x44" * 20,
    init_script_hashes=(b"\x66" * 32, b"\x77" * 32),
)
NO_POLICY = bytes.fromhex("44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")
PROVIDER = b'{"name":"none","id":""}'


def manifest(release: Any, **members: Any) -> AppManifest:
    document = {"manifest_version": 2, "name": "app", "runner": "docker-compose"} | members
    return AppManifest.parse(json.dumps(document), release)


def test_0_5_measures_neither_scripts_nor_gpu_policy() -> None:
    assert events_before_keys(IDENTITY, V0_5) == (
        ("system-preparing", b""),
        ("app-id", b"\x11" * 20),
        ("compose-hash", b"\x22" * 32),
        ("instance-id", b"\x44" * 20),
        ("boot-mr-done", b""),
    )


def test_0_6_measures_each_script_and_always_the_gpu_policy() -> None:
    assert events_before_keys(IDENTITY, V0_6) == (
        ("system-preparing", b""),
        ("app-id", b"\x11" * 20),
        ("compose-hash", b"\x22" * 32),
        ("init-script-hash", b"\x66" * 32),
        ("init-script-hash", b"\x77" * 32),
        ("gpu-policy-hash", NO_POLICY),
        ("instance-id", b"\x44" * 20),
        ("boot-mr-done", b""),
    )


@pytest.mark.parametrize("mr_kms", [b"\x88" * 32, None])
def test_kms_is_measured_by_0_5_alone_and_if_it_has_evidence(mr_kms: bytes | None) -> None:
    image = ("os-image-hash", b"\x99" * 32)
    assert events_from_kms(b"\x99" * 32, mr_kms, V0_6) == (image,)
    assert events_from_kms(b"\x99" * 32, mr_kms, V0_5) == ((("mr-kms", mr_kms), image) if mr_kms else (image,))


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_end_of_the_boot_is_the_same(release: Any) -> None:
    assert events_with_keys(PROVIDER, release) == (
        ("key-provider", PROVIDER),
        ("storage-fs", b"zfs"),
        ("system-ready", b""),
    )


def test_gpu_attestation_comes_before_the_provider_and_storage_encryption_after_the_file_system() -> None:
    later = dataclasses.replace(V0_6, measures_storage_encryption=True)
    events = events_with_keys(
        PROVIDER, later, storage_fs="ext4", is_storage_encrypted=False, gpu_attestation=b'{"devices":1}'
    )
    assert events == (
        ("gpu-attestation", b'{"devices":1}'),
        ("key-provider", PROVIDER),
        ("storage-fs", b"ext4"),
        ("storage-encrypted", b"0"),
        ("system-ready", b""),
    )


def test_app_id_is_the_given_one_or_of_the_compose_hash() -> None:
    compose_hash, given = b"\x22" * 32, b"\x11" * 20
    for kind in ("kms", "none", "local"):
        assert guest_app_id(compose_hash, b"", kind, V0_6) == compose_hash[:20]
        assert guest_app_id(compose_hash, given, kind, V0_6) == given
        assert guest_app_id(compose_hash, given, kind, V0_5) == (given if kind == "kms" else compose_hash[:20])


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_app_id_of_another_size_is_refused(release: Any) -> None:
    with pytest.raises(FormatError, match="^Invalid app id length: expected 20 bytes, got 19$"):
        guest_app_id(b"\x22" * 32, b"\x11" * 19, "none", release)


def test_instance_id_is_of_seed_and_app() -> None:
    assert guest_instance_id(b"seed", b"\x11" * 20) == hashlib.sha256(b"seed" + b"\x11" * 20).digest()[:20]


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
def test_app_that_pins_no_provider_is_bound_to_its_compose_hash(release: Any) -> None:
    bound = LaunchConfig(compose_hash_config_id(IDENTITY.compose_hash))
    assert launch_config(IDENTITY, manifest(release), release) == bound


def test_app_that_pins_its_provider_is_bound_to_it_in_its_releases_form() -> None:
    members = {"kms_enabled": True, "key_provider_id": "aabb"}
    old = key_provider_config_id(IDENTITY.compose_hash, IDENTITY.app_id, "kms", b"\xaa\xbb")
    assert launch_config(IDENTITY, manifest(V0_5, **members), V0_5) == LaunchConfig(old)
    new = launch_config(IDENTITY, manifest(V0_6, **members), V0_6)
    assert new.document is not None
    assert new.mr_config_id == document_config_id(new.document)
    assert MrConfigDocument.parse(new.document) == MrConfigDocument(
        compose_hash=IDENTITY.compose_hash,
        key_provider="kms",
        app_id=IDENTITY.app_id,
        instance_id=IDENTITY.instance_id,
        key_provider_id=b"\xaa\xbb",
    )


@pytest.mark.parametrize("release", [V0_5, V0_6], ids=lambda each: each.name)
@pytest.mark.parametrize("members", [{}, {"kms_enabled": True, "key_provider_id": "aabb"}])
def test_guest_accepts_what_its_host_chose(members: dict[str, Any], release: Any) -> None:
    launch = launch_config(IDENTITY, manifest(release, **members), release)
    observed = IDENTITY.observed("kms", b"\xaa\xbb")
    verify_mr_config_id(launch.mr_config_id, observed, release, document=launch.document)


def test_init_scripts_are_pinned_from_manifest_3_on() -> None:
    members = {"kms_enabled": True, "key_provider_id": "aabb", "manifest_version": "3"}
    launch = launch_config(IDENTITY, manifest(V0_6, **members), V0_6)
    assert launch.document is not None
    assert MrConfigDocument.parse(launch.document).init_script_hashes == IDENTITY.init_script_hashes
