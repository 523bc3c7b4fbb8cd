"""Why contracts deny a boot, and the fewest acts after which they allow it, read from their views.

Each act adds one entry, or lifts one setting. Whether they suffice is the contracts' own answer: send the acts to a
fork of the chain, and ask there. Source of rules and their order: dstack next 312dc605, `kms/auth-eth/contracts`.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

from dstack_emu.chain.contracts import AppContract, BootInfo, Contract, ContractError, KmsContract
from dstack_emu.chain.holdings import next_app_id
from dstack_emu.chain.operations import LISTINGS
from dstack_emu.chain.policy import AppPolicy, ContractPolicy, read_policy
from dstack_emu.chain.quantities import checksummed, data

UP_TO_DATE: Final = "UpToDate"
_TCB_OF_KMS: Final = "DstackKms lets no KMS boot whose TCB status is not UpToDate"


@dataclass(frozen=True, slots=True)
class Missing:
    """What a rule of a contract refuses.

    `contract` and `listed` are where the rule looks: the list or setting with the values `wanted` now. `act` and
    `fields` are the act that changes it, None if none does; then `obstacle` says why. `removed` is what the act
    replaces, empty for an entry of a list.
    """

    rule: str
    member: str
    got: str
    contract: Contract
    listed: str
    wanted: tuple[str, ...] = ()
    added: str = ""
    removed: str = ""
    act: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    obstacle: str = ""

    @property
    def place(self) -> str:
        """The list and its contract, such as `allowedComposeHashes of 0x…`."""
        return f"{self.listed} of {checksummed(self.contract.address)}"

    @property
    def diff(self) -> list[str]:
        """The change in the lines of a unified diff."""
        present = [f"-{each}" if each == self.removed else f" {each}" for each in self.wanted]
        return [f"@@ {self.place} @@", *present, f"+{self.added}"]

    @property
    def difference(self) -> dict[str, str]:
        """The change as data."""
        said = {"contract": checksummed(self.contract.address), "list": self.listed}
        return (
            said | ({"op": "replace", "from": self.removed} if self.removed else {"op": "add"}) | {"value": self.added}
        )


async def missing(kms: KmsContract, boot: BootInfo, *, is_kms: bool) -> list[Missing]:
    """Return what the contracts refuse of a boot, in the order of their rules; nothing if they allow it."""
    policy = await read_policy(kms.ask, kms.address)
    found = _of_kms(kms, policy, boot) if is_kms else _of_app(kms, policy, boot)
    return [each async for each in found]


async def _of_kms(kms: KmsContract, policy: ContractPolicy, boot: BootInfo) -> AsyncIterator[Missing]:
    if boot.tcb_status != UP_TO_DATE:
        yield Missing("tcb_status", "tcbStatus", boot.tcb_status, kms, "tcbStatus", (UP_TO_DATE,), obstacle=_TCB_OF_KMS)
    if boot.os_image_hash not in policy.os_images:
        yield _image(kms, policy, boot)
    if boot.mr_aggregated not in policy.kms_measurements:
        listed, value = policy.kms_measurements, boot.mr_aggregated
        yield _entry("kms_mr_aggregated", "mrAggregated", "kms-mr", kms, listed, value)
    if boot.device_id not in policy.kms_devices:
        yield _entry("kms_device", "deviceId", "kms-device", kms, policy.kms_devices, boot.device_id)


async def _of_app(kms: KmsContract, policy: ContractPolicy, boot: BootInfo) -> AsyncIterator[Missing]:
    present = policy.apps.get(boot.app_id)
    code = await kms.ask("eth_getCode", [data(boot.app_id), "latest"])
    if present is None:
        registration = await _registration(kms, policy, boot, has_code=code != "0x")
        yield registration
        if registration.act is None:
            return
    if boot.os_image_hash not in policy.os_images:
        yield _image(kms, policy, boot)
    app = AppContract(kms.ask, boot.app_id)
    if code == "0x":
        if present is not None:
            obstacle = f"no contract is at {checksummed(boot.app_id)}: the app id is what deployAndRegisterApp returns"
            yield Missing("app_deployed", "appId", checksummed(boot.app_id), app, "code", obstacle=obstacle)
        return  # deployAndRegisterApp allows the rest
    for each in await _of_contract(app, present or await _listed(app, boot), boot):
        yield each


async def _listed(app: AppContract, boot: BootInfo) -> AppPolicy:
    """Return what a contract that is not registered yet says of a boot."""
    try:
        hashes = await app.view("allowedComposeHashes(bytes32)", "(bool)", boot.compose_hash)
        devices = await app.view("allowedDeviceIds(bytes32)", "(bool)", boot.device_id)
        any_device = await app.view("allowAnyDevice()", "(bool)")
    except ContractError:
        return AppPolicy()
    listed = frozenset([boot.compose_hash] if hashes else []), frozenset([boot.device_id] if devices else [])
    return AppPolicy(*listed, any_device)


async def _of_contract(app: AppContract, policy: AppPolicy, boot: BootInfo) -> list[Missing]:
    address = checksummed(app.address)
    try:
        requires = await app.view("requireTcbUpToDate()", "(bool)")
    except ContractError as error:  # a registered app may be any contract
        obstacle = f"{address} is no DstackApp, and decides by rules of its own: {error}"
        return [Missing("app_deployed", "appId", address, app, "isAppAllowed", obstacle=obstacle)]
    found = []
    if requires and boot.tcb_status != UP_TO_DATE:
        fields = {"app": address, "setting": "require-tcb-up-to-date", "value": False}
        setting = ("requireTcbUpToDate", ("true",), "false", "true", "app-set", fields)
        found.append(Missing("tcb_status", "tcbStatus", boot.tcb_status, app, *setting))
    if boot.compose_hash not in policy.compose_hashes:
        listed, value = policy.compose_hashes, boot.compose_hash
        found.append(_entry("app_compose_hash", "composeHash", "compose-hash", app, listed, value))
    if not policy.allow_any_device and boot.device_id not in policy.devices:
        found.append(_entry("app_device", "deviceId", "device", app, policy.devices, boot.device_id))
    return found


async def _registration(kms: KmsContract, policy: ContractPolicy, boot: BootInfo, *, has_code: bool) -> Missing:
    address, registered = checksummed(boot.app_id), tuple(sorted(map(checksummed, policy.apps)))
    what = ("app_registered", "appId", address, kms, "registeredApps", registered, address, "")
    if has_code:
        return Missing(*what, act="app-register", fields={"address": address})
    following = await next_app_id(kms)
    if boot.app_id == following:
        fields = {"compose_hash": data(boot.compose_hash), "device": data(boot.device_id)}
        return Missing(*what, act="app-deploy", fields=fields)
    return Missing(
        *what,
        obstacle=f"the app id {address} is no contract on this chain. On a chain an app's id is the address of its "
        f"contract: the next one that the factory creates is {checksummed(following)}. Give the app that id",
    )


def _image(kms: KmsContract, policy: ContractPolicy, boot: BootInfo) -> Missing:
    return _entry("os_image", "osImageHash", "os-image", kms, policy.os_images, boot.os_image_hash)


def _entry(rule: str, member: str, kind: str, contract: Contract, listed: frozenset[bytes], value: bytes) -> Missing:
    text, fields = data(value), {"kind": kind, "value": data(value)}
    if isinstance(contract, AppContract):
        fields["app"] = checksummed(contract.address)
    values = tuple(data(each) for each in sorted(listed))
    return Missing(rule, member, text, contract, LISTINGS[kind].view, values, text, "", "allow", fields)
