"""mr_config_id: 48 bytes by which a host binds a TDX guest to its launch configuration.

    byte 0   bytes 1 to 32, the rest is zero
    0        all zero: nothing is bound
    1        compose_hash
    2        keccak256(compose_hash, app_id, kind of the key provider (1 byte), key_provider_id)
    3        SHA-256("dstack-mr-config-v3:", 00, document); the document is in the guest's sys-config

When a guest has keys, it compares the mr_config_id with its own observations. The bytes bind what the host claimed.
That the guest has compared them is proved by its image, not by these bytes.

Source: dstack `dstack-types/src/mr_config.rs` and `dstack-util/src/system_setup/config_id_verifier.rs` at 312dc605.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from dstack_emu.attest.canonical_json import canonical_json
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.json_struct import (
    Reader,
    list_of,
    one_of,
    optional,
    parse_json,
    read_hex,
    read_members,
    unsigned,
)
from dstack_emu.attest.keccak import keccak
from dstack_emu.attest.release import MrConfigVersion, Release

SIZE: Final = 48
NOTHING_BOUND: Final = bytes(SIZE)
DOCUMENT_DOMAIN: Final = b"dstack-mr-config-v3:\0"
MAX_INIT_SCRIPTS: Final = 5

KeyProviderKind = Literal["none", "local", "kms", "tpm"]
"""The kinds of key providers in an app-compose; `local` is `local-sgx` in the event `key-provider`."""
KEY_PROVIDER_CODES: Final[Mapping[KeyProviderKind, int]] = MappingProxyType({"none": 0, "local": 1, "kms": 2, "tpm": 3})


@dataclass(frozen=True, slots=True)
class ObservedConfig:
    """What a guest with keys has observed about itself; an mr_config_id is compared with it.

    `compose_hash`, `gpu_policy_hash` and each of `init_script_hashes` have 32 bytes, `app_id` 20, `instance_id` 20 or
    none. `key_provider_id` is the SPKI of a KMS's root CA, the MR of a local provider, or empty.
    """

    compose_hash: bytes
    app_id: bytes
    instance_id: bytes
    key_provider: KeyProviderKind
    key_provider_id: bytes
    gpu_policy_hash: bytes
    init_script_hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class MrConfigDocument:
    """The document of version 3. None means not pinned; an empty `init_script_hashes` means that there are none."""

    compose_hash: bytes
    key_provider: KeyProviderKind
    app_id: bytes | None = None
    gpu_policy_hash: bytes | None = None
    init_script_hashes: tuple[bytes, ...] | None = None
    instance_id: bytes | None = None
    key_provider_id: bytes | None = None
    version: int = 3

    def to_json(self) -> str:
        """Encode the document as a VMM does: canonically, and only with what is pinned."""
        document = {name: _to_json(getattr(self, name)) for name in _MEMBERS}
        return canonical_json({name: value for name, value in document.items() if value is not None}).decode()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a document in any JSON form; raise `FormatError` for unknown, absent and mistyped members."""
        try:
            members = read_members(parse_json(text), _MEMBERS, required=_REQUIRED, refuse_unknown=True)
        except ValueError as error:
            raise FormatError(f"failed to parse mr_config document: {error}") from error
        return cls(**members)


def compose_hash_config_id(compose_hash: bytes) -> bytes:
    """Make the mr_config_id of version 1: the compose hash itself (32 bytes)."""
    return _config_id(1, compose_hash)


def key_provider_config_id(
    compose_hash: bytes, app_id: bytes, key_provider: KeyProviderKind, key_provider_id: bytes
) -> bytes:
    """Make the mr_config_id of version 2, which binds the key provider as well."""
    code = bytes((KEY_PROVIDER_CODES[key_provider],))
    return _config_id(2, keccak(compose_hash + app_id + code + key_provider_id))


def document_config_id(document: str) -> bytes:
    """Make the mr_config_id of version 3 for the exact text of a document, canonical or not."""
    return _config_id(3, hashlib.sha256(DOCUMENT_DOMAIN + document.encode()).digest())


def verify_mr_config_id(
    mr_config_id: bytes, observed: ObservedConfig, release: Release, *, document: str | None = None
) -> None:
    """Compare an mr_config_id (48 bytes) with what a guest observed; version 3 needs the `document` of its sys-config.

    Raises `VerificationError` with upstream's text. An mr_config_id that is all zero always passes.
    """
    if mr_config_id == NOTHING_BOUND:
        return
    if mr_config_id[0] not in release.mr_config_id_versions:
        raise VerificationError("Invalid mr_config_id version")
    if mr_config_id != _EXPECTED[mr_config_id[0]](observed, document):
        raise VerificationError("Invalid mr_config_id")


def verify_document(text: str, observed: ObservedConfig) -> None:
    """Compare what a document of version 3 pins with what a guest observed; raise `VerificationError`."""
    try:
        document = MrConfigDocument.parse(text)
    except FormatError as error:
        raise VerificationError(f"Invalid mr_config document: {error}") from error
    if document.version != 3:
        raise VerificationError("mr_config version must be 3")
    for name in _COMPARED:
        pinned = getattr(document, name)
        if pinned is not None and pinned != getattr(observed, name):
            raise VerificationError(f"Invalid mr_config {name}")


def _config_id(version: MrConfigVersion, content: bytes) -> bytes:
    if len(content) != 32:
        raise FormatError(f"mr_config_id: 32 bytes expected, got {len(content)}")
    return (bytes((version,)) + content).ljust(SIZE, b"\0")


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [item.hex() for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _init_script_hashes(value: Any) -> tuple[bytes, ...]:
    """Parse a JSON array of at most five hashes of 32 bytes."""
    hashes: tuple[bytes, ...] = list_of(read_hex)(value)
    if len(hashes) > MAX_INIT_SCRIPTS:
        raise ValueError(f"init_script_hashes supports at most {MAX_INIT_SCRIPTS} hashes")
    if any(len(each) != 32 for each in hashes):
        raise ValueError("each init_script_hash must be 32 bytes")
    return hashes


_MEMBERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "version": unsigned(8),
        "app_id": optional(read_hex),
        "compose_hash": read_hex,
        "gpu_policy_hash": optional(read_hex),
        "key_provider": one_of(*KEY_PROVIDER_CODES),
        "key_provider_id": optional(read_hex),
        "instance_id": optional(read_hex),
        "init_script_hashes": optional(_init_script_hashes),
    }
)
_REQUIRED: Final = ("compose_hash", "key_provider")


def _of_compose_hash(observed: ObservedConfig, _document: str | None) -> bytes:
    return compose_hash_config_id(observed.compose_hash)


def _of_key_provider(observed: ObservedConfig, _document: str | None) -> bytes:
    return key_provider_config_id(
        observed.compose_hash, observed.app_id, observed.key_provider, observed.key_provider_id
    )


def _of_document(observed: ObservedConfig, document: str | None) -> bytes:
    if document is None:
        raise VerificationError("Failed to read mr_config: mr_config is required")
    verify_document(document, observed)
    return document_config_id(document)


_EXPECTED: Final[Mapping[int, Callable[[ObservedConfig, str | None], bytes]]] = MappingProxyType(
    {1: _of_compose_hash, 2: _of_key_provider, 3: _of_document}
)

_COMPARED: Final = (
    "compose_hash",
    "gpu_policy_hash",
    "init_script_hashes",
    "app_id",
    "instance_id",
    "key_provider",
    "key_provider_id",
)
"""The members that are compared, in upstream's order; the error names the first one that differs."""
