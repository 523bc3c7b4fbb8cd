"""What auth-eth-bun takes as a boot info, and what it makes of it for the contract. Pure.

Both revisions take hex of any length up to the member's, with or without 0x, and pad it with zeros on the left. Since
next, longer values and other characters are refused at once, before the chain is asked; 0.5.11 asks, and what it would
send is then no argument that the contract has.

Source: dstack, `kms/auth-eth-bun/index.ts` at 40eaf35e (0.5.11) and next 312dc605; viem 2.31.7 (an address of mixed
case needs its checksum).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eth_address import decode_address
from dstack_emu.auth.boot_info import ReceivedBootInfo, parse_boot_info
from dstack_emu.auth.contract_abi import AppBootInfo
from dstack_emu.auth.errors import BootInfoBoundsError, ChainError

MAX_TCB_STATUS: Final = 128
MAX_ADVISORY_ID: Final = 256
"""UTF-16 units of a text at most, since next."""
MAX_ADVISORY_IDS: Final = 128
"""Advisories of a boot info at most, since next."""

_SIZES: Final[Mapping[str, tuple[str, int]]] = MappingProxyType(
    {
        "mr_aggregated": ("mrAggregated", 32),
        "os_image_hash": ("osImageHash", 32),
        "app_id": ("appId", 20),
        "compose_hash": ("composeHash", 32),
        "instance_id": ("instanceId", 20),
        "device_id": ("deviceId", 32),
        "mr_system": ("mrSystem", 32),
    }
)
"""The name in a request and the bytes of each member; those of 20 are addresses."""
_DIGITS: Final = re.compile("[0-9a-fA-F]*")


def parse_bounded_boot_info(document: object) -> ReceivedBootInfo:
    """Read a parsed body as boot info, within next's bounds; raise `BootInfoError` or `BootInfoBoundsError`."""
    boot_info = parse_boot_info(document)
    for attribute, (name, size) in _SIZES.items():
        _require_hex(name, getattr(boot_info, attribute), size)
    _require_short("tcbStatus", boot_info.tcb_status, MAX_TCB_STATUS)
    if len(boot_info.advisory_ids) > MAX_ADVISORY_IDS:
        raise BootInfoBoundsError(
            f"advisoryIds: {MAX_ADVISORY_IDS} at most expected, got {len(boot_info.advisory_ids)}"
        )
    for each in boot_info.advisory_ids:
        _require_short("advisoryIds", each, MAX_ADVISORY_ID)
    return boot_info


def contract_question(boot_info: ReceivedBootInfo) -> AppBootInfo:
    """Return the contract's argument; raise `ChainError` for a member that the contract cannot be given."""
    octets = {key: _octets(name, getattr(boot_info, key), size) for key, (name, size) in _SIZES.items()}
    return AppBootInfo(**octets, tcb_status=boot_info.tcb_status, advisory_ids=boot_info.advisory_ids)


def _require_hex(name: str, text: str, size: int) -> None:
    digits = text.removeprefix("0x")
    if not _DIGITS.fullmatch(digits):
        raise BootInfoBoundsError(f"{name}: hex expected, got {text!r:.80}")
    if len(digits) > 2 * size:
        raise BootInfoBoundsError(f"{name}: {size} bytes at most expected, got {len(digits)} digits")


def _require_short(name: str, text: str, most: int) -> None:
    units = len(text) + sum(character > "\uffff" for character in text)
    if units > most:
        raise BootInfoBoundsError(f"{name}: {most} characters at most expected, got {units}")


def _octets(name: str, text: str, size: int) -> bytes:
    digits = text.removeprefix("0x").rjust(2 * size, "0")
    try:
        if size == 20:
            return decode_address(f"0x{digits}")
        _require_hex(name, text, size)
        return bytes.fromhex(digits)
    except (FormatError, BootInfoBoundsError) as error:
        raise ChainError(f"{name}: {error}" if isinstance(error, FormatError) else str(error)) from error
