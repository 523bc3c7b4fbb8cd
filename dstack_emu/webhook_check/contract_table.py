"""What auth-eth-bun with a DstackKms contract behind it answers to each changed request.

Written from what these do, not from the emulated ones. The webhook of `next` refuses members that are no hex, or longer
than the contract's; shorter ones are padded, and compared as bytes. Of an address, letters of both cases or upper case
alone must be its checksum. A KMS needs the TCB status UpToDate and a listed device; of an app, its own contract may
require the status, and list devices. Advisories, mrSystem and instanceId are read, and decide nothing.

Source: dstack next 312dc605, `kms/auth-eth-bun/index.ts` and `kms/auth-eth/contracts`; viem 2.31.7 (addresses).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

from dstack_emu.webhook_check.allowed import Facts, Side
from dstack_emu.webhook_check.changes import OTHER_PATH, Change

_ADDRESS: Final = 20
_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "mrAggregated": 32,
        "osImageHash": 32,
        "appId": _ADDRESS,
        "composeHash": 32,
        "instanceId": _ADDRESS,
        "deviceId": 32,
        "mrSystem": 32,
    }
)
_OPTIONAL: Final = ("mrSystem", "tcbStatus", "advisoryIds")
_READ: Final = (*_SIZES, "tcbStatus", "advisoryIds")
_DECIDING: Final[Mapping[Side, tuple[str, ...]]] = {
    "kms": ("osImageHash", "mrAggregated", "deviceId", "tcbStatus"),
    "app": ("osImageHash", "appId", "composeHash", "deviceId"),
}
_MAX_STATUS, _MAX_ADVISORY, _MAX_ADVISORIES = 128, 256, 128
_UP_TO_DATE: Final = "UpToDate"


def expected_of_contract(change: Change, side: Side, facts: Facts) -> Literal["allowed", "denied", "error", "any"]:
    """Return the answer; `any` if it depends on a policy that is not known. The body is an object with members."""
    member = change.member
    if member == OTHER_PATH:
        return "denied"
    if member not in _READ or change.kind == "first_differs":
        return "allowed"
    if change.kind in ("null", "mistyped") or (change.kind == "absent" and member not in _OPTIONAL):
        return "error"
    value = _value_of(change)
    if not _fits(member, value):
        return "error"
    if _SIZES.get(member) == _ADDRESS and str(value).upper() == value != str(value).lower():
        return "denied"
    if change.kind == "respelled" or value == _UP_TO_DATE:
        return "allowed"
    if (member, side) == ("tcbStatus", "app") or (member == "deviceId" and _checks_device(side, facts) is None):
        return "any"
    return "denied" if decides_in_contract(member, side, facts) else "allowed"


def decides_in_contract(member: str, side: Side, facts: Facts) -> bool:
    """Return whether the contract surely decides by a member."""
    return member in _DECIDING[side] and (member != "deviceId" or bool(_checks_device(side, facts)))


def _checks_device(side: Side, facts: Facts) -> bool | None:
    return True if side == "kms" else facts.checks_device


def _value_of(change: Change) -> Any:
    """Return the value that counts: the last of two, and what stands for an absent optional member."""
    if change.kind == "last_differs":
        return {"tcbStatus": "OutOfDate", "advisoryIds": ["INTEL-SA-99999"]}.get(change.member, "ee" * 32)
    if change.kind == "absent":
        return [] if change.member == "advisoryIds" else ""
    return change.value


def _fits(member: str, value: Any) -> bool:
    if member == "advisoryIds":
        return len(value) <= _MAX_ADVISORIES and all(len(each) <= _MAX_ADVISORY for each in value)
    if member == "tcbStatus":
        return len(value) <= _MAX_STATUS
    return re.fullmatch(f"(0x)?[0-9a-fA-F]{{0,{2 * _SIZES[member]}}}", value) is not None
