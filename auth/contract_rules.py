"""The rules of the DstackKms and DstackApp contracts, by the reasons that they give. Pure.

The capitals differ from auth-simple's reasons. A registered app may be any contract with isAppAllowed, so that other
reasons are possible, too; their rule is not known.

Source: dstack next 312dc605, `kms/auth-eth/contracts/DstackKms.sol` and `DstackApp.sol`; the same texts in 0.5.11.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, get_args

ContractRule = Literal[
    "tcb_status",
    "os_image",
    "kms_mr_aggregated",
    "kms_device",
    "app_registered",
    "app_deployed",
    "app_compose_hash",
    "app_device",
    "allowed",
]
CONTRACT_RULES: Final[tuple[ContractRule, ...]] = get_args(ContractRule)

KMS_REASONS: Final[Mapping[str, ContractRule]] = MappingProxyType(
    {
        "TCB status is not up to date": "tcb_status",
        "OS image is not allowed": "os_image",
        "Aggregated MR not allowed": "kms_mr_aggregated",
        "KMS is not allowed to boot on this device": "kms_device",
    }
)
"""Reasons of isKmsAllowed, in the order of its checks."""
APP_REASONS: Final[Mapping[str, ContractRule]] = MappingProxyType(
    {
        "App not registered": "app_registered",
        "OS image is not allowed": "os_image",
        "App not deployed or invalid address": "app_deployed",
        "TCB status is not up to date": "tcb_status",
        "Compose hash not allowed": "app_compose_hash",
        "Device not allowed": "app_device",
    }
)
"""Reasons of isAppAllowed: three of DstackKms, then three of the DstackApp at the app's address."""


def rule_of(reason: str, *, is_kms: bool) -> ContractRule | None:
    """Return the rule that gives this reason for a denial; None if it is not one of these contracts' reasons."""
    return (KMS_REASONS if is_kms else APP_REASONS).get(reason)
