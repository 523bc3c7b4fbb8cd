"""What a guest refuses to run before it requests keys: an app that needs a newer manifest version, or whose
requirements do not hold.

Not here: the interpretation of Rego, and the rules of the runners.

Source: dstack `dstack-util/src/system_setup.rs` at 312dc605 and 40eaf35e (0.5.11); health checks from a public state of
that file shortly before release 0.6.0.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from dstack_emu.attest.app_compose import CONTAINER_RUNNERS, NERDCTL_COMPOSE, AppManifest
from dstack_emu.attest.app_requirements import Requirements
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.json_struct import read_hex
from dstack_emu.attest.release import Release
from dstack_emu.attest.strict_json import StrictJson
from dstack_emu.attest.vmconfig import VmConfig

TEE_VARIANTS: Final = (
    "dstack-tdx",
    "dstack-gcp-tdx",
    "dstack-nitro-enclave",
    "dstack-amd-sev-snp",
    "dstack-aws-nitro-tpm",
)
REQUIREMENTS_MANIFEST: Final = 3
"""The manifest version from which there are requirements, nerdctl-compose and several init scripts."""
LAUNCH_TOKEN_DOMAIN: Final = "dstack-launch-token/v1:"  # noqa: S105 - a prefix
LAUNCH_TOKEN_MIN_SIZE: Final = 32
"""The minimum length of a token in bytes: its hash is public, so a short token could be guessed."""


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """The facts about a guest that requirements are verified against.

    `os_version` is VERSION_ID of its os-release, `vm_config` the text in its sys-config, `user_config` the text of that
    file, None if there is none.
    """

    os_version: str
    vm_config: str
    tee_variant: str = TEE_VARIANTS[0]
    user_config: str | None = None


def verify_policy(manifest: AppManifest, facts: GuestFacts, release: Release) -> None:
    """Verify that this guest may run an app, as a guest does before it measures anything.

    Raises `VerificationError` with upstream's chain of errors, which the host sees. Success proves nothing to
    others: it only means that the guest was not refused.
    """
    try:
        _verify_manifest_version(manifest, release)
        if release.manifest_3_members:
            _verify_manifest_features(manifest)
            _verify_health_check(manifest)
        if manifest.requirements is not None:
            for verify_requirement in _REQUIREMENTS:
                verify_requirement(manifest.requirements, facts)
    except VerificationError as error:
        raise VerificationError(f"Failed to verify app-compose policy: {error}") from error


def verify_gpu_policy(manifest: AppManifest) -> None:
    """Verify that a GPU policy holds without a GPU, as a guest does while it measures itself.

    Upstream evaluates a policy in Rego with no claims. It cannot be evaluated here, so it counts as one that does not
    hold. Raises `VerificationError`.
    """
    if manifest.requirements is not None and manifest.requirements.gpu_policy.rego is not None:
        raise VerificationError(
            "failed to verify GPU TEE attestation: failed to apply GPU Rego policy: "
            "policies in Rego are not evaluated by this emulator"
        )


def verify_key_provider_inputs(manifest: AppManifest, kms_urls: Sequence[str], release: Release) -> None:
    """Verify, before a guest requests keys, that it can reach the key provider; raise `VerificationError`."""
    kind = manifest.key_provider_kind
    if kind == "kms" and not kms_urls:
        raise VerificationError("Failed to request app keys: No KMS URLs are set")
    if kind == "tpm" and not release.tpm_key_provider:
        raise VerificationError("Failed to request app keys: Tpm key provider is not supported")


def verify_key_provider_id(manifest: AppManifest, provider_id: bytes) -> None:
    """Verify that a key provider is the one that the app pins, if any; raise `VerificationError`.

    `provider_id` is the SPKI (DER) of a KMS's root CA, or the MR of a local provider.
    """
    pinned = manifest.key_provider_id
    if pinned and pinned != provider_id:
        raise VerificationError(f"Unexpected key provider id: {provider_id.hex()}, expected: {pinned.hex()}")


def launch_token_hash(token: str) -> bytes:
    """Return the hash of a launch token for `requirements.launch_token_hash`, 32 bytes."""
    return hashlib.sha256(f"{LAUNCH_TOKEN_DOMAIN}{token}".encode()).digest()


def _verify_manifest_version(manifest: AppManifest, release: Release) -> None:
    highest = release.max_manifest_version
    if highest is not None and manifest.manifest_version > highest:
        raise VerificationError(f"Unsupported manifest_version: {manifest.manifest_version}, max supported: {highest}")


def _verify_manifest_features(manifest: AppManifest) -> None:
    if manifest.manifest_version < REQUIREMENTS_MANIFEST:
        for is_used, words in (
            (manifest.requirements is not None, "requirements requires"),
            (manifest.runner == NERDCTL_COMPOSE, "nerdctl-compose requires"),
            (len(manifest.init_script) > 1, "multiple init scripts require"),
        ):
            if is_used:
                raise VerificationError(
                    f"{words} manifest_version >= {REQUIREMENTS_MANIFEST}; "
                    f'use string manifest_version "{REQUIREMENTS_MANIFEST}" so older guests fail closed'
                )
    if manifest.snapshotter is not None and manifest.runner != NERDCTL_COMPOSE:
        raise VerificationError("snapshotter is only supported by the nerdctl-compose runner")


def _verify_health_check(manifest: AppManifest) -> None:
    requirements = manifest.requirements
    if requirements is None or not requirements.health_check:
        return
    path = requirements.health_status_file
    if path is not None and not path.startswith("/"):
        raise VerificationError(f"requirements.health_status_file must be an absolute path: {path}")
    if path is None and manifest.runner not in CONTAINER_RUNNERS:
        raise VerificationError(
            f"requirements.health_check needs health_status_file for the {manifest.runner} runner; "
            "without containers to inspect there is nothing to judge"
        )


def _verify_os_version(requirements: Requirements, facts: GuestFacts) -> None:
    if requirements.os_version is None:
        return
    # Imported here, because few apps require it, and every guest imports this module.
    from dstack_emu.attest.semver import Version, VersionRequirement

    try:
        requirement = VersionRequirement.parse(requirements.os_version)
    except FormatError as error:
        raise VerificationError(f"Invalid requirements.os_version: {requirements.os_version}: {error}") from error
    try:
        version = Version.parse(facts.os_version)
    except FormatError as error:
        raise VerificationError(f"Invalid current dstack OS version: {facts.os_version}: {error}") from error
    if not requirement.admits(version):
        raise VerificationError(f"Unsupported dstack OS version: current {version}, required {requirement}")


def _verify_platforms(requirements: Requirements, facts: GuestFacts) -> None:
    platforms = requirements.platforms
    if platforms is None:
        return
    if not platforms:
        raise VerificationError("Unsupported attestation platform: requirements.platforms is empty")
    for index, name in enumerate(platforms):
        if name not in TEE_VARIANTS:
            known = ", ".join(f"`{variant}`" for variant in TEE_VARIANTS)
            raise VerificationError(
                f"Invalid requirements.platforms[{index}]: {name}: unknown variant `{name}`, expected one of {known}"
            )
    if facts.tee_variant not in platforms:
        allowed = ", ".join(platforms)
        raise VerificationError(f"Unsupported attestation platform: current {facts.tee_variant}, allowed [{allowed}]")


def _verify_acpi_tables(requirements: Requirements, facts: GuestFacts) -> None:
    measured = requirements.tdx_measure_acpi_tables
    if measured is None or facts.tee_variant != "dstack-tdx":
        return
    try:
        is_lite = VmConfig.parse(facts.vm_config).tdx_attestation_variant == "lite"
    except FormatError as error:
        raise VerificationError(
            f"failed to parse vm_config for requirements.tdx_measure_acpi_tables: {error}"
        ) from error
    if measured == is_lite:
        needed = "ACPI table measurement" if measured else "TDX lite attestation"
        raise VerificationError(
            "unsupported TDX attestation mode: "
            f"requirements.tdx_measure_acpi_tables={str(measured).lower()} requires {needed}"
        )


def _verify_launch_token(requirements: Requirements, facts: GuestFacts) -> None:
    if requirements.launch_token_hash is None:
        return
    token = _launch_token(facts.user_config)
    expected = _expected_launch_token_hash(requirements.launch_token_hash)
    size = len(token.encode())
    if size < LAUNCH_TOKEN_MIN_SIZE:
        raise VerificationError(
            f"launch token too short: got {size} bytes, minimum is {LAUNCH_TOKEN_MIN_SIZE}; "
            "use a random token since launch_token_hash is public"
        )
    if launch_token_hash(token) != expected:
        raise VerificationError(
            f'launch token mismatch: sha256("{LAUNCH_TOKEN_DOMAIN}" || launch token) '
            "does not match requirements.launch_token_hash"
        )


_USER_CONFIG: Final = StrictJson(members=None)
"""Parses the app's own file as serde parses any value: of two members of one name, the last one counts."""


def _launch_token(user_config: str | None) -> str:
    """Return `dstack.launch_token` of a user config; the errors never show its content."""
    if user_config is None:
        raise VerificationError("failed to read user_config for requirements.launch_token_hash: there is none")
    try:
        document = _USER_CONFIG.parse(user_config)
    except ValueError as error:
        raise VerificationError("failed to parse user_config as JSON for requirements.launch_token_hash") from error
    section = document.get("dstack") if isinstance(document, dict) else None
    if not isinstance(section, dict) or "launch_token" not in section:
        raise VerificationError("user_config is missing dstack.launch_token")
    token = section["launch_token"]
    if not isinstance(token, str):
        raise VerificationError("user_config dstack.launch_token is not a string")
    return token


def _expected_launch_token_hash(text: str) -> bytes:
    try:
        expected = read_hex(text)
    except ValueError as error:
        raise VerificationError(f"invalid requirements.launch_token_hash: not a hex string: {error}") from error
    if len(expected) != 32:
        raise VerificationError(
            f"invalid requirements.launch_token_hash: expected 32-byte sha256 hex, got {len(expected)} bytes"
        )
    return expected


_REQUIREMENTS: Final[tuple[Callable[[Requirements, GuestFacts], None], ...]] = (
    _verify_os_version,
    _verify_platforms,
    _verify_acpi_tables,
    _verify_launch_token,
)
"""The requirements in the order in which a guest verifies them."""
