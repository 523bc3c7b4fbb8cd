"""app-compose.json: the members that a guest reads.

`AppManifest.parse` refuses a file that is not an app-compose of a release: absent and mistyped members, manifest
versions. Whether a guest may run the app is verified by `app_policy`. The compose hash is over the bytes of the file:
nothing is normalized. Members that no guest reads are ignored, even if they are mistyped.

Source: dstack `dstack-types/src/lib.rs` at 312dc605 and 40eaf35e (0.5.11); health checks from a public state shortly
before release 0.6.0.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from dstack_emu.attest.app_requirements import Requirements, gpu_policy_hash, read_requirements
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import check_version
from dstack_emu.attest.json_struct import (
    Reader,
    list_of,
    one_of,
    optional,
    parse_json,
    read_boolean,
    read_hex,
    read_members,
    read_object,
    read_text,
    shown,
    unsigned,
)
from dstack_emu.attest.mr_config import KEY_PROVIDER_CODES, MAX_INIT_SCRIPTS, KeyProviderKind
from dstack_emu.attest.release import Release

NERDCTL_COMPOSE: Final = "nerdctl-compose"
CONTAINER_RUNNERS: Final = ("docker-compose", NERDCTL_COMPOSE)
FileSystem = Literal["zfs", "ext4"]
_FILE_SYSTEMS: Final[Mapping[str, FileSystem]] = MappingProxyType({"zfs": "zfs", "ext4": "ext4"})
EventLogVersion = Literal[1, 2]

_NO_JSON: Final = ": JSON expected, in which docker_compose_file is the text of the docker-compose file"


@dataclass(frozen=True, slots=True)
class Port:
    """A port of the app; with `pp` the gateway uses the PROXY protocol."""

    port: int
    pp: bool = False


@dataclass(frozen=True, slots=True)
class PortPolicy:
    """The ports of an app; with `restrict_mode` the gateway forwards to no others."""

    ports: tuple[Port, ...] = ()
    restrict_mode: bool = False


@dataclass(frozen=True, slots=True)
class VerityVolume:
    """A read-only volume: the name of a file, its dm-verity root (32 bytes), an absolute path."""

    source: str
    verity_root: bytes
    target: str


@dataclass(frozen=True, slots=True)
class AppManifest:
    """An app-compose.json as a guest of a release reads it; `text` is the exact content of the file.

    `gpu_policy_hash` (32 bytes) is the hash of the policy as it is written. `swap_size` is in bytes.
    """

    text: str
    gpu_policy_hash: bytes
    manifest_version: int
    name: str
    runner: str
    features: tuple[str, ...] = ()
    docker_compose_file: str | None = None
    public_logs: bool = False
    public_sysinfo: bool = False
    public_tcbinfo: bool = True
    kms_enabled: bool = False
    gateway_enabled: bool = False
    tproxy_enabled: bool = False
    local_key_provider_enabled: bool = False
    key_provider: KeyProviderKind | None = None
    key_provider_id: bytes = b""
    allowed_envs: tuple[str, ...] = ()
    no_instance_id: bool = False
    secure_time: bool = True
    storage_fs: str | None = None
    swap_size: int = 0
    port_policy: PortPolicy = field(default_factory=PortPolicy)
    snapshotter: str | None = None
    init_script: tuple[str, ...] = ()
    event_log_version: EventLogVersion = 1
    requirements: Requirements | None = None
    verity_volumes: tuple[VerityVolume, ...] = ()

    @classmethod
    def parse(cls, text: str, release: Release) -> Self:
        """Parse the file as a guest of this release does; raise `FormatError`, which names the wrong member."""
        document = read_document(text)
        try:
            version = _version_reader(release)
            members = read_members(document, {"manifest_version": version, **_members(release)}, required=_REQUIRED)
        except ValueError as error:
            raise FormatError(f"app-compose: {error}") from error
        return cls(text=text, gpu_policy_hash=gpu_policy_hash(document), **members)

    @property
    def compose_hash(self) -> bytes:
        """Return the SHA-256 of the file, 32 bytes."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def init_script_hashes(self) -> tuple[bytes, ...]:
        """Return the SHA-256 of each init script, 32 bytes each, in the order in which they run."""
        return tuple(hashlib.sha256(script.encode()).digest() for script in self.init_script)

    @property
    def key_provider_kind(self) -> KeyProviderKind:
        """Return the kind of the key provider: `key_provider`, or that of the older switches."""
        if self.key_provider is not None:
            return self.key_provider
        if self.kms_enabled:
            return "kms"
        return "local" if self.local_key_provider_enabled else "none"

    @property
    def has_gateway(self) -> bool:
        """Return whether the app registers with a gateway, by the switch or one of its older forms."""
        return self.gateway_enabled or self.tproxy_enabled or "tproxy-net" in self.features

    def file_system(self) -> FileSystem:
        """Return the file system of the data disk, zfs by default; raise `VerificationError` for any other."""
        found = _FILE_SYSTEMS.get("zfs" if self.storage_fs is None else self.storage_fs.lower())
        if found is None:
            raise VerificationError(
                "Failed to parse kernel cmdline: Failed to parse storage_fs: "
                f"Invalid filesystem type: {self.storage_fs}, supported types: zfs, ext4"
            )
        return found


# ---- Members -----------------------------------------------------------------------------------------------


def read_document(text: str) -> dict[str, Any]:
    """Return the members of the file, of any release; raise `FormatError`, which says what a file of YAML lacks."""
    try:
        return read_object(parse_json(text))
    except ValueError as error:
        hint = _NO_JSON if isinstance(error, json.JSONDecodeError) and error.pos == 0 else ""
        raise FormatError(f"app-compose: {error}{hint}") from error


def _version_reader(release: Release) -> Reader:
    return _read_manifest_version if release.manifest_version_is_text else unsigned(32)


def _read_manifest_version(value: Any) -> int:
    if isinstance(value, str):
        return _parse_manifest_version(value.strip())
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"invalid type: {shown(value)}, expected a string manifest version, or legacy numeric 1/2")
    if value < 0:
        raise ValueError("manifest_version must be a positive integer")
    if value not in (1, 2):
        raise ValueError(
            "numeric manifest_version is only supported for legacy versions 1 and 2; use a string for newer versions"
        )
    return value


def _parse_manifest_version(text: str) -> int:
    if not text:
        raise ValueError("manifest_version must not be empty")
    if not re.fullmatch(r"\+?[0-9]+", text) or len(text) > 11 or int(text) >= 1 << 32:
        raise ValueError(f"manifest_version must be a positive integer string, got {json.dumps(text)}")
    if int(text) == 0:
        raise ValueError("manifest_version must be greater than 0")
    if str(int(text)) != text:
        raise ValueError(f"manifest_version must be a canonical integer string, got {json.dumps(text)}")
    return int(text)


def _read_one_init_script(value: Any) -> tuple[str, ...]:
    return () if value is None else (read_text(value),)


def _read_init_script(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    scripts: tuple[str, ...] = (value,) if isinstance(value, str) else list_of(read_text)(value)
    if len(scripts) > MAX_INIT_SCRIPTS:
        raise ValueError(f"init_script supports at most {MAX_INIT_SCRIPTS} scripts")
    return scripts


def _read_event_log_version(value: Any) -> int:
    try:
        return check_version(unsigned(32)(value))
    except FormatError as error:
        raise ValueError(str(error)) from error


_UNITS: Final[Mapping[str, int]] = MappingProxyType({"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40})


def _read_size(value: Any) -> int:
    """Parse a number of bytes, or text: decimal, 0x hexadecimal, or decimal with the unit K, M, G or T."""
    size = _parse_size(value.strip()) if isinstance(value, str) else value
    number: int = unsigned(64)(size)
    return number


def _parse_size(text: str) -> int:
    if not text:
        raise ValueError("Empty memory size")
    if text[:2] in ("0x", "0X"):
        return _digits(text[2:], "0-9a-fA-F", 16, "Invalid hexadecimal value")
    if re.fullmatch("[0-9]+", text):
        return _digits(text, "0-9", 10, "Invalid numeric value")
    unit = _UNITS.get(text[-1].lower())
    if unit is None:
        raise ValueError(f"Unknown memory size suffix: {text[-1]}")
    return _digits(text.rstrip(text[-1]), "0-9", 10, "Invalid numeric value") * unit


def _digits(text: str, digits: str, base: int, words: str) -> int:
    if not re.fullmatch(rf"\+?[{digits}]{{1,24}}", text):
        raise ValueError(f"{words}: {text}")
    return int(text, base)


def _read_port(value: Any) -> Port:
    return Port(**read_members(value, {"port": unsigned(16), "pp": read_boolean}, required=("port",)))


def _read_port_policy(value: Any) -> PortPolicy:
    return PortPolicy(**read_members(value, {"ports": list_of(_read_port), "restrict_mode": read_boolean}))


def _read_verity_root(value: Any) -> bytes:
    root = read_hex(value)
    if len(root) != 32:
        raise ValueError(f"32 bytes expected, got {len(root)}")
    return root


def _read_absolute_path(value: Any) -> str:
    path = read_text(value)
    if not path.startswith("/"):
        raise ValueError(f"volume target must be an absolute path, got '{path}'")
    return path


_VERITY_VOLUME: Final[Mapping[str, Reader]] = MappingProxyType(
    {"source": read_text, "verity_root": _read_verity_root, "target": _read_absolute_path}
)


def _read_verity_volume(value: Any) -> VerityVolume:
    return VerityVolume(**read_members(value, _VERITY_VOLUME, required=tuple(_VERITY_VOLUME)))


def read_verity_volumes(value: Any) -> tuple[VerityVolume, ...]:
    """Read the member `verity_volumes` of an app-compose.json; raise `ValueError`."""
    volumes: tuple[VerityVolume, ...] = list_of(_read_verity_volume)(value)
    return volumes


_REQUIRED: Final = ("manifest_version", "name", "runner")

_MEMBERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "name": read_text,
        "runner": read_text,
        "features": list_of(read_text),
        "docker_compose_file": optional(read_text),
        "public_logs": read_boolean,
        "public_sysinfo": read_boolean,
        "public_tcbinfo": read_boolean,
        "kms_enabled": read_boolean,
        "gateway_enabled": read_boolean,
        "tproxy_enabled": read_boolean,
        "local_key_provider_enabled": read_boolean,
        "key_provider": optional(one_of(*KEY_PROVIDER_CODES)),
        "key_provider_id": read_hex,
        "allowed_envs": list_of(read_text),
        "no_instance_id": read_boolean,
        "secure_time": read_boolean,
        "storage_fs": optional(read_text),
        "swap_size": _read_size,
        "port_policy": _read_port_policy,
    }
)
"""The members that guests of every release read, except the manifest version."""

_MANIFEST_3_MEMBERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "snapshotter": optional(one_of("overlayfs", "stargz")),
        "init_script": _read_init_script,
        "event_log_version": _read_event_log_version,
        "requirements": optional(read_requirements),
        "verity_volumes": read_verity_volumes,
    }
)


def _members(release: Release) -> Mapping[str, Reader]:
    if release.manifest_3_members:
        return {**_MEMBERS, **_MANIFEST_3_MEMBERS}
    return {**_MEMBERS, "init_script": _read_one_init_script}  # one text, before there were several
