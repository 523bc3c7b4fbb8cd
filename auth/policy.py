"""auth-simple's rules: a config file's content and a boot info in, a decision out. Pure.

Three contracts share one config file and differ in few rules (`Compat`):

| contract | TCB status | advisory ids | an empty `devices` without `allowAnyDevice` |
| --- | --- | --- | --- |
| readme | `UpToDate` | not looked at | admits no device |
| upstream | `UpToDate` | not looked at | admits every device |
| next | one of `allowedTcbStatuses` | all in `allowedAdvisoryIds` | admits every device |

`readme` is what auth-simple's README promises, `upstream` what the code of v0.5.11 does instead, `next` what
the code of the next branch does. The rules say nothing of whether the boot info is true: that is the KMS's to
verify.

Source: the README of auth-simple; `kms/auth-simple/index.ts` of dstack, release/v0.5.x 40eaf35e and next
312dc605.
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool
from pydantic.alias_generators import to_camel

from dstack_emu.auth.boot_info import PolicyDecision as PolicyDecision
from dstack_emu.auth.boot_info import ReceivedBootInfo
from dstack_emu.auth.errors import AuthConfigError

Compat = Literal["readme", "upstream", "next"]
COMPATS: Final[tuple[Compat, ...]] = get_args(Compat)

Rule = Literal[
    "tcb_status",
    "advisory_ids",
    "os_image",
    "kms_mr_aggregated",
    "kms_device",
    "app_registered",
    "app_compose_hash",
    "app_device",
    "allowed",
]

ZERO_ADDRESS: Final = "0x" + "00" * 20


def parse_compat(text: str) -> Compat:
    """Name the contract that `text` names exactly, or raise `AuthConfigError`."""
    for compat in COMPATS:
        if compat == text:
            return compat
    raise AuthConfigError(f'AUTH_SIMPLE_COMPAT is "{text}", expected one of {", ".join(COMPATS)}')


def normalize_hex(text: str) -> str:
    """Lowercase, with `0x` in front; text that is no hex is treated alike, as upstream does."""
    text = text.lower()
    return text if text.startswith("0x") else "0x" + text


def _normalize_all(values: frozenset[str]) -> frozenset[str]:
    return frozenset(map(normalize_hex, values))


HexSet = Annotated[frozenset[str], AfterValidator(_normalize_all)]


class _ConfigModel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True)


class KmsPolicy(_ConfigModel):
    """The `kms` section: an empty or absent `mrAggregated` admits no KMS."""

    mr_aggregated: HexSet = frozenset()
    devices: HexSet = frozenset()
    allow_any_device: StrictBool = False


class AppPolicy(_ConfigModel):
    """One app's entry in `apps`: an empty or absent `composeHashes` admits no compose file."""

    compose_hashes: HexSet = frozenset()
    devices: HexSet = frozenset()
    allow_any_device: StrictBool = False


def _normalize_ids(apps: Mapping[str, AppPolicy]) -> Mapping[str, AppPolicy]:
    normalized: dict[str, AppPolicy] = {}
    for app_id, app in apps.items():
        # Of two spellings of one id the first counts, as upstream.
        normalized.setdefault(normalize_hex(app_id), app)
    return normalized


class Policy(_ConfigModel):
    """A config file's content, hex normalized.

    Every key is optional and `null` is no way to leave one out. A key that is not listed here is ignored, at
    every level, as upstream does: one file serves servers of several versions. Under the readme contract that
    can only narrow what is allowed (a misspelt key is an absent one, and what is absent admits nothing);
    under the other two a misspelt `devices` admits every device. Types are strict: `"true"` and `1` are no
    booleans. `chainId` must fit the 64 bits in which a KMS reads it; upstream takes any number there.
    """

    os_images: HexSet = frozenset()
    gateway_app_id: str = ""
    kms_contract_addr: str = ZERO_ADDRESS
    chain_id: Annotated[int, Field(strict=True, ge=0, lt=2**64)] = 0
    app_implementation: str = ZERO_ADDRESS
    allowed_tcb_statuses: frozenset[str] = frozenset({"UpToDate"})
    allowed_advisory_ids: frozenset[str] = frozenset()
    kms: KmsPolicy = KmsPolicy()
    apps: Annotated[Mapping[str, AppPolicy], AfterValidator(_normalize_ids)] = {}


def evaluate(policy: Policy, boot_info: ReceivedBootInfo, is_kms: bool, *, compat: Compat = "readme") -> PolicyDecision:
    """Decide under one contract, and say which of the others would decide otherwise.

    The rules run in upstream's order and the first that refuses gives the reason; an allowed boot has the
    reason "". Contracts that refuse alike for different reasons do not differ.
    """
    verdicts = {each: _deciding_rule(policy, boot_info, is_kms, each) for each in COMPATS}
    rule, reason = verdicts[compat]
    is_allowed = rule == "allowed"
    differs_from = tuple(each for each in COMPATS if (verdicts[each][0] == "allowed") != is_allowed)
    return PolicyDecision(is_allowed, reason, policy.gateway_app_id, rule, differs_from)


def _deciding_rule(policy: Policy, boot_info: ReceivedBootInfo, is_kms: bool, compat: Compat) -> tuple[Rule, str]:
    if compat == "next":
        if boot_info.tcb_status not in policy.allowed_tcb_statuses:
            return "tcb_status", "TCB status is not allowed"
        if not policy.allowed_advisory_ids.issuperset(boot_info.advisory_ids):
            return "advisory_ids", "advisory ID is not allowed"
    elif boot_info.tcb_status != "UpToDate":
        return "tcb_status", "TCB status is not up to date"
    if normalize_hex(boot_info.os_image_hash) not in policy.os_images:
        return "os_image", "OS image is not allowed"
    if is_kms:
        if normalize_hex(boot_info.mr_aggregated) not in policy.kms.mr_aggregated:
            return "kms_mr_aggregated", "aggregated MR not allowed"
        if not _is_device_admitted(policy.kms, boot_info, compat):
            return "kms_device", "KMS is not allowed to boot on this device"
    else:
        app = policy.apps.get(normalize_hex(boot_info.app_id))
        if app is None:
            return "app_registered", "app not registered"
        if normalize_hex(boot_info.compose_hash) not in app.compose_hashes:
            return "app_compose_hash", "compose hash not allowed"
        if not _is_device_admitted(app, boot_info, compat):
            return "app_device", "app is not allowed to boot on this device"
    return "allowed", ""


def _is_device_admitted(section: KmsPolicy | AppPolicy, boot_info: ReceivedBootInfo, compat: Compat) -> bool:
    if section.allow_any_device or normalize_hex(boot_info.device_id) in section.devices:
        return True
    return compat != "readme" and not section.devices
