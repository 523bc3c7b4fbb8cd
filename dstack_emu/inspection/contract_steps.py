"""What to do about a denial by a contract: the transaction that admits the boot, or why none does.

A webhook's answer does not say whether a contract decided. Three of the reasons are auth-simple's, too, so those steps
are conditional. Source of calls and reasons: dstack next 312dc605, `kms/auth-eth/contracts`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from dstack_emu.auth.contract_rules import ContractRule
from dstack_emu.auth.eth_settings import BACKEND_UNAVAILABLE

_SHARED: Final = frozenset(("tcb_status", "os_image", "kms_device"))
"""Rules whose reason a webhook without a contract may give, too."""

_MEMBERS: Final[Mapping[ContractRule, str]] = MappingProxyType(
    {
        "tcb_status": "tcbStatus",
        "os_image": "osImageHash",
        "kms_mr_aggregated": "mrAggregated",
        "kms_device": "deviceId",
        "app_registered": "appId",
        "app_deployed": "appId",
        "app_compose_hash": "composeHash",
        "app_device": "deviceId",
    }
)
"""The member of the boot info that a rule looks at."""

_STEPS: Final[Mapping[ContractRule, str]] = MappingProxyType(
    {
        "os_image": "its owner allows the image by addOsImageHash({osImageHash}) of DstackKms",
        "kms_mr_aggregated": "its owner allows the KMS by addKmsAggregatedMr({mrAggregated}) of DstackKms",
        "kms_device": "its owner allows the device by addKmsDevice({deviceId}) of DstackKms",
        "app_registered": "anyone registers the app by registerApp({appId}) of DstackKms, if its contract is at that "
        "address; deployAndRegisterApp creates one, whose address is the app id",
        "app_deployed": "the app is registered, but no contract is at its address {appId}: the app id is the address "
        "that deployAndRegisterApp returns",
        "app_compose_hash": "the app's owner allows the app-compose by addComposeHash({composeHash}) of DstackApp "
        "{appId}",
        "app_device": "the app's owner allows the device by addDevice({deviceId}), or every device by "
        "setAllowAnyDevice(true), of DstackApp {appId}",
    }
)


@dataclass(frozen=True, slots=True)
class ContractChange:
    """What a contract has to hold so that a rule allows a boot: an entry of a list, or with `removed` a setting.

    `contract` is `DstackKms`, whose address a request does not have, or `DstackApp 0x…`; `call` is the transaction.
    """

    contract: str
    listed: str
    value: str
    call: str
    removed: str = ""

    @property
    def diff(self) -> str:
        """The change as a unified diff; what else the list has is not known."""
        removed = f"-{self.removed}\n" if self.removed else ""
        return f"@@ {self.listed} of {self.contract} @@\n{removed}+{self.value}"

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        op = {"op": "replace", "from": self.removed} if self.removed else {"op": "add"}
        about = {"contract": self.contract, "list": self.listed, **op, "value": self.value}
        return {**about, "call": self.call, "diff": self.diff}


_APP: Final = "DstackApp {appId}"
_CHANGES: Final[Mapping[ContractRule, tuple[str, str, str, str]]] = MappingProxyType(
    {
        "os_image": ("DstackKms", "allowedOsImages", "{osImageHash}", "addOsImageHash({osImageHash})"),
        "kms_mr_aggregated": (
            "DstackKms",
            "kmsAllowedAggregatedMrs",
            "{mrAggregated}",
            "addKmsAggregatedMr({mrAggregated})",
        ),
        "kms_device": ("DstackKms", "kmsAllowedDeviceIds", "{deviceId}", "addKmsDevice({deviceId})"),
        "app_registered": ("DstackKms", "registeredApps", "{appId}", "registerApp({appId})"),
        "app_compose_hash": (_APP, "allowedComposeHashes", "{composeHash}", "addComposeHash({composeHash})"),
        "app_device": (_APP, "allowedDeviceIds", "{deviceId}", "addDevice({deviceId})"),
    }
)
"""By rule: the contract, its list, the entry that is missing, and the transaction that adds it."""
_TCB_OF_KMS: Final = "no transaction admits it: DstackKms lets no KMS boot whose TCB status is not UpToDate"
_TCB_OF_APP: Final = "the app's owner accepts such platforms by setRequireTcbUpToDate(false) of DstackApp {appId}"


def member_of(rule: ContractRule) -> str | None:
    """Return the member of the boot info that a rule looks at; None for `allowed`."""
    return _MEMBERS.get(rule)


def may_be_of_a_file(rule: ContractRule) -> bool:
    """Return whether a webhook that decides by a file gives the same reason."""
    return rule in _SHARED


def contract_change(rule: ContractRule | None, request: Mapping[str, Any], *, is_kms: bool) -> ContractChange | None:
    """Return the change of a contract that lifts a denial by this rule; None if none is known, or possible.

    A reason that a webhook with a file may give, too, has the change that a contract would need.
    """
    named = {name: _hex(value) for name, value in request.items()}
    if rule == "tcb_status" and not is_kms:
        contract = _APP.format_map(named)
        return ContractChange(contract, "requireTcbUpToDate", "false", "setRequireTcbUpToDate(false)", "true")
    if rule is None or rule not in _CHANGES:
        return None
    return ContractChange(*(each.format_map(named) for each in _CHANGES[rule]))


def contract_steps(
    rule: ContractRule | None, reason: str, request: Mapping[str, Any], *, is_kms: bool
) -> Iterator[str]:
    """Yield what to do about a denial with this reason; nothing if no contract and no auth-eth gives it.

    `request` is the body that the webhook was sent.
    """
    if reason == BACKEND_UNAVAILABLE:
        yield (
            "This is auth-eth: its chain gave no decision. GET / of the webhook asks the chain, too; `dstack-emu auth "
            "eth -v` logs why."
        )
    if rule is None:
        return
    step = (_TCB_OF_KMS if is_kms else _TCB_OF_APP) if rule == "tcb_status" else _STEPS[rule]
    named = {name: _hex(value) for name, value in request.items()}
    where = "If the webhook asks a DstackKms contract" if may_be_of_a_file(rule) else "This is a contract's reason"
    yield f"{where}: {step.format_map(named)}."
    if step != _TCB_OF_KMS:
        yield "The next block has it; auth-eth may decide by one that is up to 4 s old, or older with confirmations."


def _hex(value: Any) -> str:
    return f"0x{value.removeprefix('0x')}" if isinstance(value, str) else str(value)
