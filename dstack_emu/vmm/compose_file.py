"""What the VMM itself reads of an app-compose.json: the key provider, and the verity volumes. It leaves the rest alone.

A volume is a file of one folder of the host, which a machine gets as a disk. Whether it has the content that its root
says, only the guest finds out. Source: dstack `vmm/src/main_service.rs` at 312dc605.
"""

import json
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.app_compose import VerityVolume, read_verity_volumes
from dstack_emu.attest.mr_config import KEY_PROVIDER_CODES
from dstack_emu.vmm.errors import VmmError

_WITH_TPM: Final = frozenset({"dstack-gcp-tdx", "dstack-aws-nitro-tpm"})
"""The platforms that bring a TPM."""


def needs_swtpm(compose_file: str, simulated_tee: str | None) -> bool:
    """Return whether a machine gets a software TPM: its key provider is one, and its platform has none.

    Raises `VmmError` for a compose file that is no JSON, or whose key provider is unknown.
    """
    return key_provider_of(compose_file) == "tpm" and simulated_tee not in _WITH_TPM


def key_provider_of(compose_file: str) -> str:
    """Return the key provider of an app: `none`, `local`, `kms` or `tpm`; raise `VmmError`."""
    try:
        document: Any = json.loads(compose_file)
    except (ValueError, RecursionError) as error:
        raise VmmError(f"invalid app compose JSON: {error}") from error
    compose = document if isinstance(document, dict) else {}
    provider = compose.get("key_provider")
    if provider is not None:
        if not isinstance(provider, str) or provider not in KEY_PROVIDER_CODES:
            names = ", ".join(f"`{name}`" for name in KEY_PROVIDER_CODES)
            raise VmmError(f"invalid key_provider: {json.dumps(provider)[:40]}, expected one of {names}")
        return provider
    if compose.get("kms_enabled") is True:
        return "kms"
    return "local" if compose.get("local_key_provider_enabled") is True else "none"


def requested_volumes(compose_file: str, volumes_dir: str) -> tuple[Path, ...]:
    """Return the files of a compose file's volumes, without links, one for each root; raise `VmmError`.

    A compose file that is no JSON has no volumes.
    """
    try:
        document: Any = json.loads(compose_file)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(document, dict) or "verity_volumes" not in document:
        return ()
    try:
        volumes = read_verity_volumes(document["verity_volumes"])
    except ValueError as error:
        raise VmmError(f"invalid verity_volumes in app-compose: {error}") from error
    _require_different_targets(volumes)
    first_of_root = {volume.verity_root: volume for volume in reversed(volumes)}
    attached = [volume for volume in volumes if first_of_root[volume.verity_root] is volume]
    return tuple(_file_of(volume.source, volumes_dir.strip()) for volume in attached)


def _require_different_targets(volumes: tuple[VerityVolume, ...]) -> None:
    targets = [volume.target for volume in volumes]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            raise VmmError(f"duplicate verity volume target {target}")


def _file_of(source: str, volumes_dir: str) -> Path:
    if not volumes_dir:
        raise VmmError("volumes requested but cvm.volumes_dir is not configured")
    if not source:
        raise VmmError("invalid volume source: empty path")
    if "/" in source or source in (".", "..") or "\0" in source:
        raise VmmError(f"invalid volume source '{source}': must be a bare file name")
    try:
        folder = Path(volumes_dir).resolve(strict=True)
        found = (folder / source).resolve(strict=True)
    except OSError as error:
        raise VmmError(f"volume '{source}': {error.filename}: {error.strerror}") from error
    if not found.is_relative_to(folder):
        raise VmmError(f"volume '{source}' escapes volumes_dir")
    if {",", "="} & set(str(found)):
        raise VmmError(f"volume '{source}' resolves to a path with ',' or '='")
    return found
