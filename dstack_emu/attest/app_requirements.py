"""What an app requires of its guest: the member `requirements` of app-compose.json, of manifest version 3.

`app_policy` verifies that a guest meets them. Source: as of `app_compose`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from dstack_emu.attest.canonical_json import canonical_json
from dstack_emu.attest.json_struct import (
    Reader,
    list_of,
    optional,
    read_boolean,
    read_members,
    read_text,
)


@dataclass(frozen=True, slots=True)
class GpuPolicy:
    """The requirements of an app on GPUs. A guest without a GPU only measures them."""

    attest_gpu: bool = True
    rego: str | None = None
    allow_devtools: bool = False
    allow_debug: bool = False
    allow_insecure_boot: bool = False


@dataclass(frozen=True, slots=True)
class Requirements:
    """The requirements of an app on its guest; None requires nothing, an empty `platforms` admits no platform."""

    os_version: str | None = None
    platforms: tuple[str, ...] | None = None
    tdx_measure_acpi_tables: bool | None = None
    launch_token_hash: str | None = None
    gpu_policy: GpuPolicy = field(default_factory=GpuPolicy)
    health_check: bool = False
    health_status_file: str | None = None


_GPU_POLICY: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "attest_gpu": read_boolean,
        "rego": optional(read_text),
        "allow_devtools": read_boolean,
        "allow_debug": read_boolean,
        "allow_insecure_boot": read_boolean,
    }
)


def _read_gpu_policy(value: Any) -> GpuPolicy:
    return GpuPolicy(**read_members(value, _GPU_POLICY, refuse_unknown=True))


_REQUIREMENTS_MEMBERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "os_version": optional(read_text),
        "platforms": optional(list_of(read_text)),
        "tdx_measure_acpi_tables": optional(read_boolean),
        "launch_token_hash": optional(read_text),
        "gpu_policy": _read_gpu_policy,
        "health_check": read_boolean,
        "health_status_file": optional(read_text),
    }
)


def read_requirements(value: Any) -> Requirements:
    """Read the member `requirements`; raise `ValueError`, for an unknown member, too."""
    return Requirements(**read_members(value, _REQUIREMENTS_MEMBERS, refuse_unknown=True))


def gpu_policy_hash(document: dict[str, Any]) -> bytes:
    """Return the SHA-256 of the GPU policy as it is written in an app-compose, 32 bytes; that of `{}` without one."""
    requirements = document.get("requirements")
    policy = requirements.get("gpu_policy", {}) if isinstance(requirements, dict) else {}
    return hashlib.sha256(canonical_json(policy)).digest()
