"""What dstack's auth servers answer to each changed request: a table for auth-simple, and one for dstack-auth.

That of auth-eth is in `contract_table`.

The tables are written from what these servers document and do, not from the emulated ones. auth-simple validates with
zod: six members are required texts; tcbStatus, advisoryIds and mrSystem (and teeVariant since next) are optional, but
not null; all others are ignored; hex is compared in lowercase with 0x in front; of a member that is there twice
the last counts. dstack-auth reads five members with serde: an absent one is empty, null and a repeated member are
errors, and ids are trimmed.

Source: dstack 312dc605, `kms/auth-simple/index.ts` and `crates/dstack-auth/src/main.rs`; auth-simple's README, and the
upgrade notes of 0.6.0, for the devices.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Literal

from dstack_emu.webhook_check.allowed import Contract, Facts, Side
from dstack_emu.webhook_check.changes import OTHER_PATH, Change, Kind
from dstack_emu.webhook_check.contract_table import decides_in_contract, expected_of_contract

Outcome = Literal["allowed", "denied", "error"]
Expected = Literal["allowed", "denied", "error", "any"]
Role = Literal[
    "decides", "required", "optional", "status", "advisories", "advisories read", "unread", "file decides", "file read"
]

_KINDS: Final[tuple[Kind, ...]] = (
    "value",
    "empty",
    "respelled",
    "spaced",
    "absent",
    "null",
    "mistyped",
    "last_differs",
    "first_differs",
)
_LETTERS: Final[Mapping[str, Outcome]] = {"A": "allowed", "D": "denied", "E": "error"}
_ROWS: Final[Mapping[Role, str]] = {
    # kinds:            v e r s a n m l f
    "decides": "         D D A D E E E D A",
    "required": "        A A A A E E E A A",
    "optional": "        A A A A A E E A A",
    "status": "          D D D D D E E D A",
    "advisories": "      D A D D A E E D A",
    "advisories read": " A A A A A E E A A",
    "unread": "          A A A A A A A A A",
    "file decides": "    D D A A D E E E E",
    "file read": "       A A A A A E E E E",
}
_TABLE: Final[Mapping[tuple[Role, Kind], Outcome]] = {
    (role, kind): _LETTERS[letter]
    for role, letters in _ROWS.items()
    for kind, letter in zip(_KINDS, letters.split(), strict=True)
}

_DECIDING: Final[Mapping[Side, tuple[str, ...]]] = {
    "kms": ("osImageHash", "mrAggregated", "deviceId"),
    "app": ("osImageHash", "appId", "composeHash", "deviceId"),
}
_FILE_DECIDING: Final[Mapping[Side, tuple[str, ...]]] = {
    "kms": ("mrAggregated", "deviceId"),
    "app": ("osImageHash", "appId", "composeHash", "deviceId"),
}
_REQUIRED: Final = ("mrAggregated", "osImageHash", "appId", "composeHash", "instanceId", "deviceId")
_FILE_READ: Final = ("mrAggregated", "osImageHash", "appId", "composeHash", "deviceId")


def expected(change: Change, side: Side, contract: Contract, facts: Facts) -> Expected:
    """Return what a server of this contract answers; `any` if that depends on a policy that is not known."""
    if change.kind in ("no_object", "encoded"):
        return "error"
    if change.member == "body":  # an object without members
        return "denied" if contract == "file" else "error"
    if contract == "eth":
        return expected_of_contract(change, side, facts)
    if change.member == OTHER_PATH:
        return "denied"
    if change.member == "deviceId" and facts.checks_device is None:
        either = {expected(change, side, contract, replace(facts, checks_device=known)) for known in (True, False)}
        return either.pop() if len(either) == 1 else "any"
    role = _role(change.member, side, contract, facts)
    if change.kind == "value" and _is_admitted(change, role, facts):
        return "allowed"
    return _TABLE[role, change.kind]


def decides(change: Change, side: Side, contract: Contract, facts: Facts) -> bool:
    """Return whether the change takes away what decides under this contract: then nothing may be allowed.

    Advisories that are null do not: that there are none is allowed. Nor does another encoding.
    """
    if change.member in ("body", OTHER_PATH):
        return change.kind != "encoded"
    if contract == "eth":
        return decides_in_contract(change.member, side, facts)
    role = _role(change.member, side, contract, facts)
    return role in ("decides", "status", "file decides") or (role == "advisories" and change.kind != "null")


def _role(member: str, side: Side, contract: Contract, facts: Facts) -> Role:
    is_checked = not (
        (member == "deviceId" and not facts.checks_device) or (member == "osImageHash" and not facts.checks_os_image)
    )
    if contract == "file":
        if member in _FILE_DECIDING[side] and is_checked:
            return "file decides"
        return "file read" if member in _FILE_READ else "unread"
    has_lists = contract in ("next", "0.6")
    if member == "tcbStatus":
        return "status"
    if member == "advisoryIds":
        return "advisories" if has_lists else "advisories read"
    if member == "mrSystem" or (member == "teeVariant" and has_lists):
        return "optional"
    if member in _DECIDING[side] and is_checked:
        return "decides"
    return "required" if member in _REQUIRED else "unread"


def _is_admitted(change: Change, role: Role, facts: Facts) -> bool:
    if role == "status":
        return change.value in facts.tcb_statuses
    return role == "advisories" and facts.advisory_ids.issuperset(change.value)
