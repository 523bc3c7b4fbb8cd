"""The bodies of the acts on the chain of a stack, which are those of `dstack-emu chain ACT`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dstack_emu.control.schemas import HexText, RequestBody

OF_APP: Final = ("compose-hash", "device")


def _hex_of(size: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        text = value.lower().removeprefix("0x") if isinstance(value, str) else ""
        if len(text) != 2 * size or set(text) - set("0123456789abcdef"):
            raise ValueError(f"{size} bytes in hex expected, with or without 0x, got {value!r:.80}")
        return text

    return check


Address = Annotated[
    str, BeforeValidator(_hex_of(20)), Field(json_schema_extra={"description": "an address: 20 bytes in hex"})
]
Hash = Annotated[str, BeforeValidator(_hex_of(32)), Field(json_schema_extra={"description": "32 bytes in hex"})]


class ChainAct(RequestBody):
    """An act on the chain of the stack, which one of its accounts sends: the first one unless `sender` names another.

    With `preview` nothing is sent: the answer says what would come of it.
    """

    sender: Address | None = None
    preview: bool = False


class ListEntry(ChainAct):
    """An entry of a list: of DstackKms, or of an app, which is the stack's unless `app` names another."""

    kind: Literal["os-image", "kms-mr", "kms-device", "compose-hash", "device"]
    value: Hash
    app: Address | None = None

    @model_validator(mode="after")
    def _has_app(self) -> Self:
        if self.app is not None and self.kind not in OF_APP:
            raise ValueError(f"app is for {' and '.join(OF_APP)}: {self.kind} is listed by DstackKms")
        return self


class NewApp(ChainAct):
    """The contract of an app that the factory creates; the sender owns it unless `owner` is given."""

    owner: Address | None = None
    compose_hash: Hash | None = None
    device: Hash | None = None
    allow_any_device: bool = False
    require_tcb_up_to_date: bool = False
    disable_upgrades: bool = False


class RegisteredApp(ChainAct):
    """The address of a contract that exists, which is registered as an app."""

    address: Address


class NewOwner(ChainAct):
    """Who is to own DstackKms, or an app."""

    address: Address
    app: Address | None = None


class AcceptedOwner(ChainAct):
    """DstackKms, or an app, whose ownership the sender accepts."""

    app: Address | None = None


class Upgrade(ChainAct):
    """The new implementation of DstackKms, or of an app; without one this project's is deployed."""

    implementation: Address | None = None
    app: Address | None = None


class AppSetting(ChainAct):
    """A setting of an app, which is the stack's unless `app` names another; upgrades cannot be enabled again."""

    setting: Literal["allow-any-device", "require-tcb-up-to-date", "disable-upgrades"]
    value: bool = True
    app: Address | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.setting == "disable-upgrades" and not self.value:
            raise ValueError("disable-upgrades: true expected: a contract whose upgrades are disabled stays as it is")
        return self


class KmsSetting(ChainAct):
    """A setting of DstackKms: the gateway's app, a text, or the implementation of the factory's apps, an address."""

    setting: Literal["gateway-app-id", "app-implementation"]
    value: Annotated[str, Field(max_length=200)]


class PublishedInfo(ChainAct):
    """What a KMS publishes on chain."""

    k256_pubkey: HexText
    ca_pubkey: HexText
    quote: HexText
    eventlog: HexText


BODIES: Final[Mapping[str, type[ChainAct]]] = MappingProxyType(
    {
        "allow": ListEntry,
        "remove": ListEntry,
        "app-deploy": NewApp,
        "app-register": RegisteredApp,
        "app-set": AppSetting,
        "kms-set": KmsSetting,
        "kms-info": PublishedInfo,
        "transfer-ownership": NewOwner,
        "accept-ownership": AcceptedOwner,
        "upgrade": Upgrade,
    }
)
"""The acts, and their bodies."""
