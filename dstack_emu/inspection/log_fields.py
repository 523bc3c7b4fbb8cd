"""The contents of event logs and of the app info in them, field by field. Nothing is verified here.

Source of the names: TCG PC Client Platform Firmware Profile 1.06, section 10.4.1 (event types).
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

from dstack_emu.attest.app_info import UNKNOWN_DEVICE_ID, AppInfo
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import TdxEvent
from dstack_emu.attest.quote import TdReport
from dstack_emu.inspection.checks import replayed
from dstack_emu.inspection.description import UNKNOWN_NAME, Description, Named, load_json

NO_DEVICE: Final = "unknown: SHA-256 of nothing"
_EVENT_TAG: Final = 0x6
_VARIABLES: Final = (0x80000001, 0x80000002, 0x8000000C, 0x800000E0)
_BLOBS: Final = (0x8000000A, 0x8000000B)
_EVENT_TYPES: Final = {
    0x0: "PREBOOT_CERT",
    0x1: "POST_CODE",
    0x3: "NO_ACTION",
    0x4: "SEPARATOR",
    0x5: "ACTION",
    _EVENT_TAG: "EVENT_TAG",
    0x7: "S_CRTM_CONTENTS",
    0x8: "S_CRTM_VERSION",
    0x9: "CPU_MICROCODE",
    0xA: "PLATFORM_CONFIG_FLAGS",
    0xB: "TABLE_OF_DEVICES",
    0xC: "COMPACT_HASH",
    0xD: "IPL",
    0xE: "IPL_PARTITION_DATA",
    0x12: "NONHOST_INFO",
    0x13: "OMIT_BOOT_DEVICE_EVENTS",
    0x08000001: "dstack runtime event",
    0x80000001: "EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EFI_VARIABLE_BOOT",
    0x80000003: "EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EFI_GPT_EVENT",
    0x80000007: "EFI_ACTION",
    0x80000008: "EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EFI_HANDOFF_TABLES",
    0x8000000A: "EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EFI_HANDOFF_TABLES2",
    0x8000000C: "EFI_VARIABLE_BOOT2",
    0x80000010: "EFI_HCRTM_EVENT",
    0x800000E0: "EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EFI_SPDM_FIRMWARE_CONFIG",
}
_BINARY_EVENTS: Final = ("app-id", "compose-hash", "instance-id", "os-image-hash", "mr-kms", "init-script-hash")
"""Runtime events whose payload is a hash or an identifier, even if its bytes happen to be letters."""


def describe_log(log: Iterable[TdxEvent]) -> list[Description]:
    """Describe every event, with the digest that a replay computes for runtime events."""
    out = []
    for index, event in enumerate(log):
        line: Description = {
            "index": index,
            "imr": event.imr,
            "event_type": Named(event.event_type, _EVENT_TYPES.get(event.event_type, UNKNOWN_NAME)),
            "event": event.event,
            "payload": event.event_payload,
            "payload_text": _payload_text(event),
            "digest": event.digest,
            "version": event.version,
        }
        if event.is_runtime:
            line["computed_digest"] = computed = event.runtime().digest()
            line["digest_agrees"] = None if not event.digest else event.digest == computed
        if event.preimage is not None:
            line["preimage"] = event.preimage
        out.append(line)
    return out


def _payload_text(event: TdxEvent) -> str | None:
    """Return a payload as readable text, or None if it is best shown as bytes."""
    data = event.event_payload
    if event.is_runtime and event.event in _BINARY_EVENTS:
        return None
    if event.event_type in _VARIABLES:  # GUID[16], length of the name u64, of the data u64, name in UTF-16
        size = 2 * int.from_bytes(data[16:24], "little")
        data = data[32 : 32 + size].decode("utf-16-le", errors="replace").encode()
    elif event.event_type in _BLOBS:  # length of the description u8, description
        data = data[1 : 1 + data[0]] if data else b""
    elif event.event_type == _EVENT_TAG:  # id u32, length u32, content
        data = data[8:]
    try:
        text = data.rstrip(b"\0").replace(b"\0", b" ").decode()
    except UnicodeDecodeError:
        return None
    return text if text and text.isprintable() else None


def describe_replay(attestation: Attestation, report: TdReport | None) -> list[Description]:
    """Compare what the log replays to with each quoted register."""
    out = []
    for imr in range(4):
        register, quoted = replayed(attestation, imr), report.rtmrs[imr] if report else None
        if register is None:
            result = "cannot: the log lacks events"
        elif quoted is None:
            result = "nothing to compare with"
        else:
            result = "equal" if register == quoted else "differs"
        line: Description = {"register": f"RTMR{imr}", "replayed": register, "quoted": quoted, "result": result}
        out.append(line | {"events": sum(event.imr == imr for event in attestation.event_log)})
    return out


def describe_app_info(info: AppInfo) -> Description:
    out = asdict(info)
    provider = out.pop("key_provider_info")
    try:
        out["key_provider"] = load_json(provider)
    except FormatError:
        out["key_provider"] = provider
    if info.device_id == UNKNOWN_DEVICE_ID:
        out["device_id_means"] = NO_DEVICE
    if not info.init_script_hashes:
        del out["init_script_hashes"]
    return out
