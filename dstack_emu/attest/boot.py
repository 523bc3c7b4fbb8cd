"""The boot of an app: its identity, the mr_config_id that its host sets, and the events that its guest measures.

    before keys   system-preparing, app-id, compose-hash, init-script-hash (one each), gpu-policy-hash, instance-id,
                  boot-mr-done
    from a KMS    mr-kms, os-image-hash
    with keys     gpu-attestation, key-provider, storage-fs, storage-encrypted, system-ready

Some releases omit some of these events. Nothing is measured here: the functions return events to extend RTMR3 with, in
their order.

Source: dstack `dstack-util/src/system_setup.rs` and `vmm/src/app/mr_config.rs` at 312dc605, 40eaf35e (0.5.11), and a
public state of the former shortly before release 0.6.0; a capture of real hardware with 0.6.0.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.app_info import APP_ID_SIZE
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import BOOT_MR_DONE, SYSTEM_READY
from dstack_emu.attest.mr_config import (
    NOTHING_BOUND,
    KeyProviderKind,
    MrConfigDocument,
    ObservedConfig,
    compose_hash_config_id,
    document_config_id,
    key_provider_config_id,
)
from dstack_emu.attest.release import Release

NO_GPU_POLICY_HASH: Final = hashlib.sha256(b"{}").digest()

MeasuredEvent = tuple[str, bytes]
"""The name and the payload of an event."""


@dataclass(frozen=True, slots=True)
class AppIdentity:
    """The facts about an app that its guest measures before it has keys.

    `app_id` has 20 bytes, `instance_id` 20 or none, each hash 32.
    """

    app_id: bytes
    compose_hash: bytes
    instance_id: bytes
    init_script_hashes: tuple[bytes, ...] = ()
    gpu_policy_hash: bytes = NO_GPU_POLICY_HASH

    def observed(self, key_provider: KeyProviderKind, key_provider_id: bytes) -> ObservedConfig:
        """Return what an mr_config_id is compared with after keys have come from this provider."""
        return ObservedConfig(
            compose_hash=self.compose_hash,
            app_id=self.app_id,
            instance_id=self.instance_id,
            key_provider=key_provider,
            key_provider_id=key_provider_id,
            gpu_policy_hash=self.gpu_policy_hash,
            init_script_hashes=self.init_script_hashes,
        )


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """The mr_config_id (48 bytes) that a host sets for a domain, and its document if it has version 3."""

    mr_config_id: bytes = NOTHING_BOUND
    document: str | None = None


def guest_app_id(compose_hash: bytes, given: bytes, key_provider: KeyProviderKind, release: Release) -> bytes:
    """Return the app id of a guest: the given one, or the first 20 bytes of the compose hash.

    Raises `FormatError`, with upstream's text, if the given one does not have 20 bytes.
    """
    if given and len(given) != APP_ID_SIZE:
        raise FormatError(f"Invalid app id length: expected {APP_ID_SIZE} bytes, got {len(given)}")
    is_fixed = release.app_id_is_compose_hash_without_kms and key_provider != "kms"
    return given if given and not is_fixed else compose_hash[:APP_ID_SIZE]


def guest_instance_id(seed: bytes, app_id: bytes) -> bytes:
    """Derive the instance id (20 bytes) from an instance's seed and the app id."""
    return hashlib.sha256(seed + app_id).digest()[:20]


def launch_config(identity: AppIdentity, manifest: AppManifest, release: Release) -> LaunchConfig:
    """Return the launch config of an app, as the VMM of this release chooses it."""
    if not manifest.key_provider_id:
        return LaunchConfig(compose_hash_config_id(identity.compose_hash))
    if release.pinned_mr_config_id_version == 3:
        return _document_launch(identity, manifest)
    provider, provider_id = manifest.key_provider_kind, manifest.key_provider_id
    return LaunchConfig(key_provider_config_id(identity.compose_hash, identity.app_id, provider, provider_id))


def _document_launch(identity: AppIdentity, manifest: AppManifest) -> LaunchConfig:
    document = MrConfigDocument(
        compose_hash=identity.compose_hash,
        key_provider=manifest.key_provider_kind,
        app_id=identity.app_id,
        init_script_hashes=identity.init_script_hashes if manifest.manifest_version >= 3 else None,
        instance_id=identity.instance_id or None,
        key_provider_id=manifest.key_provider_id,
    ).to_json()
    return LaunchConfig(document_config_id(document), document)


def events_before_keys(identity: AppIdentity, release: Release) -> tuple[MeasuredEvent, ...]:
    """Return the events before a guest requests keys."""
    scripts = identity.init_script_hashes if release.measures_init_scripts else ()
    policies = (identity.gpu_policy_hash,) if release.measures_gpu_policy else ()
    return (
        ("system-preparing", b""),
        ("app-id", identity.app_id),
        ("compose-hash", identity.compose_hash),
        *(("init-script-hash", script) for script in scripts),
        *(("gpu-policy-hash", policy) for policy in policies),
        ("instance-id", identity.instance_id),
        (BOOT_MR_DONE, b""),
    )


def events_from_kms(os_image_hash: bytes, mr_kms: bytes | None, release: Release) -> tuple[MeasuredEvent, ...]:
    """Return the events after a KMS has given keys.

    `os_image_hash` is that of its answer, `mr_kms` the mr_aggregated in its certificate's evidence, None without any.
    """
    kms = (("mr-kms", mr_kms),) if release.measures_kms and mr_kms is not None else ()
    return (*kms, ("os-image-hash", os_image_hash))


def events_with_keys(
    key_provider: bytes,
    release: Release,
    *,
    storage_fs: str = "zfs",
    is_storage_encrypted: bool = True,
    gpu_attestation: bytes | None = None,
) -> tuple[MeasuredEvent, ...]:
    """Return the events after the guest has keys and has accepted their provider.

    `key_provider` and `gpu_attestation` are the events' JSON.
    """
    encrypted = b"1" if is_storage_encrypted else b"0"
    return (
        *(() if gpu_attestation is None else (("gpu-attestation", gpu_attestation),)),
        ("key-provider", key_provider),
        ("storage-fs", storage_fs.encode()),
        *((("storage-encrypted", encrypted),) if release.measures_storage_encryption else ()),
        (SYSTEM_READY, b""),
    )
