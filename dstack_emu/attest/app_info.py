"""Facts about an application in its evidence: its identity, from events, and its measurements, from registers.

`AppInfo` is in certificates and in agents' answers; `BootInfo` is the request to an auth webhook. Neither proves
anything: make them only from evidence that `attest.verify` has accepted. Source: dstack
`dstack-attest/src/attestation.rs` (`decode_app_info_ex`) and `kms/src/main_service/upgrade_authority.rs` at 312dc605.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Self

import msgpack

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import BOOT_MR_DONE, INIT_SCRIPT_HASH, SYSTEM_READY, find_payload, replay_runtime
from dstack_emu.attest.mr_config import MAX_INIT_SCRIPTS
from dstack_emu.attest.msgpack_struct import member, octets_or_text, sequence, unpack
from dstack_emu.attest.quote import Quote, TdReport
from dstack_emu.attest.release import DEFAULT
from dstack_emu.attest.strict_json import read_json
from dstack_emu.attest.vmconfig import MAX_VALUES, VmConfig, require_size

UNKNOWN_DEVICE_ID: Final = hashlib.sha256(b"").digest()
"""Upstream's device id if no quote was verified: the SHA-256 of no bytes."""

TEE_VARIANT_TDX: Final = "dstack-tdx"
APP_ID_SIZE: Final = 20
HASH_SIZE: Final = 32
_ZERO_48: Final = bytes(48)


@dataclass(frozen=True, slots=True)
class AppInfo:
    """Identity and measurements of one trust domain.

    Hashes are 32 bytes, app and instance id 20; an instance id may be empty.
    """

    app_id: bytes
    compose_hash: bytes
    instance_id: bytes
    device_id: bytes
    mr_system: bytes
    mr_aggregated: bytes
    os_image_hash: bytes
    key_provider_info: bytes
    init_script_hashes: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """Encode for the certificate extension: a msgpack array of nine elements, in the order of the fields."""
        packed: bytes = msgpack.packb(
            [
                self.app_id,
                self.compose_hash,
                self.instance_id,
                self.device_id,
                self.mr_system,
                self.mr_aggregated,
                self.os_image_hash,
                self.key_provider_info,
                list(self.init_script_hashes),
            ]
        )
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read the certificate extension as upstream does; raise `FormatError`.

        An array of eight or nine, or a map by the names of the fields; bytes after it are not looked at. Without
        init_script_hashes, or with nil there, there are none.
        """
        document, _ = unpack(data)
        if isinstance(document, list):
            if not len(_APP_INFO) - 1 <= len(document) <= len(_APP_INFO):
                raise FormatError(f"app info: array of {len(_APP_INFO)} expected, got {len(document)}")
            document = dict(zip(_APP_INFO, document, strict=False))
        found = {name: member(document, name, read) for name, read in _APP_INFO.items() if name != _INIT_SCRIPT_HASHES}
        return cls(**found, init_script_hashes=member(document, _INIT_SCRIPT_HASHES, _read_pins, ()))


def _read_hash(value: Any) -> bytes:
    data = octets_or_text(value)
    if len(data) != HASH_SIZE:
        raise FormatError(f"{HASH_SIZE} bytes expected, got {len(data)}")
    return data


def _read_pins(value: Any) -> tuple[bytes, ...]:
    pins = [] if value is None else sequence(value)
    if len(pins) > MAX_INIT_SCRIPTS:
        raise FormatError(f"init_script_hashes supports at most {MAX_INIT_SCRIPTS} hashes")
    return tuple(_read_hash(pin) for pin in pins)


_INIT_SCRIPT_HASHES: Final = "init_script_hashes"
_APP_INFO: Final[Mapping[str, Callable[[Any], Any]]] = MappingProxyType(
    {
        "app_id": octets_or_text,
        "compose_hash": octets_or_text,
        "instance_id": octets_or_text,
        "device_id": octets_or_text,
        "mr_system": _read_hash,
        "mr_aggregated": _read_hash,
        "os_image_hash": octets_or_text,
        "key_provider_info": octets_or_text,
        _INIT_SCRIPT_HASHES: _read_pins,
    }
)
"""How each field of app info is read, in the order of the array."""


@dataclass(frozen=True, slots=True)
class BootInfo:
    """The request to an auth webhook: the app or KMS that boots, its platform, and the platform's state."""

    mr_aggregated: bytes
    os_image_hash: bytes
    mr_system: bytes
    app_id: bytes
    compose_hash: bytes
    instance_id: bytes
    device_id: bytes
    key_provider_info: bytes
    tcb_status: str
    advisory_ids: tuple[str, ...]
    tee_variant: str = TEE_VARIANT_TDX

    @classmethod
    def about(cls, info: AppInfo, tcb_status: str, advisory_ids: tuple[str, ...]) -> Self:
        """Describe a trust domain on a platform of this status."""
        return cls(
            mr_aggregated=info.mr_aggregated,
            os_image_hash=info.os_image_hash,
            mr_system=info.mr_system,
            app_id=info.app_id,
            compose_hash=info.compose_hash,
            instance_id=info.instance_id,
            device_id=info.device_id,
            key_provider_info=info.key_provider_info,
            tcb_status=tcb_status,
            advisory_ids=advisory_ids,
        )

    def to_json(self, *, variant_members: tuple[str, ...] = DEFAULT.boot_info_variant_members) -> bytes:
        """Encode the webhook's request: camelCase, bytes as lowercase hex, in the order of dstack's PolicyBootInfo.

        `variant_members` are the members with the TEE variant, which come first; they depend on the release.
        """
        document: dict[str, Any] = dict.fromkeys(variant_members, self.tee_variant) | {
            "mrAggregated": self.mr_aggregated.hex(),
            "osImageHash": self.os_image_hash.hex(),
            "mrSystem": self.mr_system.hex(),
            "appId": self.app_id.hex(),
            "composeHash": self.compose_hash.hex(),
            "instanceId": self.instance_id.hex(),
            "deviceId": self.device_id.hex(),
            "keyProviderInfo": self.key_provider_info.hex(),
            "tcbStatus": self.tcb_status,
            "advisoryIds": list(self.advisory_ids),
        }
        return json.dumps(document, separators=(",", ":")).encode()


def decode_app_info(
    attestation: Attestation,
    *,
    vm_config: str = "",
    boot_time: bool = False,
    device_id: bytes = UNKNOWN_DEVICE_ID,
    verified: TdReport | None = None,
) -> AppInfo:
    """Read identity and measurements from evidence.

    `vm_config`, that of a request, overrides the config in the evidence. With `boot_time`, RTMR3 is replayed only up to
    and including `boot-mr-done`, and the key provider is omitted, as in SignCert. `verified` is the report of verified
    evidence; then nothing is parsed or replayed again.

    The OS image of evidence that was not verified may also be in the `vm_config` text inside a larger config; that of
    verified evidence may not, as in dstack. Raises `FormatError`.
    """
    text = vm_config or attestation.config
    try:
        config = vm_config_of(text) if verified is not None else vm_config_of(_unwrapped(text))
    except FormatError as error:
        raise FormatError(f"decode app info: Failed to decode os image hash: {error}") from error
    report = verified or Quote.parse(attestation.quote).report
    events = attestation.runtime_events
    key_provider = b"" if boot_time else find_payload(events, "key-provider")
    if verified is not None and not boot_time:
        rtmr3 = verified.rt_mr3  # the verification has replayed the events to it
    else:
        rtmr3 = replay_runtime(events, BOOT_MR_DONE if boot_time else None)
    return AppInfo(
        app_id=find_payload(events, "app-id"),
        compose_hash=find_payload(events, "compose-hash"),
        instance_id=find_payload(events, "instance-id"),
        device_id=device_id,
        mr_system=mr_system(report, key_provider),
        mr_aggregated=mr_aggregated(report, rtmr3),
        os_image_hash=config.os_image_hash,
        key_provider_info=key_provider,
        init_script_hashes=_init_script_hashes(attestation),
    )


def mr_system(report: TdReport, key_provider_info: bytes) -> bytes:
    """Return the SHA-256 over MRTD, RTMR0 to 2 and the hash of the key provider (32 zero bytes without one)."""
    mr_key_provider = hashlib.sha256(key_provider_info).digest() if key_provider_info else bytes(32)
    return hashlib.sha256(b"".join((report.mr_td, *report.rtmrs[:3], mr_key_provider))).digest()


def mr_aggregated(report: TdReport, rtmr3: bytes) -> bytes:
    """Hash MRTD, RTMR0 to 2, the replayed RTMR3, and the owner fields unless all three are zero (SHA-256)."""
    owner = (report.mr_config_id, report.mr_owner, report.mr_owner_config)
    counted = owner if any(field != _ZERO_48 for field in owner) else ()
    return hashlib.sha256(b"".join((report.mr_td, *report.rtmrs[:3], rtmr3, *counted))).digest()


def vm_config_of(config: str) -> VmConfig:
    """Parse a VM config; the empty text is the default config.

    Raises `FormatError`. The verification of an image and the request to the webhook both use this function.
    """
    return VmConfig.parse(config) if config else VmConfig()


def require_same_config(requested: str, attested: str) -> str:
    """Return the VM config of a request that counts beside the one in its evidence: empty, if the latter does.

    A request need not have one, and evidence of the legacy form has none. Otherwise both have to be the same text: a
    caller could otherwise be authorized by one and be issued the other. Raises `FormatError`.
    """
    if not requested or not attested:
        return requested
    if requested != attested:
        raise FormatError("vm_config of the request does not match the one in the attestation")
    return ""


def _unwrapped(config: str) -> str:
    """Return the `vm_config` text inside a larger config; any other text as it is. Raises `FormatError`."""
    require_size(config)
    try:
        document = read_json(config, MAX_VALUES)
    except ValueError:
        return config  # VmConfig.parse reports the error
    if isinstance(document, dict) and isinstance(document.get("vm_config"), str):
        return str(document["vm_config"])
    return config


def _init_script_hashes(attestation: Attestation) -> tuple[bytes, ...]:
    found = []
    for event in attestation.runtime_events:
        if event.event == SYSTEM_READY:
            break
        if event.event == INIT_SCRIPT_HASH:
            found.append(event.payload)
    return tuple(found)
