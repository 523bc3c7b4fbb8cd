"""auth-simple's rules: a config file's content and a boot info in, a decision out. Pure.

Four contracts share one config file and differ in few rules (`Contract`, `_RULES`):

| contract | TCB status | advisory ids | an empty `devices` without `allowAnyDevice` |
| --- | --- | --- | --- |
| readme | `UpToDate` | not checked | admits no device |
| upstream | `UpToDate` | not checked | admits every device |
| next | one of `allowedTcbStatuses` | all in `allowedAdvisoryIds` | admits every device |
| 0.6 | one of `allowedTcbStatuses` | all in `allowedAdvisoryIds` | admits no device |

`readme` is what auth-simple's README promises, `upstream` what the code of v0.5.11 does instead, `next` what
the code of the next branch does, `0.6` that code with the device rule that the upgrade notes of 0.6.0 announce.
The rules do not establish that the boot info is true: the KMS verifies that.

Source: the README of auth-simple; `kms/auth-simple/index.ts` of dstack, release/v0.5.x 40eaf35e, next 312dc605
and 27cc12d7 (the same rules); the upgrade notes of 0.6.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool
from pydantic.alias_generators import to_camel

from dstack_emu.attest.release import DEFAULT
from dstack_emu.auth.boot_info import PolicyDecision as PolicyDecision
from dstack_emu.auth.boot_info import ReceivedBootInfo, Refusal
from dstack_emu.auth.errors import AuthConfigError

Contract = Literal["readme", "upstream", "next", "0.6"]
CONTRACTS: Final[tuple[Contract, ...]] = get_args(Contract)
DEFAULT_CONTRACT: Final[Contract] = DEFAULT.auth_contract
"""The contract of the default release."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What differs between the contracts."""

    configures_tcb: bool
    """The config file names the TCB statuses and advisories that are allowed; if not, only `UpToDate` is."""
    empty_devices_admit: bool
    """An empty `devices` admits every device, even without `allowAnyDevice`."""
    knows_tee_variant: bool
    """`teeVariant` is a member of the boot info, optional, and must be a string."""


_RULES: Final[Mapping[Contract, _Rules]] = {
    "readme": _Rules(configures_tcb=False, empty_devices_admit=False, knows_tee_variant=False),
    "upstream": _Rules(configures_tcb=False, empty_devices_admit=True, knows_tee_variant=False),
    "next": _Rules(configures_tcb=True, empty_devices_admit=True, knows_tee_variant=True),
    "0.6": _Rules(configures_tcb=True, empty_devices_admit=False, knows_tee_variant=True),
}

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
RULES: Final[tuple[Rule, ...]] = get_args(Rule)

ZERO_ADDRESS: Final = "0x" + "00" * 20


def parse_contract(text: str, setting: str = "AUTH_SIMPLE_COMPAT") -> Contract:
    """Return the contract of exactly this name, or raise `AuthConfigError`, which names `setting`."""
    for contract in CONTRACTS:
        if contract == text:
            return contract
    raise AuthConfigError(f'{setting} is "{text}", expected one of {", ".join(CONTRACTS)}')


def knows_tee_variant(contract: Contract) -> bool:
    """Return whether `teeVariant` is a member of the boot info under this contract: optional, and a string."""
    return _RULES[contract].knows_tee_variant


def accepted_tcb_statuses(policy: "Policy", contract: Contract) -> frozenset[str]:
    """Return the TCB statuses that this contract accepts: those of the config file, or `UpToDate` alone."""
    return _accepted_tcb_statuses(policy, _RULES[contract])


def _accepted_tcb_statuses(policy: "Policy", rules: _Rules) -> frozenset[str]:
    return policy.allowed_tcb_statuses if rules.configures_tcb else frozenset({"UpToDate"})


def normalize_hex(text: str) -> str:
    """Return `text` in lowercase with `0x` in front; text that is not hex is treated alike, as upstream does."""
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

    Every key is optional, and `null` does not stand for an absent one. A key that is not listed here is ignored,
    at every level, as upstream does: one file serves servers of several versions. Under the contracts `readme` and
    `0.6` that can only narrow what is allowed (a misspelt key is an absent one, and an absent one admits nothing);
    under the other two a misspelt `devices` admits every device. Types are strict: `"true"` and `1` are not
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

    @cached_property
    def app_ids(self) -> frozenset[str]:
        """The ids of all apps; made once, because there may be thousands, and every denial names them."""
        return frozenset(self.apps)


def evaluate(
    policy: Policy, boot_info: ReceivedBootInfo, is_kms: bool, *, contract: Contract = DEFAULT_CONTRACT
) -> PolicyDecision:
    """Decide under one contract, and name the contracts that would decide otherwise.

    The rules run in upstream's order and the first that refuses gives the reason; the reason of an allowed boot
    is "". Contracts that refuse for different reasons do not differ.
    """
    refusals = {each: _first_refusal(policy, boot_info, is_kms, _RULES[each]) for each in CONTRACTS}
    refusal = refusals[contract]
    differs_from = tuple(each for each in CONTRACTS if (refusals[each] is None) != (refusal is None))
    if refusal is None:
        return PolicyDecision(True, "", policy.gateway_app_id, "allowed", differs_from)
    return PolicyDecision(False, refusal.reason, policy.gateway_app_id, refusal.rule, differs_from, refusal=refusal)


def _first_refusal(policy: Policy, boot_info: ReceivedBootInfo, is_kms: bool, rules: _Rules) -> Refusal | None:
    return (
        _tcb_refusal(policy, boot_info, rules)
        or _os_image_refusal(policy, boot_info)
        or (_kms_refusal if is_kms else _app_refusal)(policy, boot_info, rules)
    )


def _refusal(
    rule: Rule, reason: str, member: str, got: tuple[str, ...], expected: frozenset[str], *path: str
) -> Refusal:
    return Refusal(rule, reason, member, got, expected, path)


def _tcb_refusal(policy: Policy, boot_info: ReceivedBootInfo, rules: _Rules) -> Refusal | None:
    accepted = _accepted_tcb_statuses(policy, rules)
    if boot_info.tcb_status not in accepted:
        reason = "TCB status is not allowed" if rules.configures_tcb else "TCB status is not up to date"
        path = ("allowedTcbStatuses",) if rules.configures_tcb else ()
        return _refusal("tcb_status", reason, "tcbStatus", (boot_info.tcb_status,), accepted, *path)
    advisories, allowed = boot_info.advisory_ids, policy.allowed_advisory_ids
    if rules.configures_tcb and not allowed.issuperset(advisories):
        got = tuple(each for each in dict.fromkeys(advisories) if each not in allowed)
        return _refusal("advisory_ids", "advisory ID is not allowed", "advisoryIds", got, allowed, "allowedAdvisoryIds")
    return None


def _os_image_refusal(policy: Policy, boot_info: ReceivedBootInfo) -> Refusal | None:
    image, images = boot_info.os_image_hash, policy.os_images
    if normalize_hex(image) not in images:
        return _refusal("os_image", "OS image is not allowed", "osImageHash", (image,), images, "osImages")
    return None


def _kms_refusal(policy: Policy, boot_info: ReceivedBootInfo, rules: _Rules) -> Refusal | None:
    kms, measured = policy.kms, boot_info.mr_aggregated
    if normalize_hex(measured) not in kms.mr_aggregated:
        reason, path = "aggregated MR not allowed", ("kms", "mrAggregated")
        return _refusal("kms_mr_aggregated", reason, "mrAggregated", (measured,), kms.mr_aggregated, *path)
    if not _is_device_admitted(kms, boot_info, rules):
        reason, device = "KMS is not allowed to boot on this device", (boot_info.device_id,)
        return _refusal("kms_device", reason, "deviceId", device, kms.devices, "kms", "devices")
    return None


def _app_refusal(policy: Policy, boot_info: ReceivedBootInfo, rules: _Rules) -> Refusal | None:
    app_id = normalize_hex(boot_info.app_id)
    app = policy.apps.get(app_id)
    if app is None:
        return _refusal("app_registered", "app not registered", "appId", (boot_info.app_id,), policy.app_ids, "apps")
    compose_hash = boot_info.compose_hash
    if normalize_hex(compose_hash) not in app.compose_hashes:
        reason, path = "compose hash not allowed", ("apps", app_id, "composeHashes")
        return _refusal("app_compose_hash", reason, "composeHash", (compose_hash,), app.compose_hashes, *path)
    if not _is_device_admitted(app, boot_info, rules):
        reason, device = "app is not allowed to boot on this device", (boot_info.device_id,)
        return _refusal("app_device", reason, "deviceId", device, app.devices, "apps", app_id, "devices")
    return None


def _is_device_admitted(section: KmsPolicy | AppPolicy, boot_info: ReceivedBootInfo, rules: _Rules) -> bool:
    if section.allow_any_device or normalize_hex(boot_info.device_id) in section.devices:
        return True
    return rules.empty_devices_admit and not section.devices
